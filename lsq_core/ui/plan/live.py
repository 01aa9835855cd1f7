"""The live planner on the Plan page: its data, and the budget and pins set in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lsq_core.bits import Budget
from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation.prediction import (
    features,
)
from lsq_core.planning.constraints import restrict
from lsq_core.planning.facts import facts, layer_means
from lsq_core.planning.limit import nominal_limit
from lsq_core.planning.methods import PLANNERS, get_planner, mixes_rows, reads_field
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import SENSITIVITIES
from lsq_core.planning.serving_memory import memory_budgets
from lsq_core.profiling.metrics import METRICS
from lsq_core.ui import cached_plans, state, words
from lsq_core.ui.plan.budget import feasible
from lsq_core.ui.plan.query import PlanQuery
from lsq_core.ui.planner import (
    Curve,
    ExactPlan,
    FreePlans,
    LayerScores,
    LiveMethod,
    MatrixFacts,
    Preset,
    live_planner,
    read_committed_budget,
)
from lsq_core.ui.safe import st


def take_budget() -> None:
    """Adopt the budget committed in the browser, if there is a new one."""
    committed = read_committed_budget()
    if committed is not None:
        state.set_budget(committed.bits, committed.bytes)


def show_live_plan(query: PlanQuery, plan: Plan) -> None:
    """Show the slider and the plans that follow it; a plan from a base alone has no slider."""
    problem = restrict(query.problem, query.request)
    stops = np.array([problem.options.index(c) for c in plan.configs])
    by_base = query.request.budget is None
    budget = None if by_base else query.request.parse_budget(problem.total)
    methods = [live_method(query, stops)]
    if query.request.exact:
        methods = [replace(methods[0], solved=ExactPlan(stops, plan.lower_bound))]
    against = st.session_state["against"]
    if not by_base and against in state.alike(query.request.method, PLANNERS):
        try:
            other = query.with_method(against)
            frontier = cached_plans.frontier(other.info, other.profile, other.request)
            metadata = query.settings.metadata
            budget = other.request.resolve_budget(problem, metadata)
            limit = nominal_limit(frontier, problem, budget, metadata)
            methods.append(live_method(other, frontier.at(limit).choice))
        except LsqError as error:
            st.caption(words.escape(f"Nothing to compare with: {error}"))
    titles = {name: metric.title for name, metric in METRICS.items()}
    live_planner(
        problem,
        methods,
        budget=None if by_base else shown_bits(budget, problem),
        budget_bytes=None if by_base else budget.planned_bytes,
        other_bytes=query.info.other_bytes or None,
        metadata=query.settings.metadata,
        presets=[
            Preset(f"{m.gib} GB", m.bits, m.summary)
            for m in memory_budgets(query.info, problem, query.settings.metadata)
        ],
        facts=[MatrixFacts(*pair) for pair in facts(problem, query.request, titles).items()],
        fixed=stops if by_base else None,
        feasible=feasible(problem, query.request.method, query.request.base),
        uniform=uniform_predictions(query),
        pins=query.request.pins,
        on_pins=lambda pins: set_pins(query, pins),
    )
    if "pins_refused" in st.session_state:
        st.warning(words.escape(st.session_state.pop("pins_refused")))


def shown_bits(budget: Budget, problem: Problem) -> float:
    """Return a budget's place on the slider, in bits; the browser refines it for bytes."""
    return 8 * (budget.nominal_bytes or budget.planned_bytes) / problem.total


def set_pins(query: PlanQuery, pins: Sequence[str]) -> None:
    """Adopt pins set in the live planner, or report why they are refused."""
    try:
        restrict(query.problem, replace(query.request, pins=tuple(pins)))
    except InputError as error:
        st.session_state["pins_refused"] = f"Not pinned. {error}"
        return
    st.session_state["pins"] = "\n".join(pins)


def live_method(query: PlanQuery, stops: np.ndarray) -> LiveMethod:
    """Return a method for the live planner; ``stops`` (n,) is its plan at the budget."""
    name = query.request.method
    frontier = cached_plans.frontier(
        query.info, query.profile, query.request, query.extra_measurements
    )
    curve, at_budget = prediction_curve(query), None
    if curve is not None:
        at_budget = query.predictor.predict(features(query.problem, stops[None])).band(0)
    planner = get_planner(name)
    return LiveMethod(
        name,
        planner.title,
        frontier,
        planner.cost_unit,
        curve,
        at_budget,
        scores=layer_scores(query),
        free=free_plans(query) if query.request.has_ties else None,
    )


def prediction_curve(query: PlanQuery) -> Curve | None:
    """Return predicted perplexity by budget for the live planner."""
    predicted = query.prediction_curve
    if predicted is None:
        return None
    p = predicted.prediction
    return Curve(predicted.bits, p.perplexity, p.low, p.high, predicted.full_precision)


def free_plans(query: PlanQuery) -> FreePlans:
    """Return the same method's plans without ties and server."""
    free = query.without_ties()
    frontier = cached_plans.frontier(free.info, free.profile, free.request, free.extra_measurements)
    return FreePlans(frontier, prediction_curve(free))


def layer_scores(query: PlanQuery) -> LayerScores | None:
    """Return the sensitivity drawn above the plan: a metric of the method, else the usual one."""
    request, known = query.request, query.problem.scores
    read = [m for m in get_planner(request.method).metrics if m not in SENSITIVITIES]
    if reads_field(request.method, "metric"):
        read = [request.metric]
    found = next((name for name in [*read, request.metric, *SENSITIVITIES] if name in known), None)
    if found is None:
        return None
    name = "sensitivity" if found in SENSITIVITIES else METRICS[found].label
    return LayerScores(name, METRICS[found].title, layer_means(query.problem, found))


def uniform_predictions(query: PlanQuery) -> Curve | None:
    """Return predicted perplexity of the uniform plans by size; None without a predictor."""
    predictor, request = query.predictor, query.request
    if isinstance(predictor, str) or mixes_rows(request.method):
        return None
    ladder = query.problem.options
    by_size = sorted(range(len(ladder)), key=lambda k: ladder[k].nominal_bits)
    choices = np.repeat(np.array(by_size)[:, None], len(query.problem.matrices), axis=1)
    p = predictor.predict(features(query.problem, choices))
    bits = np.array([ladder[k].nominal_bits for k in by_size])
    return Curve(bits, p.perplexity, p.low, p.high, predictor.full_precision)
