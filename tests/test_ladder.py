"""The extended ladder next to the papers': plans, profiles, keys, and what must not change."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsq_core.bits import (
    EXTENDED,
    EXTENDED_LADDER,
    LADDER,
    PAPER,
    Budget,
    QuantConfig,
    find_stop,
    stop_index,
)
from lsq_core.charts import config_color
from lsq_core.cli.parser import build_parser
from lsq_core.errors import InputError
from lsq_core.exports.base import Format
from lsq_core.exports.registry import PLAN_TARGETS
from lsq_core.jobs import arguments
from lsq_core.model.info import Matrix
from lsq_core.planning.exact import solve_exactly
from lsq_core.planning.make import make_frontier, make_plan
from lsq_core.planning.methods import PLANNERS, ladder_of
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import PUBLISHED_SETTINGS, ProfileSettings
from lsq_core.quantization.registry import QUANTIZERS, incompatibility_reason, planned_bytes
from lsq_core.results.compare import add_labels
from lsq_core.session import Session
from lsq_core.stages.plan import budget_excess, build_problem
from lsq_core.stages.predict import predict_plan
from lsq_core.store.store import Store
from lsq_core.sweep import baselines, requests
from lsq_core.ui.plan.budget import within_reach
from tests.conftest import save_random_model

TYPES = ("self_attn.q_proj", "mlp.down_proj")
SCORES = ("sensitivity", "sensitivity_module", "kurtosis", "loss_impact")
COSTS = ("weight_error", "sensitivity_module", "expected_kl")
ON_ONE_LADDER = [name for name, planner in PLANNERS.items() if EXTENDED not in planner.ladders]


def problem(layers: int = 32, seed: int = 17, ladder: tuple[QuantConfig, ...] = LADDER) -> Problem:
    """Return a problem with two modules per layer, random scores, and two outliers in 32 layers."""
    random = np.random.default_rng(seed)
    matrices = tuple(
        Matrix(f"model.layers.{i}.{kind}", i, kind, 128, 128 * (1 + j))
        for i in range(layers)
        for j, kind in enumerate(TYPES)
    )
    base = np.exp(random.standard_normal(2 * layers))
    if layers == 32:
        base[[20, 41]] *= 30
    bits = np.array([c.nominal_bits for c in ladder])
    noise = np.exp(0.2 * random.standard_normal((len(matrices), len(ladder))))
    error = base[:, None] * 2.0**-bits * noise
    tables = dict.fromkeys(COSTS, error)
    return Problem(matrices, dict.fromkeys(SCORES, base), tables, options=ladder)


# --- the ladders ----------------------------------------------------------------------------


def test_extended_ladder_holds_the_papers_and_rises():
    assert set(LADDER) < set(EXTENDED_LADDER)
    assert sorted({c.bits for c in EXTENDED_LADDER} - {c.bits for c in LADDER}) == [1, 5, 6]
    bits = [c.nominal_bits for c in EXTENDED_LADDER]
    assert bits == sorted(bits)
    names = [c.stop_name for c in EXTENDED_LADDER]
    assert names[:3] == ["1.13", "1.25", "1.51"]
    assert names[-9:-3] == ["5.13", "5.25", "5.51", "6.13", "6.25", "6.51"]
    assert len({config_color(c) for c in EXTENDED_LADDER}) == len(EXTENDED_LADDER)


def test_stops_are_those_of_a_ladder():
    assert stop_index("5.13", EXTENDED_LADDER) == EXTENDED_LADDER.index(QuantConfig(5, 128))
    with pytest.raises(InputError, match="--ladder extended"):
        stop_index("5.13")
    with pytest.raises(InputError, match="not a configuration"):
        stop_index("7.13", EXTENDED_LADDER)
    assert find_stop("6.25bpp") is None
    assert Budget.parse("5.25bpp", 8).nominal_bytes == 5.25
    assert Budget.parse("5.25bpp", 8, EXTENDED_LADDER).nominal_bytes == 5.25390625


@pytest.mark.parametrize("bits", [1, 5, 6])
def test_codes_are_counted_by_the_bit(bits):
    """``hqq`` stores each 5- or 6-bit code in a byte; here 8 codes of n bits take n bytes."""
    config = QuantConfig(bits, 64)
    metadata = 4096 * 4096 // 64
    stored = planned_bytes("hqq", (4096, 4096), config, "fp16")
    assert stored == 4096 * 4096 * bits // 8 + 2 * 2 * metadata + 2
    assert planned_bytes("rtn", (4096, 4096), config, "fp16") == stored


def test_quantizers_name_what_they_lack():
    matrix = Matrix("model.layers.0.mlp.up_proj", 0, "mlp.up_proj", 128, 128)
    for name, spec in QUANTIZERS.items():
        reason = incompatibility_reason(name, {matrix: QuantConfig(5, 64)})
        assert (reason == "") == (5 in spec.bits)
        if reason and not spec.package:
            assert "b5g64" in reason


# --- plans ----------------------------------------------------------------------------------

#: Digests of the configurations of plans, made before the extended ladder was added.
PLANS = {
    ("uniform", "3.3bpp"): "b65e621d193c",
    ("sensiboost", "3.3bpp"): "a8911d7902a3",
    ("kurtboost", "3.3bpp"): "68c031afa1b7",
    ("sensiboost-ablation", "3.3bpp"): "405df181c19c",
    ("kurtboost-ablation", "3.3bpp"): "15686406927c",
    ("mxq", "3.3bpp"): "d10393e8eb7a",
    ("mxq", "4.25bpp"): "3d772657fb7e",
    ("kurt-scaled", "4.25bpp"): "2f5a1f810313",
    ("sensi-milp", "3.3bpp"): "23aa05ff5009",
    ("kurt-milp", "4.25bpp"): "ba1a41a99403",
    ("sensi-knapsack", "4.25bpp"): "3d772657fb7e",
    ("loss-aware", "3.3bpp"): "67668d324e1e",
    ("kl-aware", "4.25bpp"): "3d772657fb7e",
}


def digest(plan: Plan) -> str:
    return hashlib.sha256(" ".join(c.name for c in plan.configs).encode()).hexdigest()[:12]


@pytest.mark.parametrize(("method", "budget"), PLANS)
def test_plans_on_the_papers_ladder_are_as_before(method, budget):
    plan = make_plan(problem(), PlanRequest(method, budget=budget))
    assert digest(plan) == PLANS[method, budget]
    assert "ladder" not in plan.to_json()["request"]


@pytest.mark.parametrize("method", PLANNERS)
def test_a_larger_ladders_scores_give_the_papers_plans(method):
    if PLANNERS[method].reads_rows or PLANNERS[method].reads_refinement:
        return
    both = problem(ladder=EXTENDED_LADDER)
    columns = [EXTENDED_LADDER.index(c) for c in LADDER]
    own = {name: table[:, columns] for name, table in both.by_config.items()}
    request = PlanRequest(method, budget="4.3bpp")
    expected = make_plan(Problem(both.matrices, both.scores, own), request)
    assert make_plan(both, request).to_json() == expected.to_json()


def test_scores_of_a_smaller_ladder_do_not_suffice():
    with pytest.raises(InputError, match="b1g128"):
        make_plan(problem(), PlanRequest("kl-aware", budget="5bpp", ladder=EXTENDED))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_extended_optimum_is_no_worse_at_any_budget(seed, share):
    """It contains the papers' ladder, so its exact plans cost no more."""
    both = problem(4, seed, EXTENDED_LADDER)
    paper = both.with_options(LADDER)
    low, high = paper.feasible
    budget = low + share * (high - low)
    request = PlanRequest("kl-aware")
    costs = [
        solve_exactly(make_frontier(each, replace(request, ladder=ladder)), budget)
        for each, ladder in ((paper, PAPER), (both, EXTENDED))
    ]
    assert costs[1].objective <= costs[0].objective * (1 + 1e-12)
    assert costs[0].reason == costs[1].reason == ""


@pytest.mark.parametrize("method", PLANNERS)
def test_methods_plan_on_the_ladder_or_say_that_they_do_not(method):
    request = PlanRequest(method, budget="5.6bpp", ladder=EXTENDED)
    assert ladder_of(method, EXTENDED) == (PAPER if method in ON_ONE_LADDER else EXTENDED)
    if method in ON_ONE_LADDER:
        with pytest.raises(InputError, match="only the paper ladder"):
            make_plan(problem(ladder=EXTENDED_LADDER), request)
        return
    plan = make_plan(problem(ladder=EXTENDED_LADDER), request)
    assert plan.bits_per_param <= 5.6 + 1e-9
    assert {c.bits for c in plan.configs} & {5, 6}
    assert Plan.from_json(plan.to_json(), plan.matrices, 0).configs == plan.configs


def test_boosts_and_mixed_rows_stay_on_the_papers_ladder():
    assert set(ON_ONE_LADDER) == {
        "sensiboost",
        "kurtboost",
        "sensiboost-ablation",
        "kurtboost-ablation",
        "sensiboost-rank",
        "kurtboost-rank",
        "high-impact",
        "refined",
    }


def test_pins_and_bases_of_the_extended_ladder():
    both = problem(ladder=EXTENDED_LADDER)
    pins = ("*.layers.0.*=b6g64",)
    plan = make_plan(both, PlanRequest("mxq", budget="4bpp", ladder=EXTENDED, pins=pins))
    assert {c.name for m, c in plan.choice.items() if m.layer == 0} == {"b6g64"}
    with pytest.raises(InputError, match="--ladder extended"):
        make_plan(both, PlanRequest("mxq", budget="4bpp", pins=pins))
    uniform = make_plan(both, PlanRequest("uniform", base="5.25", ladder=EXTENDED))
    assert {c.name for c in uniform.configs} == {"b5g64"}


def test_budgets_are_named_by_the_stops_of_their_ladder():
    """In planners, in the check for quantizers that store more bits, and in the slider."""
    request = PlanRequest("mxq", budget="5.13", ladder="extended")
    wide = problem(ladder=EXTENDED_LADDER)
    plan = make_plan(wide, request)
    assert plan.bits_per_param == pytest.approx(5.127, abs=0.001)
    assert budget_excess(plan, "rtn") == ""
    assert within_reach(wide, request, "8bit") == (request, "")


def test_unknown_ladder_raises():
    with pytest.raises(InputError, match="not a ladder"):
        PlanRequest("mxq", ladder="longer")
    with pytest.raises(InputError, match="not a ladder"):
        ProfileSettings(ladder="longer")


def test_sweeps_keep_methods_on_their_ladder():
    template = PlanRequest("uniform", ladder=EXTENDED)
    made = requests(template, ["sensiboost", "mxq"], [], ["5bpp"])
    assert [r.ladder for r in made] == [PAPER, EXTENDED]
    items = baselines(template, [], ["5bpp"], ["rtn", "nf4"], [])
    assert items == []
    items = baselines(template, [], ["5bpp"], ["rtn", "nf4"], [None])
    assert [item.request.ladder for item in items] == [EXTENDED, PAPER]


# --- profiles -------------------------------------------------------------------------------


def test_profile_keys_are_as_before():
    """Keys of profiles measured, shipped or published before ladders were introduced."""
    assert ProfileSettings().key("f", "c") == "19c42ae588f11828"
    published = PUBLISHED_SETTINGS.key("f", "c", "t", "k", {"a": 1})
    assert published == "77d6922594b6ff4f"
    assert ProfileSettings("rtn", 0, "fp16", "x", 4, 64, 7).key("f", "c") == "f621aa96f8e9e2d2"
    assert "ladder" not in ProfileSettings().to_json()
    extended = ProfileSettings(ladder=EXTENDED)
    assert extended.key("f", "c") != ProfileSettings().key("f", "c")
    assert ProfileSettings(**extended.to_json()) == extended


SMALL = ProfileSettings("rtn", samples=2, block_tokens=32)


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Session:
    folder = tmp_path_factory.mktemp("ladder")
    model = save_random_model(folder / "model", "llama-gqa")
    return Session(str(model), Store(folder / "lsq.duckdb"))


def test_profiles_of_both_ladders_are_kept_beside_each_other(session):
    extended = replace(SMALL, ladder=EXTENDED)
    measured = session.profile(extended)
    # A profile of the extended ladder serves the papers' methods without measuring again.
    boosted = session.plan("sensiboost", SMALL, budget="4.2bpp")
    assert boosted.profile == measured.id
    assert session.find_profile(SMALL) is None
    paper = session.profile(SMALL)
    assert paper.id != measured.id
    shared = build_problem(session.info, measured).with_options(LADDER).by_config
    for name, table in build_problem(session.info, paper).by_config.items():
        np.testing.assert_array_equal(table, shared[name])
    plan = session.plan("mxq", SMALL, budget="5.4bpp", ladder=EXTENDED)
    assert plan.profile == measured.id
    assert {5, 6} & {c.bits for c in plan.configs}
    quantized = session.quantize(plan, "rtn")
    stored = sum(m.packed.nbytes for m in quantized.model.modules() if hasattr(m, "packed"))
    assert stored == plan.planned_bytes


def test_no_prediction_where_no_profile_has_the_bits(session):
    settings_8bit = replace(SMALL, samples=3)
    plan = make_plan(
        Problem(session.info.matrices), PlanRequest("uniform", base="5.13", ladder=EXTENDED)
    )
    reason = predict_plan(session, plan, settings_8bit)["reason"]
    assert "b5g128" in reason
    assert "extended ladder" in reason


# --- command line and labels ----------------------------------------------------------------


def test_command_lines_name_the_extended_ladder():
    settings_ = ProfileSettings(ladder=EXTENDED)
    request = PlanRequest("mxq", budget="5bpp", ladder=EXTENDED)
    parse = partial(build_parser(exit_on_error=False).parse_args)
    plan_argv = ["plan", "--model", "demo", *arguments.plan_arguments(request, settings_)]
    assert parse(plan_argv).ladder == EXTENDED
    profile_argv = ["profile", "--model", "demo", *arguments.profile_arguments(settings_)]
    assert parse(profile_argv).ladder == EXTENDED
    paper = arguments.plan_arguments(PlanRequest("mxq", budget="5bpp"), ProfileSettings())
    assert "--ladder" not in paper


def test_labels_of_runs_are_stops_of_their_ladder():
    import pandas as pd

    texts = ['{"budget": "5.13bpp"}', '{"budget": "5.1bpp", "ladder": "extended"}']
    runs = pd.DataFrame({"base": [None, None], "request": texts})
    assert add_labels(runs)["label"].tolist() == ["5.13", "5.10"]


# --- other tools ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "widths"),
    [
        ("mlx", {5, 6}),
        ("compressed-tensors", {5, 6}),
        ("torchao", {1, 5, 6}),
        ("auto-round", {5, 6}),
        ("gptqmodel", set()),
        ("modelopt", set()),
    ],
)
def test_plan_targets_have_the_widths_of_the_tool(target, widths):
    formats: tuple[Format, ...] = PLAN_TARGETS[target].formats(256, 256)
    assert {f.bits for f in formats} & {1, 5, 6} == widths
