"""The Run page's form for one run: the plan it uses, and how it is evaluated."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from streamlit.delta_generator import DeltaGenerator

from lsq_core import disk, jobs
from lsq_core.corpus.registry import BUILT_IN_CORPORA
from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation.protocol import PROTOCOLS, EvaluationRequest, Protocol
from lsq_core.exports.weights.registry import ExportTarget
from lsq_core.jobs import arguments
from lsq_core.planning.methods import get_planner
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import incompatibility_reason, quantizer_spec
from lsq_core.store.shipped import SHIPPED
from lsq_core.store.store import Store
from lsq_core.sweep import SweepItem, estimate_seconds
from lsq_core.ui import cached, cached_plans, cached_results, state, words
from lsq_core.ui.page import PageContext
from lsq_core.ui.plan.budget import shown_request
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
    """Show the plan, its run options, and the button that starts the run."""
    request = shown_request(ctx.info, state.settings())
    top, change = st.columns([5, 1], vertical_alignment="center")
    top.markdown(f"**Next:** {words.escape(describe_plan(ctx, request))}")
    change.page_link("pages/2_Plan.py", label="Change the plan")
    options = select_run_options(ctx)
    check = check_run(ctx, request, options)
    clicked = st.button(
        "Quantize and evaluate",
        type="primary",
        icon=":material/play_arrow:",
        disabled=bool(check.reason),
    )
    if check.reason or check.note:
        st.caption(words.escape(check.reason or check.note))
    if clicked:
        start(ctx, folder, run_arguments(ctx, request, options))


@dataclass(frozen=True)
class RunOptions:
    """How a plan is run: quantizer, evaluation, and the name to save under, '' for none.

    ``target`` is the format to save in; None for this project's own.
    """

    quantizer: str
    evaluation: EvaluationRequest
    save: str
    target: ExportTarget | None = None


@dataclass(frozen=True)
class RunCheck:
    """Why a plan can't be run, '' if it can; and a note on the run's time and size."""

    reason: str
    note: str


def check_run(ctx: PageContext, request: PlanRequest, options: RunOptions) -> RunCheck:
    """Check whether a plan can be run and saved with these options; estimate time and bytes."""
    reason = run_incompatibility(ctx, request, state.plan_settings(), options.quantizer)
    priced = ""
    if options.target is not None and not reason:
        priced, reason = formats.describe(ctx, request, options.quantizer, options.target)
    if reason:
        return RunCheck(reason, "")
    notes = [describe_time(ctx, request, options), priced]
    return RunCheck("", " ".join(filter(None, notes)))


def run_arguments(ctx: PageContext, request: PlanRequest, options: RunOptions) -> list[str]:
    """Return the command line of a run, without its database.

    Raises
    ------
    InputError
        If the model cannot be saved under that name.
    """
    argv = ["run", *arguments.model_arguments(ctx.source, ctx.device)]
    argv += arguments.plan_arguments(request, state.plan_settings())
    folder = save_folder(ctx.store, options.save)
    return argv + arguments.evaluation_arguments(
        options.evaluation, options.quantizer, folder, options.target
    )


def describe_time(ctx: PageContext, request: PlanRequest, options: RunOptions) -> str:
    """Describe how long a run takes, and what a calibrated quantizer requires."""
    notes = [
        _describe_seconds(ctx, request, options),
        _calibration_note(options.quantizer, state.settings()),
    ]
    return " ".join(filter(None, notes))


def _describe_seconds(ctx: PageContext, request: PlanRequest, options: RunOptions) -> str:
    """Estimate the run's time from the model's runs so far, or suggest how to shorten it."""
    runs, evaluation = _model_runs(ctx), options.evaluation
    seconds = estimate_seconds(runs, [SweepItem(request, options.quantizer, evaluation)])
    if seconds is not None:
        shipped = (runs["origin"] == SHIPPED).all()
        whose = "of the runs shipped with LSQ Explorer" if shipped else "of this model's runs"
        return f"About {words.seconds(seconds)} at the speed {whose}."
    if runs.empty or evaluation.max_tokens:
        return ""
    return (
        f"All of {evaluation.corpus} is evaluated; set max tokens, such as 4,096, for a shorter "
        "run."
    )


def _model_runs(ctx: PageContext) -> pd.DataFrame:
    runs = cached_results.results(ctx.store)
    return runs[runs["fingerprint"] == ctx.info.fingerprint]


def _calibration_note(quantizer: str, settings: ProfileSettings) -> str:
    """Describe a calibrated quantizer's calibration, which differs from the evaluation; else ''."""
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
    """Start a job on this database and show it."""
    jobs.start(folder, [*argv, "--db", str(ctx.store.path)])
    st.session_state.pop("jobs", None)  # show the new one
    st.rerun()


def describe_plan(ctx: PageContext, request: PlanRequest) -> str:
    """Describe the plan that would be run in one sentence."""
    info, settings = ctx.info, state.plan_settings()
    planner = get_planner(request.method)
    size = " and ".join(
        [f"base {request.base}"] * bool(request.base)
        + ([_describe_budget(request.budget)] if request.budget else [])
    )
    profile = cached.planning_profile(ctx.store, info, settings, ctx.device)
    restrictions = f" {request.restrictions}" if request.has_ties else ""
    text = f"{planner.title} on {ctx.source.name}, {size}{restrictions}"
    rows = cached_plans.extra_measurements(ctx.store, info, settings, request, ctx.device)
    if planner.reads_rows and rows is None:
        return f"{text}; the run will first measure row scores."
    if planner.metrics and profile is None:
        return f"{text}; the run will first measure the profile."
    if not set(planner.metrics) <= set(profile.metrics if profile else ()):
        return f"{text}; the run will first measure the missing metrics."
    try:
        plan = cached_plans.plan(info, profile, request, settings, rows)
    except LsqError as error:
        return f"{text}. {error}"
    quantizer = st.session_state.get("quantizer", "hqq")
    if not incompatibility_reason(quantizer, plan.choice, plan.axis):
        plan = replace(plan, quantizer=quantizer)
    return f"{text}: {plan.bits_per_param:.2f} bits, {format_bytes(plan.planned_bytes)} planned."


def _describe_budget(budget: str) -> str:
    """Format a budget: ``at most 3.2 bits``, or in bytes ``at most 50MiB planned``."""
    if budget.endswith("bpp"):
        return f"at most {budget.removesuffix('bpp')} bits"
    return f"at most {budget} planned"


def select_run_options(ctx: PageContext, stacked: bool = False) -> RunOptions:
    """Show the run options, in a row or ``stacked``, and return them.

    Max tokens defaults to the most common value of the model's truncated runs, so that the new
    run takes as long and is comparable with them.
    """
    runs = _model_runs(ctx)
    truncated = runs.loc[runs["truncated"].astype(bool), "tokens"]
    st.session_state.setdefault("max_tokens", 0 if truncated.empty else int(truncated.mode()[0]))
    widths = [1, 1.4, 1.8, 1.2, 1.6]
    columns = [st.container() for _ in widths] if stacked else st.columns(widths)
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
    protocol = choose_protocol(columns[2], "Protocol", "protocol", ctx.info.context)
    tokens = choose_tokens(columns[3], "Max tokens", "max_tokens")
    save = columns[4].text_input(
        "Save the model as",
        key="save",
        placeholder="not saved",
        persist_state="session",
        help=f"Name of a folder in {disk.models_folder(ctx.store)}.",
    )
    target = formats.select_format() if save.strip() else None
    return RunOptions(quantizer, EvaluationRequest(corpus, protocol, tokens), save, target)


def choose_protocol(column: DeltaGenerator, label: str, key: str, context: int) -> str:
    """Show the choice of a protocol, named as for a model with this context length."""
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
    """Show the choice of the maximum number of tokens to evaluate; None for the entire corpus."""
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
    """Return the new folder for a quantized model, always inside the models folder; None for ''.

    Raises
    ------
    InputError
        If the name is invalid or taken.
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
