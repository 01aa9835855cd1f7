"""The exact optimum of a multiple-choice knapsack at one budget, with a proven bound.

The Lagrangian bound fixes most matrices: an option is excluded if no plan that uses it can cost
less than the frontier's. Dynamic programming searches the remaining options over undominated states
within the bound, starting with the matrices nearest to the break (Pisinger's minimal core, EJOR 83,
1995). For language models this takes from milliseconds to a second. If the search grows too large
or takes too long, PuLP's CBC solves what the improved bound leaves open.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from lsq_core.planning.frontier import Frontier, FrontierPoint
from lsq_core.planning.greedy import total
from lsq_core.planning.problem import TOLERANCE

#: Relative gap at which CBC may stop, and the time limit for the entire solve in seconds.
RELATIVE_GAP = 1e-4
TIME_LIMIT = 60
#: Number of states, five bytes each, beyond which the search stops.
MAX_STATES = 40_000_000


@dataclass(frozen=True, eq=False)
class ExactSolution:
    """The outcome of an exact solve: a choice, its cost, and a proven lower bound.

    ``proven`` is False if the time limit was reached; ``reason`` then says so.
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
    gap: float = RELATIVE_GAP,
    time_limit: float = TIME_LIMIT,
    max_states: int = MAX_STATES,
) -> ExactSolution:
    """Find the optimum within a budget in nominal bytes.

    The plan is optimal up to rounding if the search completes. If it grows too large or slow, CBC
    takes over, and its plan is within ``gap`` if it completes. The returned choice is over
    matrices, (n,), although the search is over items.
    """
    solution = _solve_items(frontier, budget, gap, time_limit, max_states)
    return replace(solution, choice=frontier.expand(solution.choice))


def _solve_items(
    frontier: Frontier, budget: float, gap: float, time_limit: float, max_states: int
) -> ExactSolution:
    start_time = time.monotonic()
    point = frontier.at_items(budget)
    choice, finished = _Search(frontier, point, budget, max_states).run(start_time + time_limit / 2)
    objective = frontier.objective(choice)
    if finished:
        bound = max(point.lower_bound, objective - 1e-9 * abs(objective))
        return ExactSolution(choice, objective, min(bound, objective), True)
    left = time_limit - (time.monotonic() - start_time)
    return _solve_with_cbc(frontier, point, choice, budget, gap, left, time_limit)


def _reduced_costs(frontier: Frontier, point: FrontierPoint) -> np.ndarray:
    """Return each option's ``cost + price·bytes`` minus its matrix's minimum, (n, options), ≥ 0.

    A plan that uses an option costs at least the Lagrangian bound plus this.
    """
    relaxed = frontier.cost + point.segment.price(point.taken) * frontier.nominal
    return relaxed - relaxed.min(axis=1, keepdims=True)


class _Search:
    """Dynamic programming over changes from the choice after the frontier's moves.

    A state is the bytes and cost added so far. For each matrix searched, ``trace`` stores each
    state's parent and the option that led to it, so the best choice can be reconstructed.
    """

    def __init__(
        self, frontier: Frontier, point: FrontierPoint, budget: float, max_states: int
    ) -> None:
        segment = point.segment
        self.start = segment.after(point.taken)
        rows = np.arange(len(self.start))
        self.extra_bytes = frontier.nominal - frontier.nominal[rows, self.start][:, None]
        self.extra_cost = frontier.cost - frontier.cost[rows, self.start][:, None]
        self.reduced = _reduced_costs(frontier, point)
        self.reduced[rows, self.start] = np.inf  # staying is no change
        self.price = segment.price(point.taken)
        self.room = budget * (1 + TOLERANCE) - total(frontier.nominal, self.start)
        self.best = point.objective - frontier.objective(self.start)
        self.point, self.max_states = point.choice, max_states
        self.trace: list[tuple[int, np.ndarray, np.ndarray]] = []

    def run(self, deadline: float) -> tuple[np.ndarray, bool]:
        """Return the best choice found and whether the search completed."""
        size, cost = np.zeros(1), np.zeros(1)
        min_reduced, best_state, num_states = self.reduced.min(axis=1), None, 0
        for matrix in self._order():
            if min_reduced[matrix] >= self._slack:
                continue
            if time.monotonic() > deadline or num_states > self.max_states:
                return self._backtrack(best_state), False
            size, cost = self._extend(int(matrix), size, cost)
            num_states += len(size)
            fits = int(np.searchsorted(size, self.room, side="right")) - 1
            if fits >= 0 and cost[fits] < self.best:
                self.best, best_state = float(cost[fits]), (len(self.trace) - 1, fits)
            if len(size) == 0:
                break
        return self._backtrack(best_state), True

    def _order(self) -> np.ndarray:
        """Sort matrices by least reduced cost per byte changed, nearest to the break first."""
        changed = np.where(self.extra_bytes == 0, 1.0, np.abs(self.extra_bytes))
        return np.argsort((self.reduced / changed).min(axis=1), kind="stable")

    @property
    def _slack(self) -> float:
        """The gap between the best plan so far and the bound."""
        return self.best + self.price * self.room

    def _extend(
        self, matrix: int, size: np.ndarray, cost: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Extend states by one matrix; return them by size, each cheaper than all smaller ones."""
        stops = np.flatnonzero(self.reduced[matrix] < self._slack)
        options = np.concatenate([[self.start[matrix]], stops])
        sizes = (size[None, :] + self.extra_bytes[matrix, options][:, None]).ravel()
        costs = (cost[None, :] + self.extra_cost[matrix, options][:, None]).ravel()
        selected = np.flatnonzero(costs + self.price * (sizes - self.room) < self.best)
        selected = selected[np.lexsort((costs[selected], sizes[selected]))]
        cheapest = np.minimum.accumulate(costs[selected])
        selected = selected[np.r_[True, costs[selected][1:] < cheapest[:-1]][: len(selected)]]
        parent, option = (selected % len(size)).astype(np.int32), selected // len(size)
        self.trace.append((matrix, parent, options[option].astype(np.int8)))
        return sizes[selected], costs[selected]

    def _backtrack(self, best_state: tuple[int, int] | None) -> np.ndarray:
        if best_state is None:
            return self.point
        choice, (last, state) = self.start.copy(), best_state
        for matrix, parent, stop in reversed(self.trace[: last + 1]):
            choice[matrix] = stop[state]
            state = parent[state]
        return choice


def _solve_with_cbc(
    frontier: Frontier,
    point: FrontierPoint,
    best: np.ndarray,
    budget: float,
    gap: float,
    seconds: float,
    time_limit: float,
) -> ExactSolution:
    """Solve what the search left open as an integer program; ``best`` is the best choice so far."""
    import pulp

    usable = _open_stops(frontier, point, best)
    # CBC satisfies a constraint only within its tolerance. If that puts the plan over the budget,
    # solve again with a budget tighter by a factor of 1e-6; only the first bound is valid.
    first = _solve(frontier, usable, budget, gap, seconds)
    choice, status = first
    if choice is not None and total(frontier.nominal, choice) > budget * (1 + TOLERANCE):
        choice, _ = _solve(frontier, usable, budget * (1 - 1e-6), gap, seconds)
    if choice is None or frontier.objective(choice) > frontier.objective(best):
        choice = best
    objective = frontier.objective(choice)
    # CBC also reports an optimum when it runs out of time; the solution status distinguishes them.
    proven = status == pulp.LpSolutionOptimal and first[0] is not None
    bound = point.lower_bound
    if proven:
        bound = max(bound, frontier.objective(first[0]) * (1 - gap))
    reason = "" if proven else f"the solver was stopped after {time_limit:g} s"
    return ExactSolution(choice, objective, min(bound, objective), proven, reason)


def _open_stops(frontier: Frontier, point: FrontierPoint, best: np.ndarray) -> np.ndarray:
    """Return which options ``best`` or a cheaper plan may use, bool (n, options)."""
    objective = frontier.objective(best)
    slack = 1e-9 * abs(objective)
    usable = point.lower_bound + _reduced_costs(frontier, point) <= objective + slack
    usable[np.arange(len(best)), best] = True
    return usable & np.isfinite(frontier.cost)


def _solve(
    frontier: Frontier, usable: np.ndarray, budget: float, gap: float, seconds: float
) -> tuple[np.ndarray | None, int]:
    """Solve the integer program, scaled to a budget of 1.

    Returns the choice, None if none was found, and PuLP's solution status.
    """
    import pulp

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
    if not take:
        return np.array([decided[i] for i in range(len(rows))]), pulp.LpSolutionOptimal
    scale = max(abs(float(frontier.cost[key])) for key in take) or 1.0
    program += pulp.lpSum(float(frontier.cost[key]) / scale * x for key, x in take.items())
    for i, stops in enumerate(rows):
        if i not in decided:
            program += pulp.lpSum(take[i, j] for j in stops) == 1
    program += pulp.lpSum(float(frontier.nominal[k]) / left * x for k, x in take.items()) <= 1
    solver = pulp.PULP_CBC_CMD(msg=False, gapRel=gap, timeLimit=max(seconds, 1))
    program.solve(solver)
    chosen = decided | {i: j for (i, j), x in take.items() if (x.value() or 0) > 0.5}
    if len(chosen) != len(rows):
        return None, program.sol_status
    return np.array([chosen[i] for i in range(len(rows))]), program.sol_status
