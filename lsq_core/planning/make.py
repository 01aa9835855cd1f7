"""From a problem and a request to a plan, or to the frontier of all budgets."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lsq_core.bits import (
    Budget,
    stop_index,
)
from lsq_core.errors import InputError, LsqError
from lsq_core.planning.detection import shallow_model_note
from lsq_core.planning.exact import solve_exactly
from lsq_core.planning.frontier import Frontier, Segment
from lsq_core.planning.methods import get_planner
from lsq_core.planning.methods.base import Planner
from lsq_core.planning.methods.high_impact import high_rows
from lsq_core.planning.methods.uniform import uniform_start, usable_bases
from lsq_core.planning.pins import apply_pins
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest


def make_plan(
    problem: Problem,
    request: PlanRequest,
    *,
    metadata: str = "8bit",
    axis: int = 1,
    other_bytes: int = 0,
    frontier: Frontier | None = None,
) -> Plan:
    """The plan that a method makes for a base stop, a budget, or a base capped by a budget.

    ``frontier`` is what :func:`make_frontier` gave for the same request with its pins, where it is
    at hand; else it is made.

    Raises
    ------
    InputError
        When the method is unknown, neither base nor budget is given, the budget is out of reach,
        or the base's groups don't fill a matrix.
    """
    planner = get_planner(request.method)
    problem = problem.with_options(planner.options(request))
    pinned = apply_pins(problem, request.pins)
    budget = request.resolve_budget(pinned)
    if budget is None and request.base is None:
        raise InputError(
            "Give a base configuration (such as 3.13), a budget (such as 3.2bpp), or both."
        )
    if not planner.has_base and (budget is None or request.base is not None):
        raise InputError(f"{planner.title} takes a budget (such as 3.2bpp), not a base.")
    if request.exact and planner.has_base:
        raise InputError(
            f"{planner.title} minimizes no cost; only knapsacks can be solved exactly."
        )
    frontier = frontier or make_frontier(pinned, request)
    if request.exact and frontier.cost is None:
        raise InputError(
            f"{planner.title} chooses matrices together; its search has no exact variant."
        )
    chosen = _select_plan(planner, pinned, frontier, request, budget)
    pinned.check_allowed(chosen.stops)
    return Plan(
        request=request,
        matrices=problem.matrices,
        configs=tuple(problem.options[stop] for stop in chosen.stops),
        metadata=metadata,
        axis=axis,
        base=chosen.base,
        ranking_scores=chosen.ranking_scores,
        notes=chosen.notes + _pin_cost_notes(problem, request, chosen, frontier),
        other_bytes=other_bytes,
        objective=chosen.objective,
        lower_bound=chosen.lower_bound,
        rows=high_rows(problem, chosen.stops),
    )


def make_frontier(problem: Problem, request: PlanRequest) -> Frontier:
    """Every budget's plan by a method; its pins, if any, are in the problem already.

    Raises
    ------
    InputError
        When the base's groups, or every stop's, fail to fill some matrix.
    """
    planner = get_planner(request.method)
    problem = problem.with_options(planner.options(request))
    if not planner.has_base:
        return planner.frontier(problem, request, [])
    bases = [stop_index(request.base)] if request.base else usable_bases(problem)
    if not bases:
        raise InputError(
            "No single group size divides every matrix of this model; use mxq, which gives each "
            "matrix a configuration that fits."
        )
    for base in bases:
        problem.check_allowed(uniform_start(problem, base))
    return planner.frontier(problem, request, bases)


@dataclass(frozen=True, eq=False)
class _Selection:
    """Stops (n,), the base they start from, what ranked each moved matrix, and plain words."""

    stops: np.ndarray
    base: str | None = None
    ranking_scores: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    objective: float | None = None
    lower_bound: float | None = None


def _select_plan(
    planner: Planner,
    problem: Problem,
    frontier: Frontier,
    request: PlanRequest,
    budget: Budget | None,
) -> _Selection:
    """The frontier's plan for a budget, or all of a fixed base's moves."""
    limit = budget.nominal_bytes if budget else np.inf
    if budget is not None:
        frontier.check_reachable(budget, problem)
    point = frontier.at(limit)
    if not planner.has_base:
        if request.exact:
            return _solve_exact(frontier, limit)
        return _Selection(
            point.choice,
            notes=frontier.notes,
            objective=point.objective,
            lower_bound=point.lower_bound,
        )
    moves = point.segment.moves[: point.taken]
    start = point.segment.start
    free = np.flatnonzero((problem.low < start) | (start < problem.high))
    base = problem.options[start[free[0]]].stop_name if len(free) else request.base
    return _Selection(
        point.choice,
        request.base if request.base else base,
        {problem.matrices[move.matrix].name: move.priority for move in moves},
        _notes(planner, problem, point.segment, len(moves), budget),
    )


def _solve_exact(frontier: Frontier, limit: float) -> _Selection:
    exact = solve_exactly(frontier, limit)
    notes = frontier.notes
    if exact.reason:
        notes += (f"Not proven optimal: {exact.reason}.",)
    return _Selection(
        exact.choice, notes=notes, objective=exact.objective, lower_bound=exact.lower_bound
    )


def _notes(
    planner: Planner, problem: Problem, segment: Segment, taken: int, budget: Budget | None
) -> tuple[str, ...]:
    """Plain words about what a boost could not do, and what of the budget it leaves."""
    if not planner.metrics:
        return ()
    shallow = shallow_model_note(1 + max(m.layer for m in problem.matrices))
    notes = [shallow] if shallow else []
    if not segment.moves:
        notes.append(f"{planner.title} boosts no layer here, so this is the uniform plan.")
    elif not taken:
        notes.append("The budget leaves no room for a boost: this is the uniform plan.")
    elif budget is not None and taken == len(segment.moves):
        left = budget.nominal_bytes - segment.moves[-1].bytes_after
        notes.append(
            f"{8 * left / problem.total:.3f} bpp of the budget remain unspent: "
            f"{planner.title} has no more layers to promote from this base."
        )
    return tuple(notes)


def _pin_cost_notes(
    problem: Problem, request: PlanRequest, chosen: _Selection, frontier: Frontier
) -> tuple[str, ...]:
    """What the pins cost: bytes where they were added to a base, else cost at the same budget."""
    if not request.pins:
        return ()
    try:
        free = make_frontier(problem, request)
    except LsqError:
        return ("Without the pins this method has no plan.",)
    budget = request.resolve_budget(problem)
    limit = budget.nominal_bytes if budget else np.inf
    if not free.can_reach(limit):
        return ("Without the pins no plan from this base is within the budget.",)
    point = free.at(limit)
    if frontier.cost is None and frontier.losses is None:
        more = 8 * (problem.nominal(chosen.stops) - problem.nominal(point.choice)) / problem.total
        return (f"The pins change the plan by {more:+.4f} bpp.",)
    without = point.objective
    if without is None or chosen.objective is None:
        return ()
    share = 100 * (chosen.objective / without - 1) if without else 0.0
    return (f"The pins cost {share:+.2f} % of what the method minimises, at the same budget.",)
