"""Planners: Algorithm 1 in plain Python, published objectives, budgets, MXQ by brute force."""

from __future__ import annotations

import itertools
import json
import re
from fnmatch import fnmatchcase
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.stats import mstats

from lsq_core.bits import LADDER
from lsq_core.errors import InputError, LsqError
from lsq_core.model.info import Matrix
from lsq_core.planning.detection import detect_outliers, largest_possible_z, shallow_model_note
from lsq_core.planning.exact import solve_exactly
from lsq_core.planning.facts import layer_means
from lsq_core.planning.make import make_frontier, make_plan
from lsq_core.planning.methods import PLANNERS
from lsq_core.planning.methods.boost import flagged_layers, layer_series
from lsq_core.planning.methods.uniform import uniform_within
from lsq_core.planning.pins import SCOPES, Pin
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import TOLERANCE, Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.units import format_bytes
from tests.conftest import REFERENCE
from tests.helpers import nominal_budget

TYPES = ("self_attn.q_proj", "mlp.down_proj")


def problem(layers: int = 32, seed: int = 0, spikes: dict[int, float] | None = None) -> Problem:
    """Return a problem with two modules per layer, smooth scores, and the given spikes."""
    random = np.random.default_rng(seed)
    matrices = tuple(
        Matrix(f"model.layers.{i}.{kind}", i, kind, 128, 128 * (1 + j))
        for i in range(layers)
        for j, kind in enumerate(TYPES)
    )
    base = 1 + 0.01 * random.standard_normal(len(matrices))
    for layer, factor in (spikes or {}).items():
        base[2 * layer] *= factor
    error = base[:, None] * 2.0 ** -np.array([c.nominal_bits for c in LADDER])
    scores = {"sensitivity": base, "sensitivity_module": base, "kurtosis": 3 * base}
    return Problem(matrices, scores, {"weight_error": error})


needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason=f"the published measurements are not at {REFERENCE}"
)


def published_problem(model: str) -> Problem:
    """Return the authors' measurements of a model: kurtosis, sensitivity and weight errors."""
    table = pd.read_csv(REFERENCE / f"src/data/fnorm-{model}.csv")
    table = table.drop_duplicates(["layer", "module", "nbit1", "gsize1"])
    modules = table.drop_duplicates(["layer", "module"])
    matrices = tuple(
        Matrix(f"model.layers.{r.layer}.{r.module}", r.layer, r.module, r.params // 128, 128)
        for r in modules.itertuples()
    )
    errors = table.set_index(["layer", "module", "nbit1", "gsize1"])["fnorm"]
    by_config = [[errors[m.layer, m.type, c.bits, c.group_size] for c in LADDER] for m in matrices]
    scores = {m: modules[m].to_numpy() for m in ("kurtosis", "sensitivity") if m in modules}
    return Problem(matrices, scores, {"weight_error": np.array(by_config)})


# --- Algorithm 1 --------------------------------------------------------------------------------


def reference_outliers(series: list[float], ratios: bool, limit: float = 3.0) -> list[int]:
    """Algorithm 1 in plain Python: sort, cut 5 % at each end, mean and ddof-1 deviation."""
    pairs = list(itertools.pairwise(series))
    differences = [b / a if ratios else b - a for a, b in pairs]
    cut = int(0.05 * len(differences))
    trimmed = sorted(differences)[cut : len(differences) - cut]
    mean = sum(trimmed) / len(trimmed)
    deviation = (sum((d - mean) ** 2 for d in trimmed) / (len(trimmed) - 1)) ** 0.5
    assume(deviation > 1e-9 * max(map(abs, differences)))
    z = {i + 1: abs(d - mean) / deviation for i, d in enumerate(differences)}
    near = sorted([*z.values(), limit])
    assume(all(b - a > 1e-9 * b for a, b in itertools.pairwise(near)))  # no case is a rounding tie
    return sorted((i for i in z if z[i] > limit), key=lambda i: -z[i])


@given(st.lists(st.floats(0.01, 100), min_size=24, max_size=80, unique=True), st.booleans())
def test_detect_outliers_matches_reference(series, ratios):
    assert list(detect_outliers(np.array(series), ratios=ratios).flagged) == reference_outliers(
        series, ratios
    )


def test_detect_outliers_top_m():
    series = np.ones(40)
    series[10], series[20], series[30] = 4, 9, 6
    everything = detect_outliers(series, ratios=False).flagged
    assert set(everything[:2]) == {20, 21}
    assert detect_outliers(series, ratios=False, top_m=1).flagged == everything[:1]


def test_detect_outliers_constant_series_empty():
    assert detect_outliers(np.ones(32), ratios=True).flagged == ()


@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=90))
def test_detect_outliers_trimming_matches_scipy(series):
    detection = detect_outliers(np.array(series), ratios=False)
    limits = (0.05, 0.05)
    mean = mstats.trimmed_mean(detection.differences, limits=limits)
    assert detection.mean == pytest.approx(float(mean), abs=1e-9)
    deviation = mstats.trimmed_std(detection.differences, limits=limits, ddof=1)
    assert detection.deviation == pytest.approx(float(deviation), abs=1e-9)


def test_shallow_model_adds_note():
    """With n differences, the largest possible z-score is (n - 1)/√n."""
    one_spike = np.r_[np.zeros(10), 1.0]
    detection = detect_outliers(one_spike, ratios=False)
    assert detection.z.max() == pytest.approx(largest_possible_z(11))
    assert "no z-score" in shallow_model_note(11)
    assert "hardly ever" in shallow_model_note(15)
    assert shallow_model_note(24) == ""
    plan = make_plan(problem(layers=8, spikes={4: 50}), PlanRequest("sensiboost", base="3.13"))
    assert not plan.ranking_scores
    assert any("no z-score" in note for note in plan.notes)


def test_layer_series_averages_experts():
    matrices = tuple(
        Matrix(f"m.{i}.mlp.experts.up.{e}", i, "mlp.experts.up", 128, 128, e)
        for i in range(4)
        for e in range(2)
    )
    scores = np.array([1, 3, 2, 4, np.nan, 5, 6, 8.0])
    layers, series = layer_series(Problem(matrices, {"s": scores}), "s")["mlp.experts.up"]
    assert layers == [0, 1, 2, 3]
    assert series.tolist() == [2, 3, 5, 7]


# --- boosts and ablations -------------------------------------------------------------------


def test_boost_raises_only_flagged_layers():
    spiky = problem(spikes={7: 9.0})
    plan = make_plan(spiky, PlanRequest("sensiboost", base="3.13", boost_stop=3))
    flagged = flagged_layers(spiky, "sensitivity", 0)["self_attn.q_proj"]
    assert 7 in flagged
    for name, entry in plan.modules.items():
        boosted_layers = entry["type"] == "self_attn.q_proj" and entry["layer"] in flagged
        assert entry["config"] == ("b4g128" if boosted_layers else "b3g128"), name
    assert set(plan.ranking_scores) == {
        n for n, e in plan.modules.items() if e["config"] == "b4g128"
    }


def test_boost_capped_at_last_stop():
    plan = make_plan(problem(spikes={7: 9.0}), PlanRequest("kurtboost", base="8.25", boost_stop=3))
    assert {e["config"] for e in plan.modules.values()} == {"b8g64", "b8g32"}


@pytest.mark.parametrize("method", ["sensiboost-ablation", "kurtboost-ablation"])
def test_ablation_draws_equal_count_from_unflagged(method):
    spiky = problem(spikes={7: 9.0, 20: 5.0})
    picked = {
        (kind, layer)
        for metric in ("sensitivity", "kurtosis")
        for kind, layers in flagged_layers(spiky, metric, 0).items()
        for layer in layers
    }
    counts = {}
    for seed in range(5):
        plan = make_plan(spiky, PlanRequest(method, base="3.13", seed=seed))
        drawn = {(plan.modules[n]["type"], plan.modules[n]["layer"]) for n in plan.ranking_scores}
        boosted_layers = make_plan(
            spiky, PlanRequest(method.removesuffix("-ablation"), base="3.13")
        )
        assert len(drawn) == len(boosted_layers.ranking_scores)
        assert not drawn & picked
        counts[seed] = drawn
        again = make_plan(spiky, PlanRequest(method, base="3.13", seed=seed))
        assert again.modules == plan.modules
    assert len(set(map(frozenset, counts.values()))) > 1, "another seed draws other layers"


def test_ablation_too_few_layers_raises():
    # the last two of 24 layers are outliers, but not among the last three alone
    spiky = problem(layers=24, spikes=dict.fromkeys(range(1, 24, 2), 1.0))
    spiky.scores["kurtosis"][:] = 3.0
    spiky.scores["kurtosis"][1::2] = 3.0
    series = np.ones(24)
    series[22:] = [50, 200]
    spiky.scores["sensitivity"][::2] = series
    flagged = flagged_layers(spiky, "sensitivity", 0)["self_attn.q_proj"]
    few = Problem(
        tuple(m for m in spiky.matrices if m.layer >= 21),
        {k: v[-6:] for k, v in spiky.scores.items()},
    )
    assert flagged
    assert not flagged_layers(few, "sensitivity", 0)["self_attn.q_proj"]
    with pytest.raises(LsqError, match="top-m"):
        _ablation_of_everything(few)


def _ablation_of_everything(small: Problem) -> None:
    """Plan the ablation of a method that picks every layer."""
    from lsq_core.planning.methods.boost import SensiBoost, SensiBoostAblation

    class Greedy(SensiBoost):
        def boosted_layers(self, problem, request):
            return {kind: dict.fromkeys(range(24), 9.0) for kind in TYPES}

    class Control(SensiBoostAblation):
        method = Greedy

    Control().boosted_layers(small, PlanRequest("sensiboost-ablation", base="3.13"))


# --- budgets ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    method=st.sampled_from([n for n, p in PLANNERS.items() if p.has_base]),
    bits=st.floats(2.2, 8.5),
    boost_stop=st.integers(0, 4),
)
def test_plan_within_budget_and_base_is_highest_fitting(method, bits, boost_stop):
    spiky = problem(spikes={7: 9.0, 20: 5.0})
    request = PlanRequest(method, budget=f"{bits:.6f}bpp", boost_stop=boost_stop)
    plan = make_plan(spiky, request)
    assert plan.bits_per_param <= bits + 1e-6
    # and the base is the highest stop that fits
    best = max(c.nominal_bits for c in LADDER if c.nominal_bits <= bits + 1e-6)
    assert plan.base == next(c.stop_name for c in LADDER if c.nominal_bits == best)


def test_budget_limits_boosts_of_fixed_base():
    spiky = problem(layers=60, spikes={7: 9.0, 20: 5.0, 33: 4.0, 47: 7.0})
    free = make_plan(spiky, PlanRequest("kurtboost", base="3.13"))
    tight = f"{(free.bits_per_param + LADDER[3].nominal_bits) / 2:.6f}bpp"
    capped = make_plan(spiky, PlanRequest("kurtboost", base="3.13", budget=tight))
    assert 0 < len(capped.ranking_scores) < len(free.ranking_scores)
    strongest = sorted(free.ranking_scores, key=lambda n: -free.ranking_scores[n])
    assert list(capped.ranking_scores) == strongest[: len(capped.ranking_scores)]
    assert not capped.notes
    nothing = make_plan(spiky, PlanRequest("kurtboost", base="3.13", budget="3.127bpp"))
    assert len(nothing.notes) == 1
    assert "no room" in nothing.notes[0]
    loose = make_plan(spiky, PlanRequest("kurtboost", base="3.13", budget="4bpp"))
    assert loose.modules == free.modules
    assert "unspent" in loose.notes[0]
    with pytest.raises(InputError, match=r"smallest plan .*base"):
        make_plan(spiky, PlanRequest("sensiboost", base="4.13", budget="3.2bpp"))


@pytest.mark.parametrize("budget", ["2.1bpp", "9bpp"])
@pytest.mark.parametrize("method", [n for n, p in PLANNERS.items() if not p.reads_rows])
def test_budget_out_of_range_error_states_range(method, budget):
    with pytest.raises(InputError, match=r"from 2\.127 bpp .* to 8\.508 bpp"):
        make_plan(problem(), PlanRequest(method, budget=budget))


@pytest.mark.parametrize("budget", ["1KiB", "1GiB"])
@pytest.mark.parametrize("metadata", ["8bit", "fp16"])
def test_budget_in_bytes_out_of_range_error_states_planned_range(budget, metadata):
    low, high = map(format_bytes, problem().feasible_planned(metadata))
    with pytest.raises(InputError, match=f"from {low} planned to {high} planned"):
        make_plan(problem(), PlanRequest("uniform", budget=budget), metadata=metadata)


def test_incomplete_or_conflicting_requests_raise():
    with pytest.raises(InputError, match="base configuration"):
        make_plan(problem(), PlanRequest("uniform"))
    with pytest.raises(InputError, match="takes a budget"):
        make_plan(problem(), PlanRequest("mxq", base="3.13"))
    with pytest.raises(InputError, match=r"method.* uniform"):
        make_plan(problem(), PlanRequest("magic", base="3.13"))
    with pytest.raises(InputError, match="cannot be negative"):
        PlanRequest("sensiboost", boost_stop=-1)


def test_indivisible_matrix_raises_naming_it():
    odd = Problem((Matrix("model.layers.0.odd", 0, "odd", 32, 33),))
    with pytest.raises(InputError, match=r"layers\.0\.odd \(32×33\) .* groups of 128"):
        make_plan(odd, PlanRequest("uniform", base="3.13"))
    plan = make_plan(odd, PlanRequest("uniform", base="3.51"))
    assert plan.modules["model.layers.0.odd"]["group_size"] == 32


# --- knapsacks ----------------------------------------------------------------------------------


def knapsack(seed: int, modules: int = 3) -> Problem:
    """Return a few matrices of different sizes, with random costs that mostly fall with bits."""
    random = np.random.default_rng(seed)
    matrices = tuple(
        Matrix(f"m.{i}", i, "x", 128, 128 * int(random.integers(1, 4))) for i in range(modules)
    )
    cost = np.sort(random.random((modules, 12)), axis=1)[:, ::-1]
    cost = np.where(random.random(cost.shape) < 0.1, 1.5 * cost, cost)
    return Problem(matrices, {}, {"weight_error": cost})


def brute_force_cost(small: Problem, budget: float) -> float:
    """Return the least cost of all choices within the budget, with the planners' tolerance."""
    cost, rows = small.by_config["weight_error"], range(len(small.matrices))
    return min(
        cost[rows, list(c)].sum()
        for c in itertools.product(range(12), repeat=len(small.matrices))
        if small.nominal(np.array(c)) <= budget * (1 + TOLERANCE)
    )


@settings(deadline=None, max_examples=40)
@example(seed=0, share=0.9999999999999999)
@given(seed=st.integers(0, 10**6), share=st.floats(0.0, 1.0))
def test_mxq_matches_brute_force(seed, share):
    """Plans meet the budget, bound ≤ optimum ≤ objective, and the exact plan is optimal."""
    small = knapsack(seed)
    low, high = small.feasible
    budget = low + share * (high - low)
    frontier = make_frontier(small, PlanRequest("mxq"))
    best = brute_force_cost(small, budget)
    greedy = frontier.at(budget)
    assert small.nominal(greedy.choice) <= budget * (1 + 1e-9)
    assert greedy.lower_bound <= best * (1 + 1e-12)
    assert best <= greedy.objective + 1e-12
    exact = solve_exactly(frontier, budget, gap=1e-9)
    assert exact.proven
    assert small.nominal(exact.choice) <= budget * (1 + 1e-9)
    assert exact.objective == pytest.approx(best, rel=1e-6)
    assert exact.lower_bound <= best * (1 + 1e-12)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), shares=st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_mxq_lower_bound_monotonic_in_budget(seed, shares):
    small = knapsack(seed, modules=20)
    low, high = small.feasible
    frontier = make_frontier(small, PlanRequest("mxq"))
    bounds = [frontier.at(low + s * (high - low)).lower_bound for s in sorted(shares)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(bounds))


def test_frontier_moves_sorted_by_price():
    frontier = make_frontier(knapsack(1, modules=30), PlanRequest("mxq"))
    (segment,) = frontier.segments
    sizes = np.diff([segment.start_bytes, *(m.bytes_after for m in segment.moves)])
    prices = np.array([m.priority for m in segment.moves]) / sizes
    assert (sizes > 0).all()
    assert (np.diff(prices) <= 1e-9 * prices[:-1]).all()


def test_exact_plan_reports_gap():
    small = knapsack(3, modules=40)
    greedy = make_plan(small, PlanRequest("mxq", budget="3.3bpp")).to_json()
    exact = make_plan(small, PlanRequest("mxq", budget="3.3bpp", exact=True)).to_json()
    assert exact["objective"] <= greedy["objective"]
    assert greedy["lower_bound"] <= exact["lower_bound"] <= exact["objective"]
    assert 0 <= exact["gap"] <= 1e-4
    assert exact["gap"] <= greedy["gap"] < 0.05
    assert "gap" not in make_plan(small, PlanRequest("uniform", base="3.13")).to_json()
    with pytest.raises(InputError, match="exact"):
        make_plan(small, PlanRequest("uniform", base="3.13", exact=True))


def test_exact_solver_timeout_falls_back_with_note(monkeypatch):
    """It then returns the frontier's plan and bound, without claiming a proof."""
    small = knapsack(5, modules=300)
    frontier = make_frontier(small, PlanRequest("mxq"))
    budget = 3.3 * small.total / 8
    greedy = frontier.at(budget)
    monkeypatch.setattr("lsq_core.planning.exact._solve", lambda *a: (None, 0))
    stopped = solve_exactly(frontier, budget, time_limit=7, max_states=0)
    assert not stopped.proven
    assert "7 s" in stopped.reason
    assert stopped.choice.tolist() == greedy.choice.tolist()
    assert stopped.lower_bound == greedy.lower_bound < stopped.objective
    monkeypatch.setattr(
        "lsq_core.planning.make.solve_exactly", partial(solve_exactly, max_states=0)
    )
    plan = make_plan(small, PlanRequest("mxq", budget="3.3bpp", exact=True))
    assert len(plan.notes) == 1
    assert re.search("[Nn]ot proven .*60 s", plan.notes[0])


def test_exact_solver_milp_matches_search(monkeypatch):
    """CBC, started where the search stopped, finds the same optimum as a completed search."""
    small = knapsack(11, modules=40)
    frontier = make_frontier(small, PlanRequest("mxq"))
    for bits in (2.3, 3.3, 5.1, 7.7):
        budget = bits * small.total / 8
        searched = solve_exactly(frontier, budget)
        programmed = solve_exactly(frontier, budget, gap=1e-7, max_states=0)
        assert searched.proven
        assert programmed.proven
        assert programmed.lower_bound <= searched.objective
        assert programmed.objective == pytest.approx(searched.objective, rel=1e-6)


@needs_reference
def test_exact_objectives_reach_published():
    """All 526 plans are within the budget, no costlier than published, and proven optimal."""
    table = pd.read_csv(REFERENCE / "data-vis/data/mxq-objectives.csv")
    assert table.groupby("model").size().to_dict() == {"Llama-2-7b-hf": 263, "Meta-Llama-3-8B": 263}
    compared, saved = 0, []
    for model, rows in table.groupby("model"):
        published = published_problem(model)
        frontier = make_frontier(published, PlanRequest("mxq"))
        for row in rows.itertuples():
            budget = row.bpp * published.total / 8
            exact = solve_exactly(frontier, budget)
            assert exact.proven, (model, row.bpp, exact.reason)
            assert published.nominal(exact.choice) <= budget * (1 + TOLERANCE)
            assert exact.objective <= row.fnorm * (1 + 1e-6), (model, row.bpp)
            assert exact.objective * (1 - 1e-8) <= exact.lower_bound <= exact.objective
            compared += 1
            saved.append(1 - exact.objective / row.fnorm)
    assert compared == 526
    # The published objectives are optimal too, except for a few slightly above the optimum.
    assert np.median(np.abs(saved)) < 1e-9
    print(f"526 objectives: at most {max(saved):.2%} below the published ones")


def test_kurt_scaled_and_sensi_milp_costs():
    spiky = problem(spikes={7: 9.0})
    error, kurtosis = spiky.by_config["weight_error"], spiky.scores["kurtosis"]
    scaled = PLANNERS["kurt-scaled"].cost(spiky)
    own = kurtosis[::2]
    expected = error[::2] * (1 + (own - own.min()) / (own.max() - own.min()))[:, None]
    np.testing.assert_allclose(scaled[::2], expected)
    milp = PLANNERS["sensi-milp"].cost(spiky)
    share = spiky.matrices[14].numel / spiky.total
    assert spiky.matrices[14].layer == 7, "the flagged one"
    assert milp[14, 0] == pytest.approx(100 * 4 * 2 / LADDER[0].nominal_bits * share)
    assert milp[14, 3] == pytest.approx(100 * 2 * 2 / LADDER[3].nominal_bits * share)
    assert milp[0, 6] == pytest.approx(100 * 1 * 1 / LADDER[6].nominal_bits * share)


def test_sensi_knapsack_cost_with_unreached_expert():
    matrices = (
        Matrix("a.0", 0, "a", 256, 128, 0),
        Matrix("a.1", 0, "a", 256, 128, 1),
        Matrix("b", 0, "b", 128, 128),
    )
    scores = np.tile(np.linspace(2, 1, 12), (3, 1))
    scores[1] = np.nan
    cost = PLANNERS["sensi-knapsack"].cost(Problem(matrices, {}, {"sensitivity_module": scores}))
    np.testing.assert_allclose(cost[0], 256 * scores[0])
    np.testing.assert_allclose(cost[1], cost[0])
    np.testing.assert_allclose(cost[2], 128 * scores[2])


# --- pins ---------------------------------------------------------------------------------------


def test_pins_are_respected_by_each_method():
    spiky = problem(spikes={7: 9.0})
    pins = ("*.layers.0.*=b8g64", "*.down_proj=b3g128..b4g64")
    with pytest.raises(InputError, match=r"'\*\.layers\.0\.\*=b8g64' and '\*\.down_proj"):
        make_plan(spiky, PlanRequest("mxq", budget="4bpp", pins=pins))
    pins = ("*.layers.0.*=b8g64", "*.[1-9].mlp.down_proj=b3g128..b4g64")
    for method in ("mxq", "sensiboost", "uniform"):
        plan = make_plan(spiky, PlanRequest(method, budget="4bpp", pins=pins))
        assert plan.bits_per_param <= 4
        for name, entry in plan.modules.items():
            if ".layers.0." in name:
                assert entry["config"] == "b8g64"
            if entry["type"] == "mlp.down_proj" and 1 <= entry["layer"] <= 9:
                assert 3 <= entry["bits"] <= 4
        assert any("pins" in note for note in plan.notes)


def test_budget_infeasible_with_pins_raises():
    request = PlanRequest("mxq", budget="3bpp", pins=("*.down_proj=b8g64",))
    with pytest.raises(InputError, match="pins"):
        make_plan(problem(), request)


@pytest.mark.parametrize(
    ("name", "type", "expert", "patterns"),
    [
        (
            "model.layers.1.self_attn.q_proj",
            "self_attn.q_proj",
            None,
            ["model.layers.1.self_attn.q_proj", "model.layers.1.*", "*.self_attn.q_proj"],
        ),
        (
            "model.layers.1.mlp.experts.gate_proj.1",
            "mlp.experts.gate_proj",
            1,
            [
                "model.layers.1.mlp.experts.gate_proj.*",
                "model.layers.1.*",
                "*.mlp.experts.gate_proj.*",
            ],
        ),
        (
            "transformer.h.1.mlp.experts.12.w1",
            "mlp.experts.w1",
            12,
            [
                "transformer.h.1.mlp.experts.*.w1",
                "transformer.h.1.*",
                "*.mlp.experts.*.w1",
            ],
        ),
    ],
)
def test_pin_of_scope_pattern(name, type, expert, patterns):
    """All experts of a layer count as one module."""
    matrix = Matrix(name, 1, type, 128, 128, expert)
    for scope, pattern in zip(SCOPES, patterns, strict=True):
        pin = Pin.from_matrix(matrix, scope, 3, 7)
        assert str(pin) == f"{pattern}=b3g128..b4g64"
        assert Pin.parse(str(pin)) == pin
        assert fnmatchcase(name, pattern)


@pytest.mark.parametrize(
    ("pin", "message"),
    [
        ("nonsense", "not a pin"),
        ("*=b7g64", "not a configuration"),
        ("*=b5g64", "extended ladder"),
        ("*=b4g64..b3g64", "reverse it"),
        ("nothing.*=b4g64", "matches no module"),
    ],
)
def test_invalid_pin_raises(pin, message):
    with pytest.raises(InputError, match=message):
        make_plan(problem(), PlanRequest("mxq", budget="4bpp", pins=(pin,)))


# --- edge cases of MXQ ------------------------------------------------------------------------


def test_mxq_indivisible_matrix_gets_smaller_groups():
    matrices = (Matrix("a", 0, "x", 32, 33), Matrix("b", 0, "y", 128, 128))
    odd = Problem(matrices, {}, {"weight_error": np.tile(np.arange(12.0)[::-1], (2, 1))})
    plan = make_plan(odd, PlanRequest("mxq", budget="4bpp"))
    assert plan.modules["a"]["group_size"] == 32


def test_mxq_smallest_budget_gives_smallest_plan():
    flat = problem()
    plan = make_plan(flat, PlanRequest("mxq", budget=nominal_budget(flat.feasible[0], flat)))
    assert {e["config"] for e in plan.modules.values()} == {"b2g128"}


# --- plan files -------------------------------------------------------------------------------


def test_plan_json_round_trip():
    spiky = problem(spikes={7: 9.0})
    plan = make_plan(spiky, PlanRequest("sensiboost", base="3.13"), metadata="fp16", other_bytes=5)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())), spiky.matrices, 5)
    assert again.to_json() == plan.to_json()
    assert again.choice == plan.choice
    assert plan.model_bytes == plan.planned_bytes + 5


def test_plan_from_json_other_model_raises():
    content = make_plan(problem(24), PlanRequest("uniform", base="3.13")).to_json()
    with pytest.raises(InputError, match="another model"):
        Plan.from_json(content, problem(32).matrices, 0)
    with pytest.raises(InputError, match="not a plan"):
        Plan.from_json({"modules": {}}, problem(32).matrices, 0)


@pytest.mark.parametrize("stop", LADDER, ids=lambda c: c.stop_name)
@pytest.mark.parametrize("method", ["uniform", "mxq"])
def test_budget_by_stop_name_reaches_stop(method, stop):
    plan = make_plan(problem(layers=4), PlanRequest(method, budget=f"{stop.stop_name}bpp"))
    assert plan.bits_per_param <= stop.nominal_bits
    if method == "uniform":
        assert {c.name for c in plan.configs} == {stop.name}


@pytest.mark.parametrize("config", LADDER, ids=lambda c: c.stop_name)
def test_uniform_within_is_the_largest_that_fits(config):
    assert uniform_within(config.nominal_bits) == config
    assert uniform_within(config.nominal_bits + 1e-3) == config
    smaller = [c for c in LADDER if c.nominal_bits < config.nominal_bits]
    expected = max(smaller, key=lambda c: c.nominal_bits, default=LADDER[0])
    assert uniform_within(config.nominal_bits - 1e-3) == expected


def test_layer_means_leave_out_what_is_missing():
    small = problem(layers=3)
    scores = small.scores["kurtosis"].astype(float)
    layers = np.array([m.layer for m in small.matrices])
    scores[layers == 1] = np.nan
    first = np.flatnonzero(layers == 0)
    scores[first[0]] = np.nan
    means = layer_means(Problem(small.matrices, {"kurtosis": scores}, {}), "kurtosis")
    assert means[0] == pytest.approx(scores[first[1:]].mean())
    assert np.isnan(means[1])
    assert means[2] == pytest.approx(scores[layers == 2].mean())
