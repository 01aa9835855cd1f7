"""MXQ [B]: one configuration for each matrix, the least total weight error within a budget."""

from __future__ import annotations

import numpy as np
import pulp

from lsq_core.errors import LsqError
from lsq_core.plan.problem import TOLERANCE, PlanRequest, Problem

#: Relative gap at which the solver may stop, and seconds it may take.
GAP = 1e-4
TIME_LIMIT = 60


class Mxq:
    """Minimises the summed Frobenius error of the weights, exactly, as an integer program."""

    name = "mxq"
    title = "MXQ"
    metrics = ("weight_error",)
    has_base = False

    def choose(self, problem: Problem, request: PlanRequest, budget: float) -> np.ndarray:
        """The stops (n,) of the optimum within ``budget`` nominal bytes."""
        return solve_knapsack(problem.by_config["weight_error"], problem, budget)


def solve_knapsack(cost: np.ndarray, problem: Problem, budget: float) -> np.ndarray:
    """The multiple-choice knapsack: one stop a matrix, least cost, bytes within the budget.

    ``cost`` is (n, 12); stops with a NaN cost or a group size that doesn't fill are left out.

    Raises
    ------
    LsqError
        When the solver finds no plan within its time limit.
    """
    usable = problem.allowed & np.isfinite(cost)
    # The solver keeps to a bound only within its tolerance: where that let the plan slip over
    # the budget, it is solved again a millionth tighter.
    for limit in (budget, budget * (1 - 1e-6)):
        choice = _solve(cost, usable, problem.bytes / limit)
        if choice is not None and problem.nominal(choice) <= budget * (1 + TOLERANCE):
            return choice
    raise LsqError(
        f"The solver found no plan within {TIME_LIMIT} s for a budget of "
        f"{problem.in_words(budget)}; try a slightly larger one."
    )


def _solve(cost: np.ndarray, usable: np.ndarray, share: np.ndarray) -> np.ndarray | None:
    """One program whose budget is 1 in the unit of ``share`` (n, 12); None when it fails."""
    rows = [np.flatnonzero(row) for row in usable]
    program = pulp.LpProblem("bits", pulp.LpMinimize)
    take = {
        (i, j): pulp.LpVariable(f"x_{i}_{j}", cat=pulp.LpBinary)
        for i, stops in enumerate(rows)
        for j in stops
    }
    program += pulp.lpSum(float(cost[key]) * x for key, x in take.items())
    for i, stops in enumerate(rows):
        program += pulp.lpSum(take[i, j] for j in stops) == 1
    program += pulp.lpSum(float(share[key]) * x for key, x in take.items()) <= 1
    status = program.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=GAP, timeLimit=TIME_LIMIT))
    chosen = {i: j for (i, j), x in take.items() if (x.value() or 0) > 0.5}
    if status != pulp.LpStatusOptimal or len(chosen) != len(rows):
        return None
    return np.array([chosen[i] for i in range(len(rows))])
