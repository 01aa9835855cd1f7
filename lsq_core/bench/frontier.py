"""A plan for any budget, at the size of Llama-2-70B: 560 matrices at twelve configurations.

The weight errors are synthetic, so that every machine solves the same problem;
``tests/bench/test_frontier.py`` compares on the published ones.
"""

from __future__ import annotations

import time

import numpy as np
import pulp

from lsq_core.bench import Pair, Row, time_interleaved
from lsq_core.bits import LADDER
from lsq_core.model.info import Matrix
from lsq_core.planning.exact import RELATIVE_GAP, solve_exactly
from lsq_core.planning.frontier import Frontier
from lsq_core.planning.make import make_frontier
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest

#: Shapes (out, in) of the modules in a decoder block of Llama-2-70B, and its number of blocks.
SHAPES = {
    "self_attn.q_proj": (8192, 8192),
    "self_attn.k_proj": (1024, 8192),
    "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192),
    "mlp.gate_proj": (28672, 8192),
    "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672),
}
BLOCKS = 80
#: The budget that both sides plan for, in bits per parameter.
BUDGET = 3.2
#: Number of random budgets for the worst gap, and for the time per plan.
GAP_BUDGETS, TIMED_BUDGETS = 10, 1000
#: Number of our plans per timing: one alone is too short to time.
PLANS_PER_TIMING = 100


def frontier(repeats: int) -> Row:
    """Compare MXQ plans for a budget from the frontier with those of CBC through PuLP."""
    problem = make_problem()
    start_time = time.process_time()
    plans = make_frontier(problem, PlanRequest("mxq"))
    plans.at(BUDGET * problem.total / 8)
    build_ms = 1000 * (time.process_time() - start_time)
    budget = BUDGET * problem.total / 8
    pair = time_interleaved(
        lambda: [plans.at(budget) for _ in range(PLANS_PER_TIMING)],
        lambda: solve_with_cbc(plans, budget),
        repeats,
    )
    pair = Pair(pair.ours / PLANS_PER_TIMING, pair.theirs)
    random = np.random.default_rng(0)
    query_ms = [
        _milliseconds(plans, b) for b in random.uniform(2.2, 8, TIMED_BUDGETS) * problem.total / 8
    ]
    gaps = [_gap(plans, b) for b in random.uniform(2.2, 8, GAP_BUDGETS) * problem.total / 8]
    return Row(
        id="frontier",
        what="plan for a budget, 560 matrices × 12",
        ours="from the frontier, built once",
        theirs=f"CBC through PuLP, gap {RELATIVE_GAP:g}",
        **pair.figures,
        processor_s=float(np.median(query_ms)) / 1000,
        error=max(gaps),
        error_limit=0.005,
        error_is=f"gap to the optimum, worst of {GAP_BUDGETS} budgets",
        most_s=0.001,
        details={
            "build_ms": build_ms,
            "query_ms_median": float(np.median(query_ms)),
            "query_ms_p99": float(np.percentile(query_ms, 99)),
            "gap_median": float(np.median(gaps)),
        },
    )


def solve_with_cbc(frontier: Frontier, budget: float) -> np.ndarray:
    """Solve the knapsack as the integer program that defines it; return the choice (matrices,)."""
    cost, size = frontier.cost, frontier.nominal
    matrices, stops = range(len(cost)), range(len(LADDER))
    program = pulp.LpProblem("mxq", pulp.LpMinimize)
    take = pulp.LpVariable.dicts("take", (matrices, stops), cat=pulp.LpBinary)
    program += pulp.lpSum(cost[i, j] * take[i][j] for i in matrices for j in stops)
    for i in matrices:
        program += pulp.lpSum(take[i].values()) == 1
    program += pulp.lpSum(size[i, j] * take[i][j] for i in matrices for j in stops) <= budget
    program.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=RELATIVE_GAP))
    return np.array([max(stops, key=lambda j: take[i][j].value()) for i in matrices])


def _milliseconds(frontier: Frontier, budget: float) -> float:
    start_time = time.process_time()
    frontier.at(budget)
    return 1000 * (time.process_time() - start_time)


def _gap(frontier: Frontier, budget: float) -> float:
    """Return the relative excess of the frontier's objective over the optimum."""
    return frontier.at(budget).objective / solve_exactly(frontier, budget).objective - 1


def make_problem(seed: int = 0) -> Problem:
    """Make a problem with the weight errors of normal weights, some wider, rounded to nearest."""
    random = np.random.default_rng(seed)
    matrices = tuple(
        Matrix(f"model.layers.{layer}.{kind}", layer, kind, *shape)
        for layer in range(BLOCKS)
        for kind, shape in SHAPES.items()
    )
    bits, groups = np.array([[config.bits, config.group_size] for config in LADDER]).T
    # n normal weights span about 2·√(2 ln n) deviations; the error is the step over √12.
    relative = 2 * np.sqrt(2 * np.log(groups)) / (2.0**bits - 1) / np.sqrt(12)
    sizes = np.sqrt([matrix.numel for matrix in matrices])
    widths = 0.02 * random.lognormal(0, 0.3, len(matrices))
    errors = np.outer(widths * sizes, relative)
    return Problem(matrices, {}, {"weight_error": errors * random.lognormal(0, 0.03, errors.shape)})
