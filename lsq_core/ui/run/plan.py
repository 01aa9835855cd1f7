"""The Run page's form for one run: the plan that it takes, and how it is evaluated."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from streamlit.delta_generator import DeltaGenerator

from lsq_core import disk, jobs
from lsq_core.corpus.registry import BUILT_IN
from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation.protocol import PROTOCOLS, EvaluationRequest, Protocol
from lsq_core.jobs import arguments
from lsq_core.planning.methods import get_planner
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import about, refusal
from lsq_core.store.store import Store
from lsq_core.ui import cached as known
from lsq_core.ui import state, words
from lsq_core.ui.page import Here
from lsq_core.ui.run.quantizer import RUN_QUANTIZERS, about_quantizers, label, why_not
from lsq_core.ui.safe import st
from lsq_core.units import format_bytes


def ask(here: Here, folder: Path) -> None:
    """What to quantize and evaluate, and the button."""
    info, settings = here.info, state.settings()
    request = state.plan_request()
    top, change = st.columns([5, 1], vertical_alignment="center")
    top.markdown(f"**Next:** {plan_in_words(here, request)}")
    change.page_link("pages/2_Plan.py", label="Change the plan")
    quantizer, evaluation, save = options(here.store, info.context)
    reason = why_not(here, request, settings, quantizer)
    pressed = st.button(
        "Quantize and evaluate",
        type="primary",
        icon=":material/play_arrow:",
        disabled=bool(reason),
    )
    said = reason or _reads(quantizer, settings)
    if said:
        st.caption(words.literal(said))
    if pressed:
        words_of = ["run", *arguments.model_arguments(here.source, here.device)]
        words_of += arguments.plan_arguments(request, settings)
        words_of += arguments.evaluation_arguments(
            evaluation, quantizer, save_folder(here.store, save)
        )
        start(here, folder, words_of)


def _reads(quantizer: str, settings: ProfileSettings) -> str:
    """What a calibrated quantizer reads, which is not what the run is evaluated on."""
    known = about(quantizer)
    if not known.calibrated:
        return ""
    if known.learned:
        return (
            f"{known.title} is learned on {settings.calibration}, {known.steps:,} steps for each "
            "block, and goes on from the last block that was finished when it is resumed."
        )
    return (
        f"{known.title} is calibrated on {settings.calibration}: up to "
        f"{settings.samples} blocks of {settings.block_tokens} tokens. It takes minutes and, for "
        "a while, the memory of a second model."
    )


def start(here: Here, folder: Path, words_of: list[str]) -> None:
    """Start a job on this database, and show it."""
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
    found = known.profile(here.store, info, settings, here.device)
    text = f"{planner.title} on {here.source.name}, {wanted}"
    rows = known.impact(here.store, info, settings, request, here.device)
    if planner.reads_rows and rows is None:
        return f"{text}; the run will measure the scores of its rows first."
    if planner.metrics and found is None:
        return f"{text}; the run will measure the profile first."
    if not set(planner.metrics) <= set(found.metrics if found else ()):
        return f"{text}; the run will first measure what the profile lacks for it."
    try:
        plan = known.plan(info, found, request, settings, rows)
    except LsqError as error:
        return f"{text}. {error}"
    quantizer = st.session_state.get("quantizer", "hqq")
    if not refusal(quantizer, plan.choice, plan.axis):
        plan = replace(plan, quantizer=quantizer)
    return f"{text}: {plan.bits_per_param:.2f} bits, {format_bytes(plan.planned_bytes)} planned."


def options(store: Store, context: int) -> tuple[str, EvaluationRequest, str]:
    """Quantizer, evaluation and the name to save under."""
    columns = st.columns([1, 1.4, 1.8, 1.2, 1.6])
    quantizer = columns[0].selectbox(
        "Quantizer",
        RUN_QUANTIZERS,
        format_func=label,
        key="quantizer",
        persist_state="session",
        help=about_quantizers(RUN_QUANTIZERS),
    )
    corpus = columns[1].selectbox(
        "Evaluation text",
        list(dict.fromkeys([*BUILT_IN, st.session_state.get("corpus") or "stdlib"])),
        key="corpus",
        accept_new_options=True,
        persist_state="session",
    )
    protocol = choose_protocol(columns[2], "Protocol", "protocol", context)
    tokens = choose_tokens(columns[3], "Max tokens", "max_tokens")
    save = columns[4].text_input(
        "Save the model as",
        key="save",
        placeholder="don't save",
        persist_state="session",
        help=f"A folder in {disk.models_folder(store)}.",
    )
    return quantizer, EvaluationRequest(corpus, protocol, tokens), save


def choose_protocol(column: DeltaGenerator, label: str, key: str, context: int) -> str:
    """One of the protocols, by the names that they have for a model of this context."""
    return column.selectbox(
        label,
        list(PROTOCOLS),
        format_func=lambda name: Protocol.named(name, context).name,
        key=key,
        persist_state="session",
        help="strided: windows of 1,024 tokens of which the last 512 are scored. blocks: windows "
        "of 2,048 side by side. A shorter context gets shorter windows under a name of their own.",
    )


def choose_tokens(column: DeltaGenerator, label: str, key: str) -> int | None:
    """How many tokens to evaluate at most, or None for all of a text."""
    chosen = column.number_input(
        label,
        min_value=0,
        step=1000,
        key=key,
        persist_state="session",
        help="0 evaluates the whole text.",
    )
    return chosen or None


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
