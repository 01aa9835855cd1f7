"""The nominal bytes that a budget leaves a method's plan.

Frontiers are of nominal bytes. A budget in bits per parameter is one of those; a budget in bytes
bounds the planned bytes, which are more by an overhead that depends on the plan's group sizes. The
browser takes the same steps (``limitOf`` in ``frontier.js``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lsq_core.bits import Budget
from lsq_core.errors import InputError
from lsq_core.planning.frontier import Frontier
from lsq_core.planning.problem import TOLERANCE, Problem
from lsq_core.units import format_bytes

#: A plan that stores this share of a budget in bytes has spent it; one that stores less is tried at
#: limits between the last one that was too large and its own, halving the distance so many times.
_SPENT = 0.999
_HALVINGS = 12


class OutOfReach(InputError):
    """No plan from a base is within the budget."""

    def __init__(self, budget: Budget, smallest: str) -> None:
        super().__init__(
            f"A budget of {budget.text} does not reach the smallest plan from this base, "
            f"{smallest}."
        )


Choose = Callable[[float], np.ndarray]


def nominal_limit(
    frontier: Frontier, problem: Problem, budget: Budget | None, metadata: str
) -> float:
    """Return the nominal bytes within which a plan is within a budget; infinite without one.

    For a budget in bytes that is the budget less the overhead of a plan: at first none, then that
    of the last plan found, until a plan fits.

    Raises
    ------
    OutOfReach
        If no plan of the frontier is within the budget.
    """
    if budget is None:
        return np.inf
    if budget.planned_bytes is None:
        if not frontier.can_reach(budget.nominal_bytes):
            raise OutOfReach(budget, problem.format_size(frontier.smallest))
        return budget.nominal_bytes

    def planned(limit: float) -> int:
        return problem.planned_total(frontier.at(limit).choice, metadata)

    smallest = planned(frontier.smallest)
    if smallest > budget.planned_bytes:
        raise OutOfReach(budget, f"{format_bytes(smallest)} planned")
    limit, too_large = float(budget.planned_bytes), None
    while (size := planned(limit)) > budget.planned_bytes:
        nominal, too_large = problem.nominal(frontier.at(limit).choice), limit
        limit = max(_below(nominal, size - budget.planned_bytes), frontier.smallest)
    for _ in range(_HALVINGS):
        if too_large is None or size >= _SPENT * budget.planned_bytes:
            break
        middle = (limit + too_large) / 2
        if (found := planned(middle)) <= budget.planned_bytes:
            limit, size = middle, found
        else:
            too_large = middle
    return limit


def lower_limit(
    choose: Choose, limit: float, problem: Problem, budget: Budget, metadata: str
) -> float:
    """Lower a nominal limit until the choice that is found for it is within a budget in bytes."""
    while True:
        choice = choose(limit)
        excess = problem.planned_total(choice, metadata) - budget.planned_bytes
        if excess <= 0:
            return limit
        limit = _below(problem.nominal(choice), excess)


def _below(nominal: float, excess: float) -> float:
    """Return a limit that is smaller by an excess, and never allows the same plan again.

    A limit allows what is larger by rounding, and next to gigabytes a few bytes are no more.
    """
    return min(nominal - excess, nominal * (1 - 2 * TOLERANCE))
