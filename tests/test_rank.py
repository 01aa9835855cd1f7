"""Ranking all methods within a budget, with the same plans, predictions and runs as elsewhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lsq_core.bits import LADDER
from lsq_core.errors import InputError
from lsq_core.evaluation.prediction import fit, is_comparable
from lsq_core.planning.constraints import restrict
from lsq_core.planning.frontier import Frontier
from lsq_core.planning.make import make_frontier, make_plan
from lsq_core.planning.methods import PLANNERS
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.stages.rank import (
    RankedMethod,
    measured_runs,
    rank_methods,
    rank_model_methods,
    requests_within,
)
from tests.test_plan import problem
from tests.test_predict import make_points, uniform

SPIKY = problem(spikes={7: 9.0, 20: 30.0})
_ERROR = SPIKY.by_config["weight_error"]
_BOTH = dict.fromkeys(("weight_error", "sensitivity", "sensitivity_module"), _ERROR)
SPIKY = replace(SPIKY, by_config=_BOTH)
WITH_KL = replace(SPIKY, by_config=_BOTH | {"expected_kl": _ERROR**2})


def rank(problem_, budget: str, predictor="too few runs", runs=None, **fields):
    requests = requests_within(PlanRequest("uniform", budget=budget, **fields))

    def frontier_of(request: PlanRequest) -> Frontier:
        return make_frontier(restrict(problem_, request), request)

    return rank_methods(problem_, requests, "8bit", predictor, runs or {}, frontier_of)


@pytest.mark.parametrize("budget", ["3.3bpp", "450KiB", "520KiB"])
def test_ranked_plans_are_those_of_make_plan(budget):
    ranking = rank(SPIKY, budget)
    assert {"uniform", "sensiboost", "mxq"} <= {each.method for each in ranking.methods}
    for each in ranking.methods:
        plan = make_plan(SPIKY, PlanRequest(each.method, budget=budget))
        assert each.planned_bytes == plan.planned_bytes
        assert each.bits_per_param == pytest.approx(plan.bits_per_param)


def test_methods_without_their_metric_are_left_out_with_the_reason():
    ranking = rank(SPIKY, "3.3bpp")
    assert set(ranking.left_out) | {each.method for each in ranking.methods} == set(PLANNERS)
    assert "loss impact" in ranking.left_out["loss-aware"].lower()
    assert (ranking.basis, ranking.reason) == ("", "too few runs")
    assert ranking.leader_over("uniform") is None


def test_expected_kl_ranks_where_nothing_is_predicted():
    ranking = rank(WITH_KL, "3.3bpp")
    costs = [each.expected_kl for each in ranking.methods]
    assert ranking.basis == "expected_kl"
    assert costs == sorted(costs)
    best = ranking.methods[0]
    assert best.method != "uniform"
    assert all(each.predicted is None for each in ranking.methods)


def test_predicted_perplexity_ranks_before_expected_kl():
    points = make_points(SPIKY, uniform(SPIKY, *range(9)))
    ranking = rank(SPIKY, "3.3bpp", fit(points))
    predicted = [each.predicted[0] for each in ranking.methods]
    assert ranking.basis == "perplexity"
    assert predicted == sorted(predicted)


def test_leader_is_clearly_better_and_no_ablation():
    def ranked(method: str, *band: float) -> RankedMethod:
        return RankedMethod(method, 3.3, 1, None, band)

    ablation, mxq, boost = (
        ranked("sensiboost-ablation", 10, 9, 11),
        ranked("mxq", 12, 11, 13),
        ranked("sensiboost", 15, 14, 16),
    )
    ranking = replace(rank(SPIKY, "3.3bpp"), methods=(ablation, mxq, boost), basis="perplexity")
    assert ranking.leader_over("sensiboost") is mxq
    overlapping = replace(boost, predicted=(15, 12.5, 18))
    assert replace(ranking, methods=(mxq, overlapping)).leader_over("sensiboost") is None
    assert ranking.leader_over("mxq") is None
    assert ranking.leader_over("kl-aware") is None


@pytest.mark.parametrize(
    ("a", "b", "comparable"),
    [
        ((20.0, 19.8, 20.2), (20.1, 19.9, 20.3), True),  # both narrow
        ((20.0, 15.0, 26.0), (47.0, 37.0, 66.0), True),  # wide but disjoint
        ((20.0, 15.0, 38.0), (47.0, 37.0, 66.0), False),  # wide and overlapping
        ((47.0, 37.0, 66.0), (20.0, 15.0, 26.0), True),
    ],
)
def test_predictions_compare_where_bands_are_apart_or_narrow(a, b, comparable):
    assert is_comparable(a, b) == comparable


def run_row(run: str, method: str, bits: float, perplexity: float) -> dict:
    return {
        "run": run, "method": method, "bits_per_param": bits, "perplexity": perplexity,
        "request": "{}", "quantizer": "hqq", "axis": 1, "metadata": "8bit", "corpus": "stdlib",
        "protocol": "strided-512/256", "corpus_sha256": "x", "tokens": 4096,
    }  # fmt: skip


def test_measured_figure_is_of_the_plan_itself_else_of_a_near_run():
    plan = make_plan(SPIKY, PlanRequest("mxq", budget="3.3bpp"))
    own = {m.name: c.name for m, c in plan.choice.items()}
    other = dict.fromkeys(own, LADDER[3].name)
    runs = pd.DataFrame(
        [
            run_row("same", "kl-aware", plan.bits_per_param, 20.0),
            run_row("near", "mxq", 1.02 * plan.bits_per_param, 21.0),
            run_row("far", "sensi-knapsack", 1.2 * plan.bits_per_param, 22.0),
            run_row("unknown", "mxq", plan.bits_per_param, 23.0),
        ]
    )
    configs = {"same": own, "near": other, "far": other}
    known = measured_runs(runs, configs, ProfileSettings(), "stdlib")
    assert set(known) == {"same", "near", "far"}
    by_method = {each.method: each.measured for each in rank(SPIKY, "3.3bpp", runs=known).methods}
    assert (by_method["mxq"].run, by_method["mxq"].same_plan) == ("same", True)
    del known["same"]
    by_method = {each.method: each.measured for each in rank(SPIKY, "3.3bpp", runs=known).methods}
    assert (by_method["mxq"].run, by_method["mxq"].same_plan) == ("near", False)
    assert by_method["sensi-knapsack"] is None
    pinned = rank(SPIKY, "3.3bpp", runs=known, pins=("*.layers.3.*=b4g64",)).methods
    assert all(each.measured is None for each in pinned), "a free plan's run is of another plan"
    assert measured_runs(runs, configs, ProfileSettings(), "wikitext2") == {}


def test_ranking_json_has_every_figure():
    content = rank(WITH_KL, "520KiB").to_json()
    assert [row["method"] for row in content["methods"]] != []
    assert all(row["planned_bytes"] <= 520 * 1024 for row in content["methods"])
    assert np.isfinite([row["expected_kl"] for row in content["methods"]]).all()


def test_methods_that_take_more_than_the_budget_are_left_out():
    ranking = rank(SPIKY, "3.3bpp", base="4.13")
    assert ranking.left_out["sensiboost"] == "needs at least 4.13 bits"
    assert "mxq" in {each.method for each in ranking.methods}


def test_ranking_within_a_served_budget_ties_every_method():
    ranking = rank(SPIKY, "5bpp", serve="vllm")
    for each in ranking.methods:
        request = PlanRequest(each.method, budget="5bpp", serve="vllm")
        assert each.planned_bytes == make_plan(SPIKY, request).planned_bytes


def test_ranking_without_a_budget_raises():
    with pytest.raises(InputError, match="budget"):
        rank_model_methods(None, PlanRequest("mxq"), ProfileSettings())
