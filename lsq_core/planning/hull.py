"""Multiple-choice knapsacks: one configuration per matrix, least total cost within a budget.

The frontier merges, by price, the lower convex hulls of each matrix's (bytes, cost) points
(method §5).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from lsq_core.planning.frontier import Frontier, Segment, build_moves
from lsq_core.planning.problem import Problem


def hull_frontier(cost: np.ndarray, problem: Problem) -> Frontier:
    """Return the frontier for costs (n, options): the smallest plan, then hull steps by price.

    Tied matrices form one item whose cost is the sum of theirs. An item without any measured cost
    gets the highest option that it may have and is mentioned in the frontier's notes.

    Raises
    ------
    InputError
        If no option is allowed for some matrix.
    """
    problem.check_options()
    cost = problem.sum_items(np.where(problem.allowed & np.isfinite(cost), cost, np.inf))
    size, allowed = problem.sum_items(problem.bytes), problem.first_of_items(problem.allowed)
    unmeasured = np.flatnonzero(~np.isfinite(cost).any(axis=1))
    for i in unmeasured:
        cost[i, np.flatnonzero(allowed[i])[-1]] = 0.0
    steps, start = [], np.zeros(len(cost), dtype=np.int64)
    for i, row in enumerate(cost):
        stops = np.flatnonzero(np.isfinite(row))
        hull = lower_hull(size[i], row, stops)
        start[i] = hull[0]
        for smaller, larger in pairwise(hull):
            saved = row[smaller] - row[larger]
            more = size[i, larger] - size[i, smaller]
            steps.append((-saved / more, i, larger, saved))
    steps.sort(key=lambda step: step[:3])
    moves = build_moves(start, [(i, stop, saved) for _, i, stop, saved in steps], size)
    segment = Segment(start, problem.nominal(start[problem.items]), moves)
    first = problem.first_of_items(np.arange(len(problem.matrices)))
    notes = _unmeasured_note([problem.matrices[first[i]].name for i in unmeasured])
    return Frontier((segment,), size, cost, notes=notes, items=problem.items_if_tied)


def _unmeasured_note(names: list[str]) -> tuple[str, ...]:
    if not names:
        return ()
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return (
        f"The scores that this method needs were not measured for {names[0]}{more}, so the largest "
        "configuration is used there.",
    )


def lower_hull(size: np.ndarray, cost: np.ndarray, stops: np.ndarray) -> list[int]:
    """Return the options on the lower convex hull by size, each cheaper than the previous one.

    Prices fall strictly from step to step, so sorting the steps of all matrices by price preserves
    the order of each matrix's own steps.
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
