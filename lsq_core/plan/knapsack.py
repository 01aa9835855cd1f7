"""Multiple-choice knapsacks: one stop a matrix, least total cost within a budget.

The whole frontier comes from the lower convex hulls of each matrix's (bytes, cost) points, merged
by price; the exact optimum of one budget from an integer program, most of whose variables the
Lagrangian bound decides beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pulp

from lsq_core.errors import InputError
from lsq_core.plan.frontier import Answer, Frontier, Segment, moves_from
from lsq_core.plan.problem import TOLERANCE, PlanRequest, Problem

#: Relative gap at which the exact solver may stop, and seconds it may take.
GAP = 1e-4
TIME_LIMIT = 60


class Knapsack:
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

    Raises
    ------
    InputError
        When a matrix has no stop to choose.
    """
    cost = np.where(problem.allowed & np.isfinite(cost), cost, np.inf)
    steps, start = [], np.zeros(len(cost), dtype=np.int64)
    for i, row in enumerate(cost):
        stops = np.flatnonzero(np.isfinite(row))
        if len(stops) == 0:
            raise InputError(f"{problem.matrices[i].name} has no configuration to choose from.")
        hull = lower_hull(problem.bytes[i], row, stops)
        start[i] = hull[0]
        for here, there in pairwise(hull):
            saved = row[here] - row[there]
            more = problem.bytes[i, there] - problem.bytes[i, here]
            steps.append((-saved / more, i, there, saved))
    steps.sort(key=lambda step: step[:3])
    moves = moves_from(start, [(i, stop, saved) for _, i, stop, saved in steps], problem.bytes)
    segment = Segment(start, problem.nominal(start), moves)
    return Frontier((segment,), problem.bytes, cost)


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


def _price(size: np.ndarray, cost: np.ndarray, here: int, there: int) -> float:
    return (cost[here] - cost[there]) / (size[there] - size[here])


@dataclass(frozen=True, eq=False)
class Exact:
    """The outcome of an exact solve: a choice, its cost, and a bound that is proven.

    ``proven`` is False when the time ran out; then ``reason`` says so.
    """

    choice: np.ndarray
    objective: float
    lower_bound: float
    proven: bool
    reason: str = ""


def solve_exactly(
    frontier: Frontier,
    budget: float,
    *,
    gap: float = GAP,
    time_limit: float = TIME_LIMIT,
) -> Exact:
    """The optimum within a budget, by an integer program over what is still open.

    A stop is open when the best plan that uses it may, by the Lagrangian bound, cost less than the
    plan that the frontier already gives; on real models that leaves a few in a hundred.
    """
    found = frontier.at(budget)
    still_open = _open_stops(frontier, found, budget)
    if still_open.sum() == len(found.choice):
        return Exact(found.choice, found.objective, found.objective, True)
    # CBC keeps to a bound only within its tolerance: where that let the plan slip over the
    # budget, it is solved again a millionth tighter, and only the bound of the first holds.
    first = _solve(frontier, still_open, budget, gap, time_limit)
    choice, status = first
    if choice is not None and _bytes(frontier, choice) > budget * (1 + TOLERANCE):
        choice, _ = _solve(frontier, still_open, budget * (1 - 1e-6), gap, time_limit)
    if choice is None or frontier.objective(choice) > found.objective:
        choice = found.choice
    objective = frontier.objective(choice)
    proven = status == pulp.LpSolutionOptimal and first[0] is not None
    bound = frontier.objective(first[0]) * (1 - gap) if proven else -np.inf
    bound = max(bound, found.lower_bound) if proven else found.lower_bound
    reason = "" if proven else f"the solver was stopped after {time_limit:g} s"
    return Exact(choice, objective, min(bound, objective), proven, reason)


def _bytes(frontier: Frontier, choice: np.ndarray) -> float:
    return float(frontier.nominal[np.arange(len(choice)), choice].sum())


def _open_stops(frontier: Frontier, found: Answer, budget: float) -> np.ndarray:
    """Stops (n, 12) that a plan cheaper than the one found may use, and that plan's own.

    With ``λ`` the price at the budget, a plan that uses stop ``j`` for matrix ``i`` costs at least
    the bound plus how far ``c + λ·bytes`` of that stop lies above the matrix's least.
    """
    segment = found.segment
    if found.taken == len(segment.moves):
        price = 0.0
    else:
        move = segment.moves[found.taken]
        before = segment.moves[found.taken - 1].bytes_after if found.taken else segment.start_bytes
        price = move.worth / (move.bytes_after - before)
    relaxed = frontier.cost + price * frontier.nominal
    least = relaxed.min(axis=1, keepdims=True)
    bound = float(least.sum()) - price * budget
    slack = 1e-9 * abs(found.objective)
    usable = bound + (relaxed - least) <= found.objective + slack
    usable[np.arange(len(found.choice)), found.choice] = True
    return usable & np.isfinite(frontier.cost)


def _solve(
    frontier: Frontier, usable: np.ndarray, budget: float, gap: float, time_limit: float
) -> tuple[np.ndarray | None, int]:
    """One integer program in which the budget is 1; the choice, or None, and PuLP's status."""
    rows = [[int(j) for j in np.flatnonzero(row)] for row in usable]
    decided = {i: stops[0] for i, stops in enumerate(rows) if len(stops) == 1}
    left = budget - sum(frontier.nominal[i, j] for i, j in decided.items())
    program = pulp.LpProblem("bits", pulp.LpMinimize)
    take = {
        (i, j): pulp.LpVariable(f"x_{i}_{j}", cat=pulp.LpBinary)
        for i, stops in enumerate(rows)
        if i not in decided
        for j in stops
    }
    scale = max(abs(float(frontier.cost[key])) for key in take) or 1.0
    program += pulp.lpSum(float(frontier.cost[key]) / scale * x for key, x in take.items())
    for i, stops in enumerate(rows):
        if i not in decided:
            program += pulp.lpSum(take[i, j] for j in stops) == 1
    program += pulp.lpSum(float(frontier.nominal[k]) / left * x for k, x in take.items()) <= 1
    solver = pulp.PULP_CBC_CMD(msg=False, gapRel=gap, timeLimit=time_limit)
    program.solve(solver)
    chosen = decided | {i: j for (i, j), x in take.items() if (x.value() or 0) > 0.5}
    if len(chosen) != len(rows):
        return None, program.sol_status
    return np.array([chosen[i] for i in range(len(rows))]), program.sol_status
