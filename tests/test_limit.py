"""Budgets in bytes bound the planned bytes of every method's plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lsq_core.bits import Budget
from lsq_core.errors import InputError
from lsq_core.model.info import Matrix
from lsq_core.planning.constraints import restrict
from lsq_core.planning.limit import nominal_limit
from lsq_core.planning.make import make_frontier, make_plan
from lsq_core.planning.methods import PLANNERS
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.stages.plan import budget_excess, with_quantizer
from tests.test_plan import problem

SPIKY = problem(spikes={7: 9.0, 20: 30.0})
METHODS = ["uniform", "sensiboost", "kurtboost-ablation", "mxq"]


@settings(max_examples=25, deadline=None)
@example("uniform", "fp16", 1.0, None, ("*.layers.3.*=b8g64",))
@given(
    st.sampled_from(METHODS),
    st.sampled_from(["8bit", "fp16"]),
    st.floats(0.0, 1.0),
    st.sampled_from([None, "3.13"]),
    st.sampled_from([(), ("*.layers.3.*=b8g64",)]),
)
def test_plan_within_bytes(method, metadata, share, base, pins):
    """A plan is within the budget, and MXQ spends nearly all of it."""
    low, high = SPIKY.feasible_planned(metadata)
    size = int(low + share * (high - low))
    base = base if PLANNERS[method].has_base else None
    request = PlanRequest(method, base=base, budget=f"{size}B", pins=pins)
    try:
        plan = make_plan(SPIKY, request, metadata=metadata)
    except InputError:  # below the smallest plan with this base or pin, or above the largest
        bits = 3.13 if base or pins else 2.2
        _, largest = restrict(SPIKY, request).feasible_planned(metadata)
        assert size > largest or size < bits / 2.127 * 1.2 * low
        return
    assert plan.planned_bytes <= size
    if method == "mxq":
        assert plan.planned_bytes >= 0.98 * min(size, high)


@pytest.mark.parametrize("method", METHODS)
def test_limit_is_the_largest_that_fits(method):
    """A slightly higher limit gives a plan that is too large, or the same one."""
    frontier = make_frontier(SPIKY, PlanRequest(method))
    stored, rows = np.array(SPIKY.planned("8bit")), np.arange(len(SPIKY.matrices))
    low, high = SPIKY.feasible_planned("8bit")
    for size in np.linspace(low, high, 50).astype(int):
        limit = nominal_limit(frontier, SPIKY, Budget("x", planned_bytes=int(size)), "8bit")
        fitting = int(stored[rows, frontier.at(limit).choice].sum())
        assert fitting <= size
        more = int(stored[rows, frontier.at(limit + 0.001 * high).choice].sum())
        assert more > size or more == fitting


def test_budget_a_few_bytes_below_a_large_plan():
    """For plans of gigabytes, a shortfall of one byte is within the limit's tolerance."""
    shape = {"out_features": 14336, "in_features": 4096}
    matrices = tuple(Matrix(f"model.layers.{i}.up", i, "up", **shape) for i in range(160))
    large = replace(problem(80), matrices=matrices)
    request = PlanRequest("mxq", budget="3.3bpp")
    stored = make_plan(large, request).planned_bytes
    for size in (stored - 1, stored - 3):
        assert make_plan(large, replace(request, budget=f"{size}B")).planned_bytes <= size
    exact = replace(request, budget=f"{stored - 1}B", exact=True)
    assert make_plan(large, exact).planned_bytes < stored


@pytest.mark.parametrize("metadata", ["8bit", "fp16"])
def test_what_remains_of_a_budget_is_of_the_bytes_that_it_bounds(metadata):
    size = int(0.8 * SPIKY.feasible_planned(metadata)[1])
    request = PlanRequest("sensiboost", base="3.13", budget=f"{size}B")
    plan = make_plan(SPIKY, request, metadata=metadata)
    left = 8 * (size - plan.planned_bytes) / SPIKY.total
    assert any(note.startswith(f"{left:.3f} bpp") for note in plan.notes)


def test_exact_plan_within_bytes():
    size = int(SPIKY.total * 3.3 / 8)
    request = PlanRequest("mxq", budget=f"{size}B", exact=True)
    plan = make_plan(SPIKY, request)
    assert plan.planned_bytes <= size
    assert plan.objective <= make_plan(SPIKY, replace(request, exact=False)).objective


def test_base_does_not_fit_within_bytes():
    size = int(SPIKY.total * 3.2 / 8)
    with pytest.raises(InputError, match="is below the smallest plan"):
        make_plan(SPIKY, PlanRequest("uniform", base="4.13", budget=f"{size}B"))


def test_quantizer_that_stores_more_than_the_bytes_is_refused():
    """NF4 stores a 32-bit scale per 64 weights, which does not fit in 4.25 bits per weight."""
    size = int(SPIKY.total * 4.3 / 8)
    plan = make_plan(SPIKY, PlanRequest("uniform", budget=f"{size}B"))
    assert "nf4" not in plan.quantizer
    assert budget_excess(plan, "hqq") == budget_excess(plan, "rtn") == ""
    with pytest.raises(InputError, match="NF4"):
        with_quantizer(plan, "nf4", ProfileSettings())
    in_bits = make_plan(SPIKY, PlanRequest("uniform", budget="4.3bpp"))
    assert budget_excess(in_bits, "nf4") == ""
