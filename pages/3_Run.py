"""Quantize by the plan, evaluate, and follow it; a run goes on when this page is closed."""

from __future__ import annotations

import re
from pathlib import Path

import streamlit as st

from lsq_core import disk, jobs
from lsq_core.config import format_bytes
from lsq_core.corpus import BUILT_IN
from lsq_core.errors import InputError, LsqError
from lsq_core.evaluate import PROTOCOLS, Protocol
from lsq_core.jobs import Job
from lsq_core.pipeline import EvaluationRequest
from lsq_core.plan import PlanRequest, get_planner
from lsq_core.quantize import QUANTIZERS
from lsq_core.store import Store
from lsq_core.ui import arguments, jobs_panel, known, state, words
from lsq_core.ui.page import Here, headline, next_step, page

#: Stages whose time a result tells.
_TIMED = ("quantize", "evaluate")


def run_page(here: Here) -> None:
    """What is about to run, what is running, and what came of it."""
    folder = disk.jobs_folder(here.store)
    found = [job for job in jobs.list_jobs(folder) if job.arguments[0] == "run"]
    shown = selected(found)
    first = st.container()
    has_weights = known.published(here.store, here.source) is None
    if has_weights:
        ask(here, folder)
    with first:
        if not has_weights:
            say_no_weights(here.info.source)
        elif shown is None:
            headline(
                "Nothing has run yet.",
                "Quantizing and evaluating goes on in the background; this page can be closed.",
            )
        if shown is not None and (has_weights or shown.active or _picked(found)):
            jobs_panel.follow(shown, say if has_weights else None)
            if shown.state == "done":
                show_result(shown)
    show_jobs(found)


def say_no_weights(name: str) -> None:
    """Why a published model can't run, and what can be done."""
    headline(
        f"{words.literal(name)} has no weights here, so there is nothing to run.",
        "Its measurements were published. To quantize the model itself, choose it by its Hugging "
        "Face id or as a folder.",
    )
    with st.container(horizontal=True):
        next_step("app.py", "Choose a model with weights")
        next_step("pages/2_Plan.py", "Plan for it")
        next_step("pages/4_Compare.py", "Compare its published runs")


def selected(found: list[Job]) -> Job | None:
    """The job picked in the table of recent ones, else one that is running, else the newest."""
    if not found:
        return None
    picked = _picked(found)
    return picked or next((job for job in found if job.state == "running"), found[0])


def _picked(found: list[Job]) -> Job | None:
    rows = st.session_state.get("jobs", {}).get("selection", {}).get("rows", [])
    return found[rows[0]] if rows and rows[0] < len(found) else None


# --- asking ---------------------------------------------------------------------------------


def ask(here: Here, folder: Path) -> None:
    """What to quantize and evaluate, and the button."""
    info = here.info
    state.begin_settings(info.fingerprint, known.newest_settings(here.store, info))
    settings = state.settings()
    found = known.profile(here.store, info, settings)
    state.begin_plan(found is not None)
    state.share_plan()
    request = state.plan_request()
    with st.container(border=True):
        top, change = st.columns([5, 1], vertical_alignment="center")
        top.markdown(f"**Next:** {plan_in_words(here, request)}")
        change.page_link("pages/2_Plan.py", label="Change the plan")
        quantizer, evaluation, save = options(here.store, info.context)
        if st.button("Quantize and evaluate", type="primary", icon=":material/play_arrow:"):
            words_of = ["run", *arguments.model_arguments(here.source, here.device)]
            words_of += arguments.plan_arguments(request, settings)
            words_of += arguments.evaluation_arguments(
                evaluation, quantizer, save_folder(here.store, save)
            )
            jobs.start(folder, [*words_of, "--db", str(here.store.path)])
            st.session_state.pop("jobs", None)  # show the new one
            st.rerun()


def plan_in_words(here: Here, request: PlanRequest) -> str:
    """The plan that a run would make, in a sentence."""
    info, settings = here.info, state.settings()
    planner = get_planner(request.method)
    wanted = " and ".join(
        [f"base {request.base}"] * bool(request.base)
        + [f"at most {(request.budget or '').removesuffix('bpp')} bits"] * bool(request.budget)
    )
    found = known.profile(here.store, info, settings)
    text = f"{planner.title} on {here.source.name}, {wanted}"
    if planner.metrics and found is None:
        return f"{text}; the run will measure the profile first."
    try:
        plan = known.plan(info, found, request, settings)
    except LsqError as error:
        return f"{text}. {error}"
    return f"{text}: {plan.bits_per_param:.2f} bits, {format_bytes(plan.planned_bytes)} planned."


def options(store: Store, context: int) -> tuple[str, EvaluationRequest, str]:
    """Quantizer, evaluation and the name to save under."""
    columns = st.columns([1, 1.4, 1.8, 1.2, 1.6])
    quantizer = columns[0].selectbox(
        "Quantizer", list(QUANTIZERS), key="quantizer", persist_state="session"
    )
    corpus = columns[1].selectbox(
        "Evaluation text",
        list(dict.fromkeys([*BUILT_IN, st.session_state.get("corpus") or "stdlib"])),
        key="corpus",
        accept_new_options=True,
        persist_state="session",
    )
    protocol = columns[2].selectbox(
        "Protocol",
        list(PROTOCOLS),
        format_func=lambda name: Protocol.named(name, context).name,
        key="protocol",
        persist_state="session",
        help="strided: windows of 1,024 tokens of which the last 512 are scored. blocks: windows "
        "of 2,048 side by side. A shorter context gets shorter windows under a name of their own.",
    )
    tokens = columns[3].number_input(
        "Max tokens",
        min_value=0,
        step=1000,
        key="max_tokens",
        persist_state="session",
        help="0 evaluates the whole text.",
    )
    save = columns[4].text_input(
        "Save the model as",
        key="save",
        placeholder="don't save",
        persist_state="session",
        help=f"A folder in {disk.models_folder(store)}.",
    )
    return quantizer, EvaluationRequest(corpus, protocol, tokens or None), save


def save_folder(store: Store, name: str) -> Path | None:
    """The new folder for a quantized model, inside the models' folder and nowhere else.

    Raises
    ------
    InputError
        When the name has other characters, or is taken.
    """
    name = name.strip()
    if not name:
        return None
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise InputError(f"'{name}' is not a name to save under; use letters, digits, . _ and -.")
    folder = disk.models_folder(store) / name
    if folder.exists():
        raise InputError(f"A saved model named '{name}' exists; choose another name.")
    return folder


# --- following ------------------------------------------------------------------------------


def say(job: Job) -> None:
    """The first line: how far it is, or what came of it."""
    what = job.title.removeprefix("run ")
    if job.active:
        jobs_panel.say(job)
        return
    result = job.result() if job.state == "done" else None
    if result is None:
        headline(f"The run {jobs_panel.ENDED[job.state]}.", what)
        return
    change = result["increase"]
    headline(
        f"Perplexity {result['perplexity']:.2f}, "
        f"{words.signed_percent(change['relative'])} over full precision.",
        f"{what} · {result['corpus']}, {result['protocol']}, {result['tokens']:,} tokens"
        + (", cut by max tokens" if result["truncated"] else ""),
    )


def show_result(job: Job) -> None:
    """The figures of a run that is done."""
    result = job.result()
    change = result["increase"]
    figures = {
        "Perplexity": f"{result['perplexity']:.4f}",
        "Full precision": f"{result['perplexity_full']:.4f}",
        "Difference": words.signed_percent(change["relative"], 2),
        "KL (nats)": f"{result['kl']:.4f}",
        "Same top token": f"{100 * result['top1']:.1f} %",
        "Measured": format_bytes(result["measured_bytes"]),
    }
    for column, (label, value) in zip(st.columns(len(figures)), figures.items(), strict=True):
        column.metric(label, value)
    spread = words.interval(change["low"], change["high"])
    parts = [f"{stage} {words.seconds(result[f'{stage}_seconds'])}" for stage in _TIMED]
    facts = [
        f"95 % interval of the difference {spread}",
        f"whole model {format_bytes(result['measured_model_bytes'])}",
        f"took {words.seconds(job.seconds)}: {', '.join(parts)}",
    ]
    facts += [f"saved to {result['saved_to']}"] if result["saved_to"] else []
    st.caption(" · ".join(facts))
    next_step("pages/4_Compare.py", "Compare it with the other runs")


def show_jobs(found: list[Job]) -> None:
    """Recent runs with their states; picking one shows it above."""
    if not found:
        return
    st.subheader("Recent runs", anchor=False)
    st.dataframe(
        jobs_panel.table(found[:50]),
        hide_index=True,
        key="jobs",
        on_select="rerun",
        selection_mode="single-row",
        height=220 if len(found) > 5 else "auto",
        column_config={
            "started": st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm:ss"),
            "message": st.column_config.TextColumn(width="large"),
        },
    )


page("Run", run_page)
