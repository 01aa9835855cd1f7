"""Conversion of a budget to a limit in nominal bytes.

Frontiers are measured in nominal bytes. A budget in bits per parameter translates directly; a
budget in bytes bounds the planned bytes, which exceed the nominal bytes by an overhead that depends
on the plan's group sizes. The browser takes the same steps (``limitOf`` in ``frontier.js``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lsq_core.bits import Budget
from lsq_core.errors import InputError
from lsq_core.planning.frontier import Frontier
from lsq_core.planning.problem import TOLERANCE, Problem
from lsq_core.units import format_bytes

#: A plan that uses at least this share of a budget in bytes counts as having spent it. Otherwise
#: the limit is bisected, at most ``_HALVINGS`` times, towards the last one that was too large.
_SPENT = 0.999
_HALVINGS = 12


class OutOfReach(InputError):
    """Raised if no plan from a base is within the budget."""

    def __init__(self, budget: Budget, smallest: str) -> None:
        super().__init__(
            f"A budget of {budget.text} is below the smallest plan from this base, {smallest}."
        )


Choose = Callable[[float], np.ndarray]


def nominal_limit(
    frontier: Frontier, problem: Problem, budget: Budget | None, metadata: str
) -> float:
    """Return the limit in nominal bytes at which a plan meets a budget, infinite if it is None.

    For a budget in bytes, the limit starts at the budget itself; until a plan fits, it is lowered
    to the budget less the overhead of the plan found. If too much of the budget is then unspent,
    the limit is raised by bisection.

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
    """Lower a nominal limit until the choice found for it is within a budget in bytes."""
    while True:
        choice = choose(limit)
        excess = problem.planned_total(choice, metadata) - budget.planned_bytes
        if excess <= 0:
            return limit
        limit = _below(problem.nominal(choice), excess)


def _below(nominal: float, excess: float) -> float:
    """Return a limit lower by an excess, and low enough to rule out the same plan.

    Limits have a relative tolerance, which for gigabytes may cover an excess of a few bytes.
    """
    return min(nominal - excess, nominal * (1 - 2 * TOLERANCE))
