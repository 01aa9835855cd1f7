"""Stored results of the searches that refine plans, in the form that planners use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lsq_core.bits import Budget
from lsq_core.planning.problem import Problem, Refinement
from lsq_core.planning.request import PlanRequest
from lsq_core.refinement.step import RefinementStep
from lsq_core.store.refinements import RefinementKey
from lsq_core.store.store import Store


def load_refinement(
    store: Store, profile: str, problem: Problem, request: PlanRequest, metadata: str
) -> Refinement | None:
    """Return the result of a request's search at its budget or else the nearest one, or None.

    ``problem`` must already be restricted by the request.
    """
    key = RefinementKey.of(profile, request)
    budgets = store.refinement_budgets(key)
    if not budgets:
        return None
    wanted = request.resolve_budget(problem, metadata) or budgets[-1]
    nearest = min(budgets, key=lambda own: _distance(own, wanted))
    steps = store.refinement_steps(key, nearest, option_names(problem))
    return as_refinement(steps, nearest, problem) if steps else None


def find_steps(
    store: Store, profile: str, problem: Problem, request: PlanRequest, metadata: str
) -> list[RefinementStep]:
    """Return the steps of the search within exactly a request's budget; none without a budget.

    ``problem`` must already be restricted by the request.
    """
    budget = request.resolve_budget(problem, metadata)
    if budget is None:
        return []
    key = RefinementKey.of(profile, request)
    return store.refinement_steps(key, budget, option_names(problem))


def option_names(problem: Problem) -> list[str]:
    """Return the names of a problem's configurations."""
    return [option.name for option in problem.options]


def _distance(own: Budget, wanted: Budget) -> tuple[float, bool]:
    """Return the distance of two budgets, and whether they differ in kind, to break ties."""
    other_kind = (own.planned_bytes is None) != (wanted.planned_bytes is None)
    return abs(np.log(_size(own) / _size(wanted))), other_kind


def _size(budget: Budget) -> float:
    return budget.nominal_bytes if budget.planned_bytes is None else budget.planned_bytes


def as_refinement(
    steps: Sequence[RefinementStep], budget: Budget, problem: Problem
) -> Refinement | None:
    """Return the result of a search's steps, or None if no plan was better than the start."""
    last = steps[-1]
    if not last.number:
        return None
    mark = f"{budget}/{last.number}/{last.kl}"
    bits = 8 * problem.nominal(last.choice) / problem.total
    return Refinement(last.cost, bits, steps[0].kl, last.kl, last.number, mark)
