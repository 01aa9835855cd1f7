"""The Run page's sweep: what to combine, how many runs that is, and the rows as they fill."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from lsq_core import charts, sweep
from lsq_core.corpus.registry import BUILT_IN
from lsq_core.errors import InputError
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.jobs import Job, arguments
from lsq_core.planning.methods import PLANNERS, get_planner
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.quantization.registry import BASELINES
from lsq_core.stages.plan import refusal_of
from lsq_core.ui import cached, jobs_panel, state, words
from lsq_core.ui.page import Here, headline, next_step
from lsq_core.ui.run.plan import choose_protocol, choose_tokens, start
from lsq_core.ui.run.quantizer import RUN_QUANTIZERS, about_quantizers, label, reasons
from lsq_core.ui.safe import st

_DEFAULTS = {
    "sweep_methods": ["uniform", "sensiboost", "mxq"],
    "sweep_budgets": "2.25, 2.51, 3.13",
    "sweep_bases": "",
    "sweep_quantizers": ["hqq"],
    "sweep_baselines": [],
    "sweep_corpora": ["stdlib"],
}
#: States as the table says them.
_STATES = {"waiting": "…", "done": "done", "found": "there already", "failed": "not made"}


@dataclass(frozen=True)
class _Asked:
    """What the form says."""

    methods: list[str]
    bases: tuple[str, ...]
    budgets: tuple[str, ...]
    quantizers: list[str]
    baselines: list[str]
    corpora: list[str]
    like: EvaluationRequest

    @property
    def rows(self) -> PlanRequest | None:
        """How mixed rows are chosen, as on the Plan page, where a method has such."""
        with_rows = [name for name in self.methods if state.reads_rows(name)]
        if not with_rows:
            return None
        return replace(state.request_of(with_rows[0]), base=None, budget=None, pins=())

    @property
    def items(self) -> list[sweep.Item]:
        """The runs of the product; none while something is missing."""
        if not (self.methods and (self.bases or self.budgets)):
            return []
        like = self.rows or PlanRequest(self.methods[0])
        asked = sweep.requests(like, self.methods, self.bases, self.budgets)
        texts = [
            EvaluationRequest(name, self.like.protocol, self.like.max_tokens)
            for name in self.corpora
        ]
        others = sweep.all_baselines(self.baselines, self.quantizers)
        return sweep.items(asked, self.quantizers, texts) + sweep.baselines(
            like, self.bases, self.budgets, others, texts
        )


def ask(here: Here, folder: Path) -> None:
    """Methods, sizes, quantizers and texts; how many runs, about how long; the buttons."""
    for key, default in _DEFAULTS.items():
        st.session_state.setdefault(key, default)
    asked = _form(here.info.context)
    cannot = _refused(here, asked.items)
    everything = _everything(asked)
    with st.container(horizontal=True, vertical_alignment="center"):
        pressed = st.button(
            "Start the sweep",
            type="primary",
            icon=":material/playlist_play:",
            disabled=all(cannot),
        )
        all_pressed = st.button(
            "Everything at 2.2, 3.2 and 4.2 bits",
            icon=":material/select_all:",
            disabled=not asked.corpora,
            help=f"Every method by {sweep.EVERYTHING_QUANTIZER}, and the uniform plan by every "
            f"other quantizer, on the texts chosen above: {len(everything.items)} runs. Those "
            "that can't be made say why.",
        )
        st.caption(_in_words(here, asked, cannot))
    if pressed or all_pressed:
        asked = everything if all_pressed else asked
        words_of = ["sweep", *arguments.model_arguments(here.source, here.device)]
        words_of += arguments.sweep_arguments(
            asked.methods,
            asked.bases,
            asked.budgets,
            asked.quantizers,
            asked.baselines,
            asked.corpora,
            asked.like,
            state.settings(),
            asked.rows,
        )
        start(here, folder, words_of)


def _everything(asked: _Asked) -> _Asked:
    """Every method and every baseline at the usual sizes, on the texts of the form."""
    return replace(
        asked,
        methods=list(PLANNERS),
        bases=(),
        budgets=sweep.EVERYTHING_BUDGETS,
        quantizers=[sweep.EVERYTHING_QUANTIZER],
        baselines=[name for name in BASELINES if name != sweep.EVERYTHING_QUANTIZER],
    )


def _form(context: int) -> _Asked:
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
        "Base stops",
        key="sweep_bases",
        placeholder="none",
        persist_state="session",
        help="Stops of the ladder, such as 3.13, for methods that start from a base.",
    )
    columns = st.columns([1.1, 1.1, 1.5, 1.4, 0.9])
    quantizers = columns[0].multiselect(
        "Quantizers",
        RUN_QUANTIZERS,
        format_func=label,
        key="sweep_quantizers",
        persist_state="session",
        help=about_quantizers(RUN_QUANTIZERS),
    )
    others = columns[1].multiselect(
        "Baselines",
        list(BASELINES),
        format_func=label,
        key="sweep_baselines",
        placeholder="none",
        persist_state="session",
        help="The uniform plan at every size by these quantizers as well, to compare with. "
        + reasons(BASELINES),
    )
    chosen = st.session_state["sweep_corpora"]
    corpora = columns[2].multiselect(
        "Evaluation texts",
        list(dict.fromkeys([*BUILT_IN, *chosen])),
        key="sweep_corpora",
        accept_new_options=True,
        persist_state="session",
    )
    protocol = choose_protocol(columns[3], "Each by protocol", "sweep_protocol", context)
    tokens = choose_tokens(columns[4], "At most tokens", "sweep_tokens")
    like = EvaluationRequest("stdlib", protocol, tokens)
    bases = tuple(base.removesuffix("bpp") for base in sweep.parse_budgets(bases))
    return _Asked(methods, bases, sweep.parse_budgets(budgets), quantizers, others, corpora, like)


def _refused(here: Here, asked: list[sweep.Item]) -> list[str]:
    """Why each item can't be made, as far as that is known before any work; else ''."""
    problem, axis = Problem(here.info.matrices), state.settings().axis
    pairs = {(item.request, item.quantizer) for item in asked}
    reasons = {pair: _refusal(problem, *pair, axis) for pair in pairs}
    return [reasons[item.request, item.quantizer] for item in asked]


def _refusal(problem: Problem, request: PlanRequest, quantizer: str, axis: int) -> str:
    planner = get_planner(request.method)
    try:
        reason = refusal_of(problem, request, quantizer, axis)
    except InputError as error:
        return str(error)
    takes_none = request.base is not None and not planner.has_base
    return f"{planner.title} takes a budget, not a base." if takes_none else reason


def _in_words(here: Here, asked: _Asked, cannot: list[str]) -> str:
    """How many runs, about how long, and what can't be made; ``cannot`` is of :func:`_refused`."""
    found = asked.items
    if not found:
        return "Choose at least one method, one budget or base, one quantizer and one text."
    text = f"{words.plural(len(found), 'run')}; those that are there already are not made again."
    runs = cached.results(here.store)
    runs = runs[runs["fingerprint"] == here.info.fingerprint]
    possible = [item for item, reason in zip(found, cannot, strict=True) if not reason]
    seconds = sweep.estimate(runs, possible)
    if seconds is not None:
        text += f" About {words.seconds(seconds)}, by this model's runs so far."
    reasons = [reason for reason in cannot if reason]
    if reasons:
        text += f" {len(reasons)} of them can't be made: {words.literal(reasons[0])}"
    return text


# --- following ------------------------------------------------------------------------------


def rows_of(job: Job) -> list[dict]:
    """What came of each item so far."""
    return sweep.rows_kept(job.folder)


def say(job: Job) -> None:
    """The first line: how far it is, or how many runs came of it."""
    if job.active:
        jobs_panel.say(job)
        return
    rows = rows_of(job)
    counts = {state: sum(row["state"] == state for row in rows) for state in _STATES}
    made = f"{counts['done']} made, {counts['found']} there already, {counts['failed']} not made"
    if job.state == "done":
        headline(f"{words.plural(len(rows), 'run')} swept: {made}.", best(rows))
    else:
        headline(f"The sweep {jobs_panel.ENDED[job.state]}.", f"{job.title} · {made} so far")


def best(rows: list[dict]) -> str:
    """The least perplexity on each text."""
    finished = [r for r in rows if r["state"] in sweep.FINISHED and r["perplexity"] is not None]
    lines = []
    for corpus in dict.fromkeys(row["corpus"] for row in finished):
        least = min((r for r in finished if r["corpus"] == corpus), key=lambda r: r["perplexity"])
        style = charts.method_style(charts.drawn_as(least["method"], least["quantizer"]))
        lines.append(
            f"{words.literal(Path(corpus).name)}: {style.title} at "
            f"{least['bits_per_param']:.2f} bits, perplexity {least['perplexity']:.2f}"
        )
    return f"Least on {'; on '.join(lines)}." if lines else ""


def show_rows(job: Job) -> None:
    """The rows as they fill."""
    rows = rows_of(job)
    if not rows:
        return
    st.dataframe(
        table(rows),
        hide_index=True,
        height=38 + 35 * min(len(rows), 12),
        placeholder="",
        column_config={
            "method": st.column_config.TextColumn(width="medium"),
            "bits": st.column_config.NumberColumn(format="%.3f"),
            "measured bytes": st.column_config.NumberColumn(
                format="localized", help="Of the linear weights as they were stored."
            ),
            "seconds": st.column_config.NumberColumn(
                format="%.1f", help="Time to quantize, evaluation not counted."
            ),
            "steps": st.column_config.NumberColumn(
                help="Optimisation steps that a matrix gets at most."
            ),
            "perplexity": st.column_config.NumberColumn(format="%.3f"),
            "over full precision": st.column_config.NumberColumn(format="percent"),
            "reason": st.column_config.TextColumn(width="large"),
        },
    )
    if any(row["state"] in sweep.FINISHED for row in rows):
        next_step("pages/4_Compare.py", "Compare them")


def table(rows: list[dict]) -> pd.DataFrame:
    """Rows for a person to read."""
    return pd.DataFrame(
        {
            "method": [PLANNERS[row["method"]].title for row in rows],
            "asked": [(row["base"] and f"base {row['base']}") or row["budget"] for row in rows],
            "quantizer": [row["quantizer"] for row in rows],
            "text": [Path(row["corpus"]).name for row in rows],
            "state": [_STATES[row["state"]] for row in rows],
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
