"""The Run page's form for one run: the plan that it takes, and how it is evaluated."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from streamlit.delta_generator import DeltaGenerator

from lsq_core import disk, jobs
from lsq_core.corpus.registry import BUILT_IN_CORPORA
from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation.protocol import PROTOCOLS, EvaluationRequest, Protocol
from lsq_core.jobs import arguments
from lsq_core.planning.methods import get_planner
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import incompatibility_reason, quantizer_spec
from lsq_core.store.shipped import SHIPPED
from lsq_core.store.store import Store
from lsq_core.sweep import SweepItem, estimate_seconds
from lsq_core.ui import cached, cached_results, state, words
from lsq_core.ui.page import PageContext
from lsq_core.ui.run import formats
from lsq_core.ui.run.quantizer import (
    RUN_QUANTIZERS,
    describe_quantizers,
    label,
    run_incompatibility,
)
from lsq_core.ui.safe import st
from lsq_core.units import format_bytes


def render_form(ctx: PageContext, folder: Path) -> None:
    """What to quantize and evaluate, and the button."""
    info, settings = ctx.info, state.settings()
    request = state.plan_request()
    top, change = st.columns([5, 1], vertical_alignment="center")
    top.markdown(f"**Next:** {describe_plan(ctx, request)}")
    change.page_link("pages/2_Plan.py", label="Change the plan")
    quantizer, evaluation, save = select_run_options(ctx.store, info.context)
    target = formats.select_format() if save.strip() else None
    reason = run_incompatibility(ctx, request, settings, quantizer)
    priced = ""
    if target is not None and not reason:
        priced, reason = formats.describe(ctx, request, quantizer, target)
    clicked = st.button(
        "Quantize and evaluate",
        type="primary",
        icon=":material/play_arrow:",
        disabled=bool(reason),
    )
    notes = [reason] if reason else [_describe_time(ctx, request, quantizer, evaluation)]
    notes += [] if reason else [_calibration_note(quantizer, settings)]
    notes += [priced]
    if any(notes):
        st.caption(words.escape(" ".join(filter(None, notes))))
    if clicked:
        argv = ["run", *arguments.model_arguments(ctx.source, ctx.device)]
        argv += arguments.plan_arguments(request, settings)
        folder_to_save = save_folder(ctx.store, save)
        argv += arguments.evaluation_arguments(evaluation, quantizer, folder_to_save, target)
        start(ctx, folder, argv)


def _describe_time(
    ctx: PageContext, request: PlanRequest, quantizer: str, evaluation: EvaluationRequest
) -> str:
    """About how long the run takes by the model's runs so far, and what would shorten it."""
    runs = cached_results.results(ctx.store)
    runs = runs[runs["fingerprint"] == ctx.info.fingerprint]
    seconds = estimate_seconds(runs, [SweepItem(request, quantizer, evaluation)])
    if seconds is not None:
        shipped = (runs["origin"] == SHIPPED).all()
        whose = "of the runs that come with LSQ Explorer" if shipped else "of this model's runs"
        return f"About {words.seconds(seconds)} at the speed {whose}."
    if runs.empty or evaluation.max_tokens:
        return ""
    return f"The whole of {evaluation.corpus} is evaluated; max tokens, say 4,096, shortens it."


def _calibration_note(quantizer: str, settings: ProfileSettings) -> str:
    """What a calibrated quantizer reads, which is not what the run is evaluated on."""
    spec = quantizer_spec(quantizer)
    if not spec.calibrated:
        return ""
    if spec.learned:
        return (
            f"{spec.title} is trained on {settings.calibration}, {spec.steps:,} steps per "
            "block, and resumes from the last finished block."
        )
    return (
        f"{spec.title} is calibrated on {settings.calibration}: up to "
        f"{settings.samples} blocks of {settings.block_tokens} tokens. This takes minutes and, for "
        "a while, the memory of a second model."
    )


def start(ctx: PageContext, folder: Path, argv: list[str]) -> None:
    """Start a job on this database, and show it."""
    jobs.start(folder, [*argv, "--db", str(ctx.store.path)])
    st.session_state.pop("jobs", None)  # show the new one
    st.rerun()


def describe_plan(ctx: PageContext, request: PlanRequest) -> str:
    """A sentence about the plan that would be run."""
    info, settings = ctx.info, state.settings()
    planner = get_planner(request.method)
    size = " and ".join(
        [f"base {request.base}"] * bool(request.base)
        + [f"at most {(request.budget or '').removesuffix('bpp')} bits"] * bool(request.budget)
    )
    profile = cached.profile(ctx.store, info, settings, ctx.device)
    restrictions = f" {request.restrictions}" if request.has_ties else ""
    text = f"{planner.title} on {ctx.source.name}, {size}{restrictions}"
    rows = cached.impact(ctx.store, info, settings, request, ctx.device)
    if planner.reads_rows and rows is None:
        return f"{text}; the run will first measure row scores."
    if planner.metrics and profile is None:
        return f"{text}; the run will first measure the profile."
    if not set(planner.metrics) <= set(profile.metrics if profile else ()):
        return f"{text}; the run will first measure the missing metrics."
    try:
        plan = cached.plan(info, profile, request, settings, rows)
    except LsqError as error:
        return f"{text}. {error}"
    quantizer = st.session_state.get("quantizer", "hqq")
    if not incompatibility_reason(quantizer, plan.choice, plan.axis):
        plan = replace(plan, quantizer=quantizer)
    return f"{text}: {plan.bits_per_param:.2f} bits, {format_bytes(plan.planned_bytes)} planned."


def select_run_options(store: Store, context: int) -> tuple[str, EvaluationRequest, str]:
    """Quantizer, evaluation and the name to save under."""
    columns = st.columns([1, 1.4, 1.8, 1.2, 1.6])
    quantizer = columns[0].selectbox(
        "Quantizer",
        RUN_QUANTIZERS,
        format_func=label,
        key="quantizer",
        persist_state="session",
        help=describe_quantizers(RUN_QUANTIZERS),
    )
    corpus = columns[1].selectbox(
        "Evaluation corpus",
        list(dict.fromkeys([*BUILT_IN_CORPORA, st.session_state.get("corpus") or "stdlib"])),
        key="corpus",
        accept_new_options=True,
        persist_state="session",
    )
    protocol = choose_protocol(columns[2], "Protocol", "protocol", context)
    tokens = choose_tokens(columns[3], "Max tokens", "max_tokens")
    save = columns[4].text_input(
        "Save the model as",
        key="save",
        placeholder="not saved",
        persist_state="session",
        help=f"Name of a folder in {disk.models_folder(store)}.",
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
        "of 2,048 side by side. llamacpp-512: windows of 512 side by side of which the second half "
        "is scored, as llama.cpp's perplexity does. A shorter context gets shorter windows and its "
        "own protocol name.",
    )


def choose_tokens(column: DeltaGenerator, label: str, key: str) -> int | None:
    """How many tokens to evaluate at most, or None for all of a text."""
    chosen = column.number_input(
        label,
        min_value=0,
        step=1000,
        key=key,
        persist_state="session",
        help="0 evaluates the whole corpus.",
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
        raise InputError(f"'{name}' is not a valid name; use letters, digits, '.', '_' and '-'.")
    folder = disk.models_folder(store) / name
    if folder.exists():
        raise InputError(f"A saved model named '{name}' already exists; choose another name.")
    return folder
