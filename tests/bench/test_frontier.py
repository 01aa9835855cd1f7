"""The frontier at the size of Llama-2-70B: 560 matrices at twelve configurations.

``pytest -s tests/bench`` prints the figures. Processor time is measured, so that other load on the
machine does not count. The limits are the project's own and are scaled up on a slower machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from lsq_core.planning.exact import solve_exactly
from lsq_core.planning.make import make_frontier
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from tests.test_plan import needs_reference, published_problem

#: Number of budgets at which the frontier is compared with the optimum.
COMPARED = 40


def time_call(call: Callable) -> tuple[object, float]:
    """Return the result of a call and the processor time it took in milliseconds."""
    started = time.process_time()
    result = call()
    return result, 1000 * (time.process_time() - started)


def build_frontier(problem: Problem) -> object:
    """Build the frontier and plan for a first budget."""
    frontier = make_frontier(problem, PlanRequest("mxq"))
    frontier.at(3 * problem.total / 8)
    return frontier


@pytest.mark.bench
@needs_reference
def test_frontier_70b_within_time_and_gap_limits(slowness):
    problem = published_problem("Llama-2-70b-hf")
    assert len(problem.matrices) == 560
    built = [time_call(lambda: build_frontier(problem)) for _ in range(7)]
    frontier, build_ms = built[0][0], [ms for _, ms in built]
    random = np.random.default_rng(0)
    budgets = random.uniform(2.2, 8, 1000) * problem.total / 8
    answers, query_ms = zip(*(time_call(lambda b=b: frontier.at(b)) for b in budgets), strict=True)
    certified = [1 - a.lower_bound / a.objective for a in answers]
    # Half of the budgets are near the largest, where one matrix matters most and gaps are widest.
    hard_budgets = np.r_[
        random.uniform(2.2, 8, COMPARED // 2), random.uniform(7.5, 8, COMPARED // 2)
    ]
    gaps, exact_ms = [], []
    for budget in hard_budgets * problem.total / 8:
        answer = frontier.at(budget)
        exact, ms = time_call(lambda b=budget: solve_exactly(frontier, b))
        assert exact.proven
        assert answer.lower_bound <= exact.objective * (1 + 1e-9)
        gaps.append(answer.objective / exact.objective - 1)
        exact_ms.append(ms)
    print(
        f"\nfrontier of 560 × 12: built in {np.median(build_ms):.0f} ms"
        f" ({min(build_ms):.0f}–{max(build_ms):.0f} of 7)"
        f"\nplan for a budget: {np.median(query_ms):.2f} ms median,"
        f" {np.percentile(query_ms, 99):.2f} ms p99 of 1,000"
        f"\ncertified gap: {np.median(certified):.4%} median, {max(certified):.3%} worst of 1,000"
        f"\ngap to the optimum: {np.median(gaps):.4%} median, {max(gaps):.3%} worst of {COMPARED}"
        f"\nexact: {np.median(exact_ms):.0f} ms median, {max(exact_ms):.0f} ms worst of {COMPARED}"
    )
    assert np.median(build_ms) <= 150 * slowness
    assert np.median(query_ms) <= slowness
    assert np.percentile(query_ms, 99) <= 5 * slowness
    assert max(gaps) <= 0.005
