"""The Plan page's panels: the first line, the live plan, its sizes, and where it can go."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from lsq_core import charts, disk, jobs
from lsq_core.config import LADDER, format_bytes
from lsq_core.errors import InputError, LsqError
from lsq_core.jsontext import json_text
from lsq_core.model import ModelInfo
from lsq_core.pipeline import NOT_PREDICTED
from lsq_core.plan import PLANNERS, Plan, PlanRequest, Problem, get_planner
from lsq_core.plan.facts import facts
from lsq_core.plan.memory import memories
from lsq_core.plan.pins import with_pins
from lsq_core.plan.problem import Impact
from lsq_core.predict import Prediction, Predictor, features, parse_loss, smallest_within
from lsq_core.profile import TITLES, Profile, ProfileSettings
from lsq_core.ui import arguments, jobs_panel, known, state, words
from lsq_core.ui.page import Here, headline, next_step
from lsq_core.ui.plan_controls import feasible
from lsq_core.ui.planner import (
    Curve,
    Facts,
    LiveMethod,
    Preset,
    Solved,
    live_planner,
    take_commit,
)
from lsq_core.ui.safe import st

#: What a knapsack's cost is, as the planner's details say it.
_UNITS = {
    "high-impact": "predicted change of the output",
    "mxq": "weight error",
    "kurt-scaled": "scaled weight error",
    "sensi-milp": "penalty",
    "kurt-milp": "penalty",
    "sensi-knapsack": "squared output error",
    "loss-aware": "expected KL",
}


@dataclass(frozen=True, eq=False)
class Asked:
    """What the page was asked: the model, its profile, and the request with its settings."""

    here: Here
    info: ModelInfo
    found: Profile | None
    settings: ProfileSettings
    request: PlanRequest

    @property
    def problem(self) -> Problem:
        """What planners see, without pins."""
        return known.problem_of_rows(self.info, self.found, self.request, self.rows)

    @property
    def rows(self) -> Impact | None:
        """What is known of the model's rows, where the method reads that."""
        here = self.here
        return known.impact(here.store, self.info, self.settings, self.request, here.device)

    @property
    def predictor(self) -> Predictor | str:
        """What the runs so far tell, or why they don't."""
        here = self.here.store, self.info, self.found, self.settings
        return known.predictor(*here, st.session_state["predict_on"])

    @property
    def along(self) -> known.Along | None:
        """What is predicted at every budget; nothing of mixed rows."""
        if state.reads_rows(self.request.method):
            return None
        here = self.here.store, self.info, self.found, self.request, self.settings
        return known.along(*here, st.session_state["predict_on"])

    def by(self, method: str) -> Asked:
        """The same base and budget by another method; one without bases is given the budget."""
        request, base = state.request_of(method), self.request.base
        base = base if get_planner(method).has_base else None
        return replace(self, request=replace(request, base=base, budget=self.request.budget))


# --- the first line -------------------------------------------------------------------------


def offered(info: ModelInfo, found: Profile | None) -> list[str]:
    """The methods to choose from: of a published model those that its measurements allow."""
    if not known.is_published(info):
        return list(PLANNERS)
    lacking = known.cannot_plan(info, known.problem(info, found))
    return [name for name in PLANNERS if name not in lacking]


def missing_metrics(asked: Asked) -> list[str]:
    """What the method reads and the profile doesn't hold."""
    if state.reads_rows(asked.request.method):
        return missing_rows(asked)
    held = asked.found.metrics if asked.found else ()
    return [name for name in get_planner(asked.request.method).metrics if name not in held]


def missing_rows(asked: Asked) -> list[str]:
    """What a plan of mixed rows needs and the store doesn't have."""
    if asked.rows is None:
        return ["row scores"]
    measured = [block for block in asked.rows.blocks if block.matrix is not None]
    whole = asked.request.ratios == "uniform" or len(measured) == len(asked.rows.blocks)
    return [] if whole else ["interactions"]


def say_what_is_missing(asked: Asked, missing: Sequence[str]) -> None:
    """A method whose metrics haven't been measured, and the way to measure them."""
    if state.reads_rows(asked.request.method):
        say_what_rows_need(asked)
        return
    planner, settings = get_planner(asked.request.method), asked.settings
    titles = words.listed([TITLES[name].title.lower() for name in missing])
    headline(
        f"{planner.title} needs the {titles} of {asked.here.source.name}.",
        f"With {settings.calibration}, {settings.quantizer}, axis {settings.axis} and "
        f"{settings.metadata} metadata it hasn't been measured yet. Uniform needs none; a run, on "
        "the Run page, measures what is missing first.",
    )
    if asked.found is None:
        next_step("pages/1_Explore.py", "Profile it on the Explore page")
        return
    folder = disk.jobs_folder(asked.here.store)
    order = ["profile", *arguments.model_arguments(asked.here.source, asked.here.device)]
    order += arguments.profile_arguments(settings)
    order += [word for name in missing for word in ("--metric", name)]
    order += ["--db", str(asked.here.store.path)]
    measure_by_a_job(folder, order, f"Measure the {titles}")


def measure_by_a_job(folder: Path, order: list[str], label: str) -> None:
    """A button that starts a job, and the job where there is one."""
    job = jobs_panel.find(folder, order)
    if job is not None and job.active:
        jobs_panel.follow(job)
    elif st.button(label, type="primary", icon=":material/play_arrow:"):
        jobs.start(folder, order)
        st.rerun()
    if job is not None and not job.active and job.state != "done":
        jobs_panel.follow(job)


def say_what_rows_need(asked: Asked) -> None:
    """What mixed rows are planned from, how dear it is, and a button to measure it."""
    request, blocks = asked.request, asked.rows.blocks if asked.rows else ()
    try:
        low, _ = feasible(asked.problem, request.method, None)
    except InputError as error:  # groups of this size fill no row of some matrix
        headline("There is no such plan.")
        st.error(words.literal(str(error)))
        return
    done = sum(block.matrix is not None for block in blocks)
    what = "row scores" if request.ratios == "uniform" else "row scores and interactions"
    so_far = f" {done} of {len(blocks)} blocks are measured so far." if done else ""
    headline(
        f"High-impact rows need the {what} of {asked.here.source.name}.",
        f"Gradients of the loss on {asked.settings.calibration} rank the rows; each two matrices "
        "of a block are then rounded at each two ratios, 560 times for a block of seven, by the "
        f"{request.loss} loss. It is kept block by block and goes on where it was cut off.{so_far}",
    )
    order = ["plan", *arguments.model_arguments(asked.here.source, asked.here.device)]
    smallest = replace(request, budget=state.budget_text(low), pins=())  # any that is in reach
    order += arguments.plan_arguments(smallest, asked.settings)
    order += ["--db", str(asked.here.store.path)]
    measure_by_a_job(disk.jobs_folder(asked.here.store), order, f"Measure the {what}")


def say_what_it_takes(asked: Asked, plan: Plan) -> None:
    """The first line: bits, what is predicted, and against its base or the nearest uniform plan."""
    under = ["Bits per planned parameter, metadata included.", *plan.notes, gap(plan)]
    if plan.rows:
        headline(f"{plan.bits_per_param:.2f} bits: {rows_in_words(plan)}.", " ".join(under))
        return
    named = [c for c in LADDER if c.stop_name == plan.base]
    nearest = min(LADDER, key=lambda c: abs(plan.bits_per_param - c.nominal_bits))
    reference = named[0] if named else nearest
    more = words.signed_percent(plan.bits_per_param / reference.nominal_bits - 1)
    size, against = format_bytes(plan.planned_bytes), f"uniform {reference.stop_name}"
    alike, predictor = len(set(plan.configs)) == 1, asked.predictor
    if isinstance(predictor, str):
        text = f"{size} planned, " + ("every matrix the same" if alike else f"{more} vs {against}")
    else:
        stops = np.array([[LADDER.index(c) for c in plan.configs]])
        uniform = np.full_like(stops, LADDER.index(reference))
        said = predictor.predict(features(asked.problem, np.concatenate([stops, uniform])))
        text = f"perplexity {band(said)} predicted, {size}"
        if not alike:
            less = words.signed_percent(said.perplexity[0] / said.perplexity[1] - 1)
            text = f"perplexity {band(said)} predicted, {less} vs {against} for {more}"
        under.insert(1, how_predicted(predictor, bool(said.extrapolated[0])))
    headline(f"{plan.bits_per_param:.2f} bits: {text}.", " ".join(filter(None, under)))


def rows_in_words(plan: Plan) -> str:
    """How many rows have more bits, and what that takes: ``9 % of the rows at 3 bits, 9 MiB``."""
    high = sum(len(rows) for rows in plan.rows.values())
    share = high / sum(m.out_features for m in plan.matrices)
    width = plan.request.high_bits
    base = plan.configs[0].low
    more = words.signed_percent(plan.bits_per_param / base.nominal_bits - 1)
    return (
        f"{100 * share:.0f} % of the rows at {width} bits, {format_bytes(plan.planned_bytes)} "
        f"planned, {more} vs uniform {base.stop_name}"
    )


def band(said: Prediction) -> str:
    """The first of some predictions with the wider side of its band: ``61.70 ±0.42``.

    A wide band is told by its ends, without decimals that nobody knows: ``11.1 (7.52 to 23.5)``.
    """
    middle, low, high = said.perplexity[0], said.low[0], said.high[0]
    wider = max(high - middle, middle - low)
    if wider > middle / 10:
        return f"{words.rounded(middle)} ({words.rounded(low)} to {words.rounded(high)})"
    return f"{middle:.2f} ±{wider:.2f}"


def how_predicted(predictor: Predictor, extrapolated: bool) -> str:
    """What a prediction rests on."""
    points = predictor.points
    beyond = "; this plan lies beyond them" if extrapolated else ""
    return (
        f"Predicted from {words.plural(len(points.perplexity), 'run')} on {points.corpus} "
        f"({points.protocol}), 90 % band{beyond}."
    )


def gap(plan: Plan) -> str:
    """How far a knapsack's plan can be from the optimum, or nothing for another method."""
    if not plan.objective:
        return ""
    share = 100 * (plan.objective - plan.lower_bound) / abs(plan.objective)
    if plan.objective == plan.lower_bound:
        return ""  # one of a few plans, with nothing to choose
    if share < 1e-6:
        return "No plan within the budget costs less."
    return f"At most {share:.2g} % above the least possible cost at this budget."


# --- the live plan --------------------------------------------------------------------------


def begin_prediction(here: Here, info: ModelInfo) -> None:
    """Predict on the corpus chosen, or on WikiText-2 or the one with most runs, if any."""
    corpora = known.evaluated_on(here.store, info)
    if st.session_state.get("predict_on") not in corpora:
        usual = "wikitext2" if "wikitext2" in corpora else (corpora or [None])[0]
        st.session_state["predict_on"] = usual


def take_budget(problem: Problem, request: PlanRequest) -> str:
    """What the slider settled on is the budget from here on, within what is feasible.

    Gives a sentence where the nearest feasible one takes its place, as when a pin needs more.
    """
    settled = take_commit()
    if request.budget is None:
        return ""
    low, high = feasible(problem, request.method, request.base)
    wanted = st.session_state["budget"] if settled is None else settled
    taken = st.session_state["budget"] = max(
        min(wanted, high), low
    )  # low may be rounded above high
    if abs(taken - wanted) <= 0.005:  # the rounding of an end
        return ""
    pinned = " with these pins" if request.pins else ""
    end = "smallest" if taken > wanted else "largest"
    return f"{wanted:.2f} bits is out of reach{pinned}: the {end} plan, {taken:.2f} bits, is shown."


def show_live(asked: Asked, plan: Plan) -> None:
    """The slider and the plans that it redraws; a plan asked for by its base has no slider."""
    problem = with_pins(asked.problem, asked.request.pins)
    stops = np.array([problem.options.index(c) for c in plan.configs])
    by_base = asked.request.budget is None
    methods = [live_method(asked, stops)]
    if asked.request.exact:
        methods = [replace(methods[0], solved=Solved(stops, plan.lower_bound))]
    against = st.session_state["against"]
    if not by_base and against in state.alike(asked.request.method, PLANNERS):
        try:
            other = asked.by(against)
            frontier = known.frontier(other.info, other.found, other.request)
            budget = other.request.budget_for(problem)
            frontier.check_reaches(budget, problem)
            methods.append(live_method(other, frontier.at(budget.nominal_bytes).choice))
        except LsqError as error:
            st.caption(words.literal(f"Nothing to compare with: {error}"))
    live_planner(
        problem,
        methods,
        budget=None if by_base else st.session_state["budget"],
        other_bytes=asked.info.other_bytes or None,
        metadata=asked.settings.metadata,
        presets=[
            Preset(f"{m.gib} GB", m.bits, m.about)
            for m in memories(asked.info, problem, asked.settings.metadata)
        ],
        facts=[Facts(*pair) for pair in facts(problem, asked.request).items()],
        fixed=stops if by_base else None,
        feasible=feasible(problem, asked.request.method, asked.request.base),
        pins=asked.request.pins,
        on_pins=lambda pins: take_pins(asked, pins),
    )
    if "pins_refused" in st.session_state:
        st.warning(words.literal(st.session_state.pop("pins_refused")))


def take_pins(asked: Asked, pins: Sequence[str]) -> None:
    """Pins set on the plan itself; those that contradict the others are not taken."""
    try:
        with_pins(asked.problem, tuple(pins))
    except InputError as error:
        st.session_state["pins_refused"] = f"Not pinned. {error}"
        return
    st.session_state["pins"] = "\n".join(pins)


def live_method(asked: Asked, stops: np.ndarray) -> LiveMethod:
    """A method as the live planner draws it; ``stops`` (n,) is its plan at the budget."""
    name = asked.request.method
    frontier = known.frontier(asked.info, asked.found, asked.request, asked.rows)
    said = asked.along
    curve, here = None, None
    if said is not None:
        p = said.prediction
        curve = Curve(said.bits, p.perplexity, p.low, p.high, said.full_precision)
        p = asked.predictor.predict(features(asked.problem, stops[None]))
        here = float(p.perplexity[0]), float(p.low[0]), float(p.high[0])
    unit = _UNITS.get(name, "cost")
    return LiveMethod(name, get_planner(name).title, frontier, unit, curve, here)


# --- beside other plans ---------------------------------------------------------------------


def show_frontiers(asked: Asked) -> None:
    """The methods along the budget, in what they are predicted to give, with what was measured.

    The budget isn't marked here: the planner's own strip does, and a chart that stays the same
    isn't drawn anew at every release.
    """
    methods = dict.fromkeys([asked.request.method, st.session_state["against"], "uniform"])
    if state.reads_rows(asked.request.method):
        st.caption(
            "Mixed rows have neither a predicted perplexity nor a weight error at the ladder's "
            "stops, so only their runs are in this chart."
        )
    choose_corpus(asked)
    predictor = asked.predictor
    lines = [line for m in methods if m != "none" for line in frontier_line(asked.by(m))]
    runs = measured(asked, predictor)
    if not lines and runs.empty:
        st.info("There is no profile to tell plans apart by; Explore measures one.")
        return
    if isinstance(predictor, str):
        st.caption(words.literal(predictor))
    axis = (
        "squared weight error" if isinstance(predictor, str) else "predicted perplexity (90 % band)"
    )
    figure = charts.frontiers(lines, runs, axis)
    titles = words.listed([charts.method_style(line.method).title for line in lines])
    alt = f"{axis} of {titles or 'no method'} along the budget; {words.plural(len(runs), 'run')}."
    st.plotly_chart(figure, config=charts.CONFIG, key="frontiers", alt=alt)


def choose_corpus(asked: Asked) -> None:
    """The text to predict perplexity on, where runs were evaluated on several."""
    corpora = known.evaluated_on(asked.here.store, asked.info)
    if len(corpora) > 1:
        st.segmented_control(
            "Predict perplexity on", corpora, key="predict_on", persist_state="session"
        )


def frontier_line(asked: Asked) -> list[charts.FrontierLine]:
    """A method's line: predicted perplexity, or else the squared weight error; none without."""
    name = asked.request.method
    if name == "none" or state.reads_rows(name):
        return []
    try:
        known.frontier(asked.info, asked.found, asked.request)
    except LsqError:
        return []
    said = asked.along
    if said is not None:
        p = said.prediction
        return [charts.FrontierLine(name, said.bits, p.perplexity, p.low, p.high)]
    if "weight_error" not in asked.problem.by_config:
        return []
    return [charts.FrontierLine(name, *known.error_along(asked.info, asked.found, asked.request))]


def measured(asked: Asked, predictor: Predictor | str) -> pd.DataFrame:
    """Runs for the chart, by any quantizer: those of the evaluation that is predicted.

    None without a prediction.
    """
    empty = pd.DataFrame(columns=["method", "label", "bits_per_param", "value"])
    if isinstance(predictor, str):
        return empty
    points = predictor.points
    origin = "published" if known.is_published(asked.info) else "measured"
    runs = known.results(asked.here.store, origin)
    same = (runs["fingerprint"] == asked.info.fingerprint) & (runs["corpus"] == points.corpus)
    same &= (runs["protocol"] == points.protocol) & runs["bits_per_param"].notna()
    if points.tokens is not None:
        same &= runs["tokens"] == points.tokens
    runs = runs[same]
    made = list(zip(runs["method"], runs["quantizer"], runs["run"], strict=True))
    return pd.DataFrame(
        {
            "method": [charts.drawn_as(method, by) for method, by, _ in made],
            "label": [
                f"{charts.method_style(method).title} by {by}, run {run}"
                for method, by, run in made
            ],
            "bits_per_param": runs["bits_per_param"],
            "value": runs["perplexity"],
        }
    )


def ask_by_loss(asked: Asked) -> None:
    """The inverse question: the smallest plan that is predicted to lose so little."""
    st.write(
        "The smallest plan whose perplexity is predicted at most this much above full precision:"
    )
    text = st.text_input("Loss", "1%", key="max_loss", persist_state="session")
    st.button("Find it", on_click=find_by_loss, args=(asked, text))
    if "loss_answer" in st.session_state:
        st.write(words.literal(st.session_state.pop("loss_answer")))


def find_by_loss(asked: Asked, text: str) -> None:
    """Set the budget to the answer, or say why there is none."""
    predictor = asked.predictor
    try:
        if state.reads_rows(asked.request.method):
            raise InputError(NOT_PREDICTED)
        if isinstance(predictor, str):
            raise InputError(predictor)
        request = replace(asked.request, base=None)
        frontier = known.frontier(asked.info, asked.found, request)
        problem = with_pins(asked.problem, request.pins)
        nominal = smallest_within(frontier, predictor, problem, parse_loss(text))
    except LsqError as error:
        st.session_state["loss_answer"] = str(error)
        return
    # Rounded up to what a budget is typed with, so that the plan still fits.
    st.session_state["budget"] = np.ceil(8e4 * nominal / problem.total - 1e-6) / 1e4
    if get_planner(request.method).has_base:
        st.session_state["ask"] = "budget"


# --- its sizes ------------------------------------------------------------------------------


def show_accounts(plan: Plan) -> None:
    """Every account of its size, each by its own name."""
    accounts = [
        ("Nominal", format_bytes(plan.nominal_bytes), f"{plan.bits_per_param:.4f} bits",
         "The papers' formula; budgets in bits per parameter mean this."),
        ("Planned", format_bytes(plan.planned_bytes), f"{plan.metadata} metadata",
         "What this project's packing of the linear weights occupies, exactly."),
        ("Whole model", format_bytes(plan.model_bytes) if plan.other_bytes else "unknown",
         "with the rest" if plan.other_bytes else "the rest isn't told",
         "Planned bytes, and embeddings, norms and head in the checkpoint's own precision."),
        ("Weight-only", f"{plan.weight_only_bits:.4f} bits", "codes alone",
         "Bits per planned parameter without any metadata."),
        ("fp16 metadata", f"{plan.bits_with_fp16_metadata:.4f} bits", "as hqq keeps them",
         "Bits per planned parameter if scale and zero stayed fp16."),
    ]  # fmt: skip
    for column, (label, value, under, about) in zip(
        st.columns(len(accounts)), accounts, strict=True
    ):
        column.metric(label, value, under, delta_color="off", delta_arrow="off", help=about)


def show_flagged(plan: Plan) -> None:
    """The matrices that were moved from the base, strongest first."""
    if not plan.reasons:
        return
    configs = {m.name: c for m, c in plan.choice.items()}
    ranked = "draw" if state.is_ablation(plan.method) else "z"
    with st.expander(f"{len(plan.reasons)} matrices moved from the base"):
        st.dataframe(
            pd.DataFrame(
                {
                    "module": list(plan.reasons),
                    ranked: list(plan.reasons.values()),
                    "configuration": [configs[name].name for name in plan.reasons],
                    "bits": [configs[name].nominal_bits for name in plan.reasons],
                }
            ),
            column_config={
                ranked: st.column_config.NumberColumn(format="%.2f"),
                "bits": st.column_config.NumberColumn(format="%.2f"),
            },
            hide_index=True,
        )


# --- where it can go ------------------------------------------------------------------------


def actions(asked: Asked, plan: Plan) -> None:
    """Run it, take it along, keep it, ask the other way round, or do the same in a terminal."""
    here, info, found = asked.here, asked.info, asked.found
    with st.container(horizontal=True):
        if not known.is_published(info) and st.button(
            "Quantize and evaluate", type="primary", icon=":material/arrow_forward:"
        ):
            st.switch_page("pages/3_Run.py")
        with st.popover("By predicted loss"):
            ask_by_loss(asked)
        st.download_button(
            "Download plan",
            lambda: plan_text(asked, plan),
            f"plan-{plan.method}-{plan.bits_per_param:.2f}.json",
            "application/json",
            on_click="ignore",
        )
        with st.popover("Save or open"):
            save(here, info, plan, found)
        with st.popover("Command line"):
            words_of = ["plan", *arguments.model_arguments(here.source, here.device)]
            words_of += [
                *arguments.plan_arguments(asked.request, asked.settings),
                "--out",
                "plan.json",
            ]
            st.code(f"lsq {shlex.join(words_of)}", language="bash", wrap_lines=True)


def plan_text(asked: Asked, plan: Plan) -> str:
    """The plan as a file."""
    content = plan.to_json() | {
        "model": asked.here.source.name,
        "fingerprint": asked.info.fingerprint,
        "profile": asked.found.id if asked.found else None,
        "covered": asked.info.covered,
    }
    return json_text(content, indent=1)


def save(here: Here, info: ModelInfo, plan: Plan, found: Profile | None) -> None:
    """Keep the plan under a name, or set the controls to one that was kept."""
    if not info.fingerprint:
        st.write("A plan can be kept once the model has been fetched; profiling or a run does.")
        return
    name = st.text_input("Name", key="plan_name").strip()
    if st.button("Save the plan", disabled=not name):
        here.store.save_plan(plan, info.fingerprint, found.id if found else None, name)
        st.success(f"Kept as '{name}'.")
    kept = known.named_plans(here.store, info.fingerprint)
    if len(kept):
        titles = dict(zip(kept["id"], kept["name"], strict=True))
        id = st.selectbox("Kept plans", list(titles), format_func=titles.get)
        st.button("Open", on_click=open_plan, args=(here, info, id))


def open_plan(here: Here, info: ModelInfo, id: str) -> None:
    """Set the controls to what a kept plan was asked for."""
    content = here.store.plan_content(id)
    state.set_plan(PlanRequest.from_json(content["request"]), info.linear_parameters)
    grid = {"metadata": content["metadata"], "axis": content["axis"]}
    state.set_settings(replace(state.settings(), **grid))
