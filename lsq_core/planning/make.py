"""Make a plan, or the frontier of plans for all budgets, from a problem and a request."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from lsq_core.bits import Budget, get_ladder, stop_index
from lsq_core.errors import InputError, LsqError
from lsq_core.planning.constraints import apply_ties, restrict
from lsq_core.planning.detection import shallow_model_note
from lsq_core.planning.exact import solve_exactly
from lsq_core.planning.frontier import Frontier, Segment
from lsq_core.planning.limit import lower_limit, nominal_limit
from lsq_core.planning.methods import get_planner
from lsq_core.planning.methods.base import Planner
from lsq_core.planning.methods.high_impact import high_rows
from lsq_core.planning.methods.uniform import uniform_start, usable_bases
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.planning.servers import get_server


def make_plan(
    problem: Problem,
    request: PlanRequest,
    *,
    metadata: str = "8bit",
    axis: int = 1,
    other_bytes: int = 0,
    frontier: Frontier | None = None,
) -> Plan:
    """Make a method's plan for a base configuration, a budget, or a base capped by a budget.

    ``frontier`` is the result of :func:`make_frontier` for the same request and the restricted
    problem (:func:`lsq_core.planning.constraints.restrict`); it is computed if not given.

    Raises
    ------
    InputError
        If the method is unknown or doesn't support the request's fields, neither base nor budget is
        given, the budget is out of reach, the base's groups don't fill a matrix, or the ties,
        server or pins cannot be satisfied.
    """
    planner = get_planner(request.method)
    problem = problem.with_options(planner.options(request))
    if request.serve is not None:
        get_server(request.serve).check_axis(axis)
    restricted = restrict(problem, request)
    budget = request.resolve_budget(restricted, metadata)
    _check_size_given(planner, request)
    frontier = frontier or make_frontier(restricted, request)
    if request.exact and frontier.cost is None:
        raise InputError(
            f"{planner.title} chooses all matrices jointly; its search has no exact variant."
        )
    limit = _limit(frontier, restricted, request, metadata)
    chosen = _select_plan(planner, restricted, frontier, request, limit)
    restricted.check_allowed(chosen.stops)
    notes = chosen.notes
    if chosen.is_last and budget is not None and planner.metrics:
        notes += (_unspent_note(planner, restricted, chosen.stops, budget, metadata),)
    return Plan(
        request=request,
        matrices=problem.matrices,
        configs=tuple(problem.options[stop] for stop in chosen.stops),
        metadata=metadata,
        axis=axis,
        base=chosen.base,
        ranking_scores=chosen.ranking_scores,
        notes=notes + _cost_notes(problem, request, chosen, frontier, metadata),
        other_bytes=other_bytes,
        objective=chosen.objective,
        lower_bound=chosen.lower_bound,
        rows=high_rows(problem, chosen.stops),
    )


def _check_size_given(planner: Planner, request: PlanRequest) -> None:
    """Raise :class:`InputError` if no size is given or the method doesn't support the request."""
    if request.budget is None and request.base is None:
        raise InputError(
            "Give a base configuration (such as 3.13), a budget (such as 3.2bpp), or both."
        )
    if not planner.has_base and (request.budget is None or request.base is not None):
        raise InputError(f"{planner.title} takes a budget (such as 3.2bpp), not a base.")
    if request.exact and planner.has_base:
        raise InputError(
            f"{planner.title} does not minimize a cost; only knapsacks can be solved exactly."
        )


def make_frontier(problem: Problem, request: PlanRequest) -> Frontier:
    """Compute a method's plans for every budget; the problem must already be restricted.

    Raises
    ------
    InputError
        If the method doesn't support the ladder, the base cannot be used for some matrix, or no
        base is given and no configuration can be used for every matrix.
    """
    planner = get_planner(request.method)
    problem = problem.with_options(planner.options(request))
    if not planner.has_base:
        return planner.frontier(problem, request, [])
    ladder = get_ladder(request.ladder)
    bases = [stop_index(request.base, ladder)] if request.base else usable_bases(problem)
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
    """A choice (n,), its base, the score that ranked each promoted matrix, and notes."""

    stops: np.ndarray
    base: str | None = None
    ranking_scores: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    objective: float | None = None
    lower_bound: float | None = None
    #: Whether every move from the base is taken, so that none is left for the rest of the budget.
    is_last: bool = False


def _limit(frontier: Frontier, problem: Problem, request: PlanRequest, metadata: str) -> float:
    """Return the limit in nominal bytes for a request's budget, infinite without a budget."""
    budget = request.resolve_budget(problem, metadata)
    limit = nominal_limit(frontier, problem, budget, metadata)
    if request.exact and frontier.cost is not None and budget and budget.planned_bytes:
        return lower_limit(
            lambda nominal: solve_exactly(frontier, nominal).choice,
            limit,
            problem,
            budget,
            metadata,
        )
    return limit


def _select_plan(
    planner: Planner,
    problem: Problem,
    frontier: Frontier,
    request: PlanRequest,
    limit: float,
) -> _Selection:
    """Return the plan within a limit in nominal bytes; an infinite limit takes every move."""
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
    start = frontier.expand(point.segment.start)
    free = np.flatnonzero((problem.low < start) | (start < problem.high))
    base = problem.options[start[free[0]]].stop_name if len(free) else request.base
    return _Selection(
        point.choice,
        request.base if request.base else base,
        {
            problem.matrices[i].name: move.priority
            for move in moves
            for i in frontier.matrices_of(move.matrix)
        },
        _notes(planner, problem, point.segment, len(moves)),
        is_last=0 < len(moves) == len(point.segment.moves),
    )


def _solve_exact(frontier: Frontier, limit: float) -> _Selection:
    exact = solve_exactly(frontier, limit)
    notes = frontier.notes
    if exact.reason:
        notes += (f"Not proven optimal: {exact.reason}.",)
    return _Selection(
        exact.choice, notes=notes, objective=exact.objective, lower_bound=exact.lower_bound
    )


def _notes(planner: Planner, problem: Problem, segment: Segment, taken: int) -> tuple[str, ...]:
    """Return notes for a boost on a shallow model or without effect."""
    if not planner.metrics:
        return ()
    shallow = shallow_model_note(1 + max(m.layer for m in problem.matrices))
    notes = [shallow] if shallow else []
    if not segment.moves:
        notes.append(f"{planner.title} boosts no layer here, so this is the uniform plan.")
    elif not taken:
        notes.append("The budget leaves no room for a boost: this is the uniform plan.")
    return tuple(notes)


def _unspent_note(
    planner: Planner, problem: Problem, stops: np.ndarray, budget: Budget, metadata: str
) -> str:
    """Return a note on the unspent part of a budget, in the kind of bytes that it bounds."""
    if budget.planned_bytes is None:
        left = budget.nominal_bytes - problem.nominal(stops)
    else:
        left = budget.planned_bytes - problem.planned_total(stops, metadata)
    return (
        f"{8 * left / problem.total:.3f} bpp of the budget is unspent: "
        f"{planner.title} has no more layers to promote from this base."
    )


def _cost_notes(
    problem: Problem, request: PlanRequest, chosen: _Selection, frontier: Frontier, metadata: str
) -> tuple[str, ...]:
    """Return one note on the cost of ties and server, and one on the cost of pins.

    A refined plan gets no notes, because its costs were measured around a plan that already met the
    restrictions.
    """
    notes: tuple[str, ...] = ()
    if get_planner(request.method).reads_refinement:
        return notes
    if request.has_ties:
        free = request.without_ties()
        notes += _cost_note(
            restrict(problem, free), free, chosen, frontier, request.ties_name, metadata
        )
    if request.pins:
        free = replace(request, pins=())
        notes += _cost_note(apply_ties(problem, free), free, chosen, frontier, "the pins", metadata)
    return notes


def _cost_note(
    problem: Problem,
    request: PlanRequest,
    chosen: _Selection,
    frontier: Frontier,
    what: str,
    metadata: str,
) -> tuple[str, ...]:
    """Return a note on the cost of a restriction: in bits for a base, else in the method's cost.

    ``problem`` and ``request`` are without the restriction that ``what`` names.
    """
    try:
        free = make_frontier(problem, request)
    except LsqError:
        return (f"This method has no plan without {what}.",)
    try:
        limit = _limit(free, problem, request, metadata)
    except InputError:
        return (f"Without {what} no plan from this base is within the budget.",)
    subject = what[0].upper() + what[1:]
    if frontier.cost is None and frontier.losses is None:
        other = free.at(limit).choice
        more = 8 * (problem.nominal(chosen.stops) - problem.nominal(other)) / problem.total
        return (f"{subject} change the plan by {more:+.4f} bpp.",)
    without = (solve_exactly if request.exact else Frontier.at)(free, limit).objective
    if without is None or chosen.objective is None:
        return ()
    share = 100 * (chosen.objective / without - 1) if without else 0.0
    return (
        f"{subject} cost {share:+.2f} % of the cost that the method minimises, at the same budget.",
    )
