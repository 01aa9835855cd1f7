"""The Run page's sweep: its form, the number of runs and their time, and their results."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from lsq_core import charts, sweep
from lsq_core.corpus.registry import BUILT_IN_CORPORA
from lsq_core.errors import InputError
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.jobs import Job, arguments
from lsq_core.planning.methods import PLANNERS, get_planner, mixes_rows
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.quantization.registry import BASELINES
from lsq_core.stages.plan import request_incompatibility
from lsq_core.sweep_progress import describe_counts
from lsq_core.ui import cached_results, jobs_panel, state, words
from lsq_core.ui.page import PageContext, headline, next_step
from lsq_core.ui.run import actors
from lsq_core.ui.run.plan import choose_protocol, choose_tokens, start
from lsq_core.ui.run.quantizer import RUN_QUANTIZERS, describe_quantizers, label, reasons
from lsq_core.ui.safe import st

_DEFAULTS = {
    "sweep_methods": ["uniform", "sensiboost", "mxq"],
    "sweep_budgets": "2.25, 2.51, 3.13",
    "sweep_bases": "",
    "sweep_quantizers": ["hqq"],
    "sweep_baselines": [],
    "sweep_corpora": ["stdlib"],
}
#: Labels of the states in the table.
_STATE_LABELS = {"waiting": "…", "done": "done", "found": "reused", "failed": "failed"}


@dataclass(frozen=True)
class _SweepForm:
    """The inputs of the form."""

    methods: list[str]
    bases: tuple[str, ...]
    budgets: tuple[str, ...]
    quantizers: list[str]
    baselines: list[str]
    corpora: list[str]
    template: EvaluationRequest

    @property
    def rows(self) -> PlanRequest | None:
        """The Plan page's settings for mixed rows; None if no chosen method mixes rows."""
        with_rows = [name for name in self.methods if mixes_rows(name)]
        if not with_rows:
            return None
        one = state.request_for_method(with_rows[0])
        return replace(one, base=None, budget=None, pins=(), ties=())

    @property
    def items(self) -> list[sweep.SweepItem]:
        """The runs of the sweep; empty while a required input is missing."""
        if not (self.methods and (self.bases or self.budgets)):
            return []
        template = self.rows or PlanRequest(self.methods[0])
        requests = sweep.requests(template, self.methods, self.bases, self.budgets)
        texts = [
            EvaluationRequest(name, self.template.protocol, self.template.max_tokens)
            for name in self.corpora
        ]
        others = sweep.expand_baselines(self.baselines, self.quantizers)
        return sweep.items(requests, self.quantizers, texts) + sweep.baselines(
            template, self.bases, self.budgets, others, texts
        )


def render_form(ctx: PageContext, folder: Path) -> None:
    """Show the inputs, the number of runs and their estimated time, and the buttons."""
    for key, default in _DEFAULTS.items():
        st.session_state.setdefault(key, default)
    form = _render_inputs(ctx.info.context)
    place = actors.choose_place()
    reasons_against = _incompatibilities(ctx, form.items)
    full_sweep = _full_sweep(form)
    with st.container(horizontal=True, vertical_alignment="center"):
        start_clicked = st.button(
            "Start the sweep",
            type="primary",
            icon=":material/playlist_play:",
            disabled=all(reasons_against) or bool(place.reason),
        )
        full_clicked = st.button(
            "Everything at 2.2, 3.2 and 4.2 bits",
            icon=":material/select_all:",
            disabled=not form.corpora or bool(place.reason),
            help=f"Every method with {sweep.EVERYTHING_QUANTIZER}, and the uniform plan with every "
            f"other quantizer, on the corpora above: {len(full_sweep.items)} runs. Impossible "
            "combinations are listed with the reason.",
        )
        st.caption(words.escape(place.reason) or _describe_sweep(ctx, form, reasons_against))
    if start_clicked or full_clicked:
        form = full_sweep if full_clicked else form
        argv = ["sweep", *arguments.model_arguments(ctx.source, ctx.device)]
        argv += arguments.sweep_arguments(
            form.methods,
            form.bases,
            form.budgets,
            form.quantizers,
            form.baselines,
            form.corpora,
            form.template,
            state.settings(),
            form.rows,
        )
        argv += arguments.ray_arguments(place.address, place.cores)
        start(ctx, folder, argv)


def _full_sweep(form: _SweepForm) -> _SweepForm:
    """Return the form with every method and baseline at the usual sizes, on the same corpora."""
    return replace(
        form,
        methods=list(PLANNERS),
        bases=(),
        budgets=sweep.EVERYTHING_BUDGETS,
        quantizers=[sweep.EVERYTHING_QUANTIZER],
        baselines=[name for name in BASELINES if name != sweep.EVERYTHING_QUANTIZER],
    )


def _render_inputs(context: int) -> _SweepForm:
    columns = st.columns([2.6, 1.5, 1.2])
    methods = columns[0].multiselect(
        "Methods",
        list(PLANNERS),
        format_func=lambda name: PLANNERS[name].title,
        key="sweep_methods",
        persist_state="session",
    )
    budgets = columns[1].text_input(
        "Budgets",
        key="sweep_budgets",
        persist_state="session",
        help="Bits per parameter, such as 2.25, 2.51, 3.13, or bytes of the linear weights: 9MiB.",
    )
    bases = columns[2].text_input(
        "Base configurations",
        key="sweep_bases",
        placeholder="none",
        persist_state="session",
        help="Configurations by their bits, such as 3.13, for methods that start from a base.",
    )
    columns = st.columns([1.1, 1.1, 1.5, 1.4, 0.9])
    quantizers = columns[0].multiselect(
        "Quantizers",
        RUN_QUANTIZERS,
        format_func=label,
        key="sweep_quantizers",
        persist_state="session",
        help=describe_quantizers(RUN_QUANTIZERS),
    )
    others = columns[1].multiselect(
        "Baselines",
        list(BASELINES),
        format_func=label,
        key="sweep_baselines",
        placeholder="none",
        persist_state="session",
        help="Also run the uniform plan at every size with these quantizers, for comparison. "
        + reasons(BASELINES),
    )
    chosen = st.session_state["sweep_corpora"]
    corpora = columns[2].multiselect(
        "Evaluation corpora",
        list(dict.fromkeys([*BUILT_IN_CORPORA, *chosen])),
        key="sweep_corpora",
        accept_new_options=True,
        persist_state="session",
    )
    protocol = choose_protocol(columns[3], "Protocol", "sweep_protocol", context)
    tokens = choose_tokens(columns[4], "Max tokens", "sweep_tokens")
    template = EvaluationRequest("stdlib", protocol, tokens)
    bases = tuple(base.removesuffix("bpp") for base in sweep.parse_budgets(bases))
    return _SweepForm(
        methods, bases, sweep.parse_budgets(budgets), quantizers, others, corpora, template
    )


def _incompatibilities(ctx: PageContext, items: list[sweep.SweepItem]) -> list[str]:
    """Return why each item can't be run, as far as known in advance; '' for those that can."""
    problem, axis = Problem(ctx.info.matrices), state.settings().axis
    pairs = {(item.request, item.quantizer) for item in items}
    reasons = {pair: _incompatibility(problem, *pair, axis) for pair in pairs}
    return [reasons[item.request, item.quantizer] for item in items]


def _incompatibility(problem: Problem, request: PlanRequest, quantizer: str, axis: int) -> str:
    planner = get_planner(request.method)
    try:
        reason = request_incompatibility(problem, request, quantizer, axis)
    except InputError as error:
        return str(error)
    needs_budget = request.base is not None and not planner.has_base
    return f"{planner.title} takes a budget, not a base." if needs_budget else reason


def _describe_sweep(ctx: PageContext, form: _SweepForm, reasons_against: list[str]) -> str:
    """Describe the number of runs, their estimated time, and how many can't be run.

    ``reasons_against`` comes from :func:`_incompatibilities`.
    """
    items = form.items
    if not items:
        return "Choose at least one method, one budget or base, one quantizer and one corpus."
    text = f"{words.plural(len(items), 'run')}; stored runs are reused."
    runs = cached_results.results(ctx.store)
    runs = runs[runs["fingerprint"] == ctx.info.fingerprint]
    possible = [item for item, reason in zip(items, reasons_against, strict=True) if not reason]
    seconds = sweep.estimate_seconds(runs, possible)
    if seconds is not None:
        text += f" About {words.seconds(seconds)}, estimated from this model's earlier runs."
    reasons = [reason for reason in reasons_against if reason]
    if reasons:
        are = "is" if len(reasons) == 1 else "are"
        text += f" {len(reasons)} {are} not possible: {words.escape(reasons[0])}"
    return text


# --- following ------------------------------------------------------------------------------


def read_rows(job: Job) -> list[dict]:
    """Return the results of the items so far."""
    return sweep.read_sweep_rows(job.folder)


def render_headline(job: Job) -> None:
    """Show the headline: the progress of a sweep, or how many runs it made."""
    if job.active:
        jobs_panel.render_headline(job)
        return
    rows = read_rows(job)
    counts_text = describe_counts(rows)
    if job.state == "done":
        headline(
            f"Sweep finished: {counts_text}.",
            describe_best(rows),
        )
    else:
        headline(
            f"The sweep {jobs_panel.ENDED_PHRASES[job.state]}.",
            f"{job.title} · {counts_text} so far",
        )


def describe_best(rows: list[dict]) -> str:
    """Describe the run with the lowest perplexity on each corpus; '' if there is none."""
    finished = [r for r in rows if r["state"] in sweep.FINISHED and r["perplexity"] is not None]
    lines = []
    for corpus in dict.fromkeys(row["corpus"] for row in finished):
        lowest = min((r for r in finished if r["corpus"] == corpus), key=lambda r: r["perplexity"])
        style = charts.method_style(charts.style_key(lowest["method"], lowest["quantizer"]))
        lines.append(
            f"{words.escape(Path(corpus).name)}: {style.title} at "
            f"{lowest['bits_per_param']:.2f} bits, perplexity {lowest['perplexity']:.2f}"
        )
    return f"Best on {'; on '.join(lines)}." if lines else ""


def show_rows(job: Job) -> None:
    """Show the rows so far, and the actors that measure them."""
    rows = read_rows(job)
    if not rows:
        return
    actors.show_actors(job)
    st.dataframe(
        table(rows),
        hide_index=True,
        height=38 + 35 * min(len(rows), 12),
        placeholder="",
        column_config={
            "method": st.column_config.TextColumn(width="medium"),
            "bits": st.column_config.NumberColumn(format="%.3f"),
            "measured bytes": st.column_config.NumberColumn(
                format="localized", help="Bytes of the linear weights as stored."
            ),
            "seconds": st.column_config.NumberColumn(
                format="%.1f", help="Time to quantize, without evaluation."
            ),
            "steps": st.column_config.NumberColumn(
                help="Largest number of optimization steps per matrix."
            ),
            "perplexity": st.column_config.NumberColumn(format="%.3f"),
            "over full precision": st.column_config.NumberColumn(format="percent"),
            "reason": st.column_config.TextColumn(width="large"),
        },
    )
    if any(row["state"] in sweep.FINISHED for row in rows):
        next_step("pages/4_Compare.py", "Compare them")


def table(rows: list[dict]) -> pd.DataFrame:
    """Return the rows as a table to display."""
    return pd.DataFrame(
        {
            "method": [PLANNERS[row["method"]].title for row in rows],
            "size": [(row["base"] and f"base {row['base']}") or row["budget"] for row in rows],
            "quantizer": [row["quantizer"] for row in rows],
            "corpus": [Path(row["corpus"]).name for row in rows],
            "state": [
                _STATE_LABELS[row["state"]] + (", shipped" if row.get("shipped") else "")
                for row in rows
            ],
            "bits": [row.get("bits_per_param") for row in rows],
            "steps": [row.get("steps") for row in rows],
            "measured bytes": [row.get("measured_bytes") for row in rows],
            "seconds": [row.get("quantize_seconds") for row in rows],
            "perplexity": [row.get("perplexity") for row in rows],
            "over full precision": [row.get("increase") for row in rows],
            "run": [row.get("run") for row in rows],
            "reason": [row.get("reason", "") for row in rows],
        }
    )
