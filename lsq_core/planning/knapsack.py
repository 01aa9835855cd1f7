"""Multiple-choice knapsacks: one stop a matrix, least total cost within a budget.

The whole frontier comes from the lower convex hulls of each matrix's (bytes, cost) points, merged
by price (method §5).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from lsq_core.planning.frontier import Frontier, Segment, build_moves
from lsq_core.planning.methods.base import LadderPlanner
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest


class Knapsack(LadderPlanner):
    """A method that minimises a cost; a new one says what each matrix costs at each stop."""

    has_base = False
    metrics: tuple[str, ...] = ()

    def cost(self, problem: Problem) -> np.ndarray:
        """Cost (n, 12) of each matrix at each stop; NaN where it cannot be chosen."""
        raise NotImplementedError

    def frontier(self, problem: Problem, request: PlanRequest, bases: list[int]) -> Frontier:
        """Every budget's plan; bases don't matter."""
        return hull_frontier(self.cost(problem), problem)


def hull_frontier(cost: np.ndarray, problem: Problem) -> Frontier:
    """The frontier of a cost (n, 12): each matrix's cheapest stop, then hull steps by price.

    A matrix without any cost (nothing was measured of it) keeps the most bits that it may have,
    and the frontier's notes name it.

    Raises
    ------
    InputError
        When no group size fills a matrix, or none that its pin allows.
    """
    problem.check_options()
    cost = np.where(problem.allowed & np.isfinite(cost), cost, np.inf)
    unmeasured = np.flatnonzero(~np.isfinite(cost).any(axis=1))
    for i in unmeasured:
        cost[i, np.flatnonzero(problem.allowed[i])[-1]] = 0.0
    steps, start = [], np.zeros(len(cost), dtype=np.int64)
    for i, row in enumerate(cost):
        stops = np.flatnonzero(np.isfinite(row))
        hull = lower_hull(problem.bytes[i], row, stops)
        start[i] = hull[0]
        for smaller, larger in pairwise(hull):
            saved = row[smaller] - row[larger]
            more = problem.bytes[i, larger] - problem.bytes[i, smaller]
            steps.append((-saved / more, i, larger, saved))
    steps.sort(key=lambda step: step[:3])
    moves = build_moves(start, [(i, stop, saved) for _, i, stop, saved in steps], problem.bytes)
    segment = Segment(start, problem.nominal(start), moves)
    notes = _unmeasured_note([problem.matrices[i].name for i in unmeasured])
    return Frontier((segment,), problem.bytes, cost, notes=notes)


def _unmeasured_note(names: list[str]) -> tuple[str, ...]:
    if not names:
        return ()
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return (
        f"Nothing was measured of {names[0]}{more} that this method reads, so the largest setting "
        "is kept there.",
    )


def lower_hull(size: np.ndarray, cost: np.ndarray, stops: np.ndarray) -> list[int]:
    """The stops on the lower convex hull, from the smallest on, each cheaper than the last.

    Prices fall strictly from step to step, so taking all matrices' steps by price takes each
    matrix's own in order.
    """
    hull: list[int] = []
    for stop in sorted(stops, key=lambda j: (size[j], cost[j])):
        if hull and (cost[stop] >= cost[hull[-1]] or size[stop] == size[hull[-1]]):
            continue
        while len(hull) > 1 and _price(size, cost, hull[-2], hull[-1]) <= _price(
            size, cost, hull[-1], stop
        ):
            hull.pop()
        hull.append(int(stop))
    return hull


def _price(size: np.ndarray, cost: np.ndarray, smaller: int, larger: int) -> float:
    return (cost[smaller] - cost[larger]) / (size[larger] - size[smaller])
