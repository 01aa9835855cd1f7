"""Plans whose modules share configurations: ties and server constraints."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsq_core.bits import LADDER
from lsq_core.errors import InputError
from lsq_core.model.info import Matrix
from lsq_core.planning.constraints import apply_ties, restrict
from lsq_core.planning.exact import solve_exactly
from lsq_core.planning.make import make_frontier, make_plan
from lsq_core.planning.methods import PLANNERS
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import TOLERANCE, Impact, Interactions, Problem, Refinement
from lsq_core.planning.request import PlanRequest
from lsq_core.planning.ties import Tie, merge_groups
from lsq_core.quantization import registry

QKV, GATE_UP = "q_proj,k_proj,v_proj", "gate_proj,up_proj"
SHAPES = {
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (64, 128),
    "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128),
    "mlp.gate_proj": (256, 128),
    "mlp.up_proj": (256, 128),
    "mlp.down_proj": (128, 256),
}
LADDER_METHODS = [name for name, planner in PLANNERS.items() if not planner.reads_rows]
KNAPSACKS = [name for name in LADDER_METHODS if not PLANNERS[name].has_base]


def model(
    layers: int = 30, seed: int = 0, kinds: tuple[str, ...] = tuple(SHAPES), width: int = 128
) -> Problem:
    """Return a small Llama with random scores; in every ninth layer one module stands out."""
    random = np.random.default_rng(seed)
    matrices = tuple(
        Matrix(f"model.layers.{i}.{kind}", i, kind, SHAPES[kind][0], SHAPES[kind][1] * width // 128)
        for i in range(layers)
        for kind in kinds
    )
    spread = np.exp(0.02 * random.standard_normal(len(matrices)))
    for layer in range(3, layers, 9):
        spread[layer * len(kinds) + random.integers(len(kinds))] *= 20
    error = spread[:, None] * 2.0 ** -np.array([c.nominal_bits for c in LADDER])
    error *= np.exp(0.3 * random.standard_normal(error.shape))
    names = ("sensitivity", "sensitivity_module", "kurtosis", "loss_impact")
    scores = {name: (k + 1) * spread for k, name in enumerate(names)}
    by_config = dict.fromkeys(("weight_error", "sensitivity_module", "expected_kl"), error)
    refinement = Refinement(error - error.mean(), 3.0, kl_start=1.0, kl=0.9, steps=1)
    return Problem(matrices, scores, by_config, refinement=refinement)


def assert_shared(choice, matrices, groups: list[set[str]]) -> None:
    """Assert that the modules of a group share one configuration in each layer."""
    for layer in {m.layer for m in matrices}:
        for group in groups:
            own = {c for m, c in zip(matrices, choice, strict=True)
                   if m.layer == layer and m.type.rpartition(".")[2] in group}  # fmt: skip
            assert len(own) <= 1, (layer, group)


GROUPS = [set(QKV.split(",")), set(GATE_UP.split(","))]

# --- every planner --------------------------------------------------------------------------


@pytest.mark.parametrize("method", LADDER_METHODS)
@pytest.mark.parametrize("extra", [{"ties": (QKV, GATE_UP)}, {"serve": "vllm"}])
def test_every_budget_keeps_ties(method, extra):
    """At every budget and base, ties hold and only what the server supports is used."""
    problem = model()
    served = "serve" in extra
    bases = [None, "4.13", "4.51"] if PLANNERS[method].has_base else [None]
    for base in bases:
        request = PlanRequest(method, base=base, boost_stop=2, **extra)
        restricted = restrict(problem, request)
        frontier = make_frontier(restricted, request)
        low, high = frontier.smallest, restricted.feasible[1]
        assert low > problem.feasible[0] or not served
        for budget in np.linspace(low, high, 40):
            choice = frontier.at(budget).choice
            assert problem.nominal(choice) <= budget * (1 + TOLERANCE)
            assert_shared(choice, problem.matrices, GROUPS)
            assert not served or {LADDER[stop].bits for stop in choice} <= {4, 8}
            assert restricted.allowed[np.arange(len(choice)), choice].all()


@pytest.mark.parametrize("method", LADDER_METHODS)
def test_request_without_ties_is_unrestricted(method):
    problem, request = model(), PlanRequest(method)
    assert apply_ties(problem, request) is problem
    assert make_frontier(problem, request).items is None
    plan = make_plan(problem, replace(request, budget="4.6bpp"))
    assert not {"ties", "serve"} & set(plan.to_json()["request"])


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    share=st.floats(0.0, 1.0),
    method=st.sampled_from(KNAPSACKS),
    extra=st.sampled_from([{"ties": (QKV,)}, {"serve": "vllm"}, {"ties": (QKV,), "serve": "vllm"}]),
)
def test_knapsacks_match_brute_force(seed, share, method, extra):
    """Exact plans are optimal among tied choices, and lower bounds hold."""
    kinds = tuple(SHAPES)[:4]
    small = model(2, seed, kinds)
    request = PlanRequest(method, **extra)
    restricted = restrict(small, request)
    low, high = restricted.feasible
    budget = low + share * (high - low)
    cost = PLANNERS[method].cost(small)
    stops = range(6, 12) if "serve" in extra else range(12)
    n, best = len(small.matrices), np.inf
    for q, o, q2, o2 in itertools.product(stops, repeat=4):
        choice = np.array([q, q, q, o, q2, q2, q2, o2])
        if small.nominal(choice) <= budget * (1 + TOLERANCE):
            best = min(best, cost[np.arange(n), choice].sum())
    frontier = make_frontier(restricted, request)
    greedy, exact = frontier.at(budget), solve_exactly(frontier, budget, gap=1e-9)
    assert exact.proven
    assert exact.objective == pytest.approx(best, rel=1e-6)
    assert cost[np.arange(n), exact.choice].sum() == pytest.approx(exact.objective)
    assert cost[np.arange(n), greedy.choice].sum() == pytest.approx(greedy.objective)
    assert greedy.lower_bound <= best + 1e-12 * abs(best)
    assert best <= greedy.objective + 1e-9 * abs(best)
    for plan in (greedy, exact):
        assert small.nominal(plan.choice) <= budget * (1 + TOLERANCE)
        assert_shared(plan.choice, small.matrices, GROUPS)


def test_integer_program_solves_ties():
    """CBC, the fallback of the search, also keeps ties."""
    problem, request = model(12), PlanRequest("mxq", ties=(QKV, GATE_UP))
    frontier = make_frontier(restrict(problem, request), request)
    budget = 4.4 * problem.total / 8
    searched, programmed = solve_exactly(frontier, budget), solve_exactly(
        frontier, budget, gap=1e-7, max_states=0
    )  # fmt: skip
    assert programmed.proven
    assert programmed.objective == pytest.approx(searched.objective, rel=1e-6)
    assert_shared(programmed.choice, problem.matrices, GROUPS)


def test_boost_promotes_tied_modules_together():
    """If one module of a tie stands out, all are promoted at its z-score."""
    problem = model()
    free = make_plan(problem, PlanRequest("kurtboost", base="4.13"))
    tied = make_plan(problem, PlanRequest("kurtboost", base="4.13", ties=(QKV, GATE_UP)))
    assert set(free.ranking_scores) < set(tied.ranking_scores)
    for name, z in free.ranking_scores.items():
        assert tied.ranking_scores[name] >= z
    assert_shared(tied.configs, problem.matrices, GROUPS)


def test_boost_of_a_server_uses_what_it_has():
    """576 columns don't divide into groups of 128, so b4g64 is raised to b4g32, not b8g128."""
    problem = model(width=576)
    plan = make_plan(problem, PlanRequest("kurtboost", base="4.25", serve="vllm"))
    promoted = {plan.modules[name]["config"] for name in plan.ranking_scores}
    assert promoted == {"b4g32"} or promoted == {"b4g32", "b8g128"}
    for matrix, config in plan.choice.items():
        assert matrix.in_features % config.group_size == 0


@pytest.mark.parametrize("method", ["sensiboost-ablation", "kurtboost-ablation"])
def test_ablation_promotes_as_many_items(method):
    problem = model()
    extra = {"base": "4.13", "ties": (QKV, GATE_UP)}
    wanted = make_plan(problem, PlanRequest(method.removesuffix("-ablation"), **extra))
    assert wanted.ranking_scores
    for seed in range(4):
        drawn = make_plan(problem, PlanRequest(method, seed=seed, **extra))
        assert len(drawn.ranking_scores) == len(wanted.ranking_scores)
        assert not set(drawn.ranking_scores) & set(wanted.ranking_scores)
        assert_shared(drawn.configs, problem.matrices, GROUPS)


# --- high-impact rows -----------------------------------------------------------------------


def mixed(layers: int = 2, seed: int = 0, kinds: int = 5) -> Problem:
    """Return a problem with random interactions of the first ``kinds`` module types."""
    random = np.random.default_rng(seed)
    names = tuple(SHAPES)[:kinds]
    problem = model(layers, seed, names)
    blocks = []
    for layer in range(layers):
        gain = np.abs(random.standard_normal((kinds, 8))) @ np.abs(random.standard_normal((8, 1)))
        error = gain * np.array([1.0, 0.8, 0.6, 0.45, 0.35])
        root = error.ravel()[:, None] * random.standard_normal((5 * kinds, 12))
        units = tuple((layer * kinds + k,) for k in range(kinds))
        blocks.append(Interactions(layer, units, root @ root.T / 12 + np.diag(error.ravel())))
    rows = tuple(random.random(m.out_features) for m in problem.matrices)
    options = PLANNERS["high-impact"].options(PlanRequest("high-impact"))
    return replace(problem.with_options(options), impact=Impact(rows, tuple(blocks)))


@pytest.mark.parametrize("ratios", ["full", "diagonal", "uniform"])
@pytest.mark.parametrize("clip", [False, True])
def test_high_impact_shares_ratios(ratios, clip):
    problem = mixed()
    request = PlanRequest("high-impact", ties=(QKV,), ratios=ratios, clip=clip)
    for segment in make_frontier(restrict(problem, request), request).segments:
        assert_shared(segment.start, problem.matrices, GROUPS)


@pytest.mark.parametrize("ratios", ["full", "diagonal"])
@pytest.mark.parametrize("seed", range(3))
def test_high_impact_matches_brute_force(ratios, seed):
    """In a single block, each loss on the frontier is the lowest of all tied choices that fit."""
    problem = mixed(layers=1, seed=seed)
    request = PlanRequest("high-impact", ties=(QKV,), ratios=ratios)
    frontier = make_frontier(restrict(problem, request), request)
    matrix = problem.impact.blocks[0].matrix
    matrix = np.diag(np.diag(matrix)) if ratios == "diagonal" else matrix
    sizes, losses = [], []
    for q, o, g in itertools.product(range(5), repeat=3):
        choice = np.array([q, q, q, o, g])
        places = choice + 5 * np.arange(5)
        sizes.append(problem.nominal(choice))
        losses.append(matrix[np.ix_(places, places)].sum() / 2)
    for segment, loss in zip(frontier.segments, frontier.losses, strict=True):
        within = np.array(losses)[np.array(sizes) <= segment.start_bytes]
        assert loss == pytest.approx(within.min())


def test_high_impact_ties_across_a_split_block(monkeypatch):
    monkeypatch.setattr("lsq_core.planning.methods.high_impact.MAX_UNITS", 2)
    problem = mixed(kinds=7)
    request = PlanRequest("high-impact", ties=("q_proj,k_proj", "self_attn.v_proj,mlp.down_proj"))
    for segment in make_frontier(restrict(problem, request), request).segments:
        assert_shared(segment.start, problem.matrices, [{"q_proj", "k_proj"},
                                                        {"v_proj", "down_proj"}])  # fmt: skip


# --- experts --------------------------------------------------------------------------------


def experts(fused: bool = False) -> Problem:
    """Return two layers with attention, a shared expert and three experts.

    Each expert has two matrices if ``fused``, and three otherwise.
    """
    kinds = ("gate_up_proj", "down_proj") if fused else ("gate_proj", "up_proj", "down_proj")
    matrices = []
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        matrices += [
            Matrix(f"{prefix}.self_attn.{k}", layer, f"self_attn.{k}", 128, 128)
            for k in ("q_proj", "k_proj", "v_proj")
        ]
        matrices += [
            Matrix(f"{prefix}.mlp.shared_expert.{k}", layer, f"mlp.shared_expert.{k}", 128, 128)
            for k in ("gate_proj", "up_proj", "down_proj")
        ]
        matrices += [
            Matrix(f"{prefix}.mlp.experts.{k}.{e}", layer, f"mlp.experts.{k}", 128, 128, e)
            for k in kinds
            for e in range(3)
        ]
    random = np.random.default_rng(0)
    cost = np.sort(random.random((len(matrices), 12)), axis=1)[:, ::-1]
    return Problem(tuple(matrices), {}, {"weight_error": cost})


def names(problem: Problem, group: tuple[int, ...]) -> list[str]:
    return [problem.matrices[i].name.removeprefix("model.layers.") for i in group]


def test_gate_and_up_tie_per_expert():
    problem = experts()
    groups = apply_ties(problem, PlanRequest("mxq", ties=(GATE_UP,))).groups
    assert len(groups) == 2 * (1 + 3)
    assert ["0.mlp.shared_expert.gate_proj", "0.mlp.shared_expert.up_proj"] in [
        names(problem, group) for group in groups
    ]
    assert ["1.mlp.experts.gate_proj.2", "1.mlp.experts.up_proj.2"] in [
        names(problem, group) for group in groups
    ]


@pytest.mark.parametrize("fused", [False, True])
def test_server_fuses_experts_of_a_layer(fused):
    """vLLM stores a layer's experts in one module with one scheme."""
    problem = experts(fused)
    groups = apply_ties(problem, PlanRequest("mxq", serve="vllm")).groups
    assert len(groups) == 2 * 3
    for group in groups:
        if problem.matrices[group[0]].expert is not None:
            assert len(group) == (6 if fused else 9)
    plan = make_plan(problem, PlanRequest("mxq", budget="5bpp", serve="vllm"))
    for layer in range(2):
        own = {c for m, c in plan.choice.items() if m.layer == layer and m.expert is not None}
        assert len(own) == 1


def test_server_fuses_experts_in_modules_of_their_own():
    """JetMoE stacks its experts in the weights of two modules."""
    matrices = tuple(
        Matrix(f"m.0.mlp.{k}.weight.{e}", 0, f"mlp.{k}.weight", 128, 128, e)
        for k in ("input_linear", "output_linear")
        for e in range(2)
    )
    assert apply_ties(Problem(matrices), PlanRequest("mxq", serve="vllm")).groups == ((0, 1, 2, 3),)


def test_fused_experts_have_nothing_to_tie():
    with pytest.raises(InputError, match="up_proj"):
        apply_ties(
            Problem(tuple(m for m in experts(fused=True).matrices if m.expert is not None)),
            PlanRequest("mxq", ties=(GATE_UP,)),
        )


def test_layers_that_lack_a_module_tie_the_others():
    free = model(2)
    lacking = tuple(m for m in free.matrices if m.name != "model.layers.1.self_attn.v_proj")
    groups = apply_ties(Problem(lacking), PlanRequest("mxq", ties=(QKV,))).groups
    assert [len(group) for group in groups] == [3, 2]


# --- pins -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mxq", "kurtboost", "uniform"])
def test_pin_of_one_module_holds_for_all_tied(method):
    pins = ("*.layers.3.self_attn.k_proj=b8g64",)
    plan = make_plan(model(), PlanRequest(method, budget="5bpp", ties=(QKV,), pins=pins))
    for kind in QKV.split(","):
        assert plan.modules[f"model.layers.3.self_attn.{kind}"]["config"] == "b8g64"
    assert_shared(plan.configs, plan.matrices, GROUPS[:1])


def test_pins_of_tied_modules_must_agree():
    pins = ("*.0.self_attn.q_proj=b4g64", "*.0.self_attn.v_proj=b8g64")
    make_plan(model(), PlanRequest("mxq", budget="5bpp", pins=pins))
    with pytest.raises(InputError, match=r"q_proj=b4g64' and '.*v_proj=b8g64' contradict"):
        make_plan(model(), PlanRequest("mxq", budget="5bpp", pins=pins, ties=(QKV,)))
    overlapping = ("*.0.self_attn.q_proj=b3g32..b4g64", "*.0.self_attn.v_proj=b4g64..b8g64")
    plan = make_plan(model(), PlanRequest("mxq", budget="5bpp", pins=overlapping, ties=(QKV,)))
    assert plan.modules["model.layers.0.self_attn.k_proj"]["config"] == "b4g64"


def test_pin_to_what_the_server_lacks_raises():
    pins = ("*.0.self_attn.q_proj=b3g64",)
    with pytest.raises(InputError, match="vLLM supports 4 and 8 bits"):
        make_plan(model(), PlanRequest("mxq", budget="5bpp", pins=pins, serve="vllm"))


@pytest.mark.parametrize("method", LADDER_METHODS)
def test_plan_for_gptqmodel_is_one_that_gptq_can_carry_out(method, monkeypatch):
    """Rows of 192 weights don't divide into groups of 128; nothing is tied."""
    monkeypatch.setattr(registry, "unavailable_reason", lambda name: "")
    problem = model(width=192)
    size = {"base": "3.25"} if PLANNERS[method].has_base else {"budget": "3.25bpp"}
    free, served = (
        make_plan(problem, PlanRequest(method, serve=serve, **size)).choice
        for serve in (None, "gptqmodel")
    )
    assert not registry.incompatibility_reason("gptq", served)
    if not PLANNERS[method].has_base:
        assert "--serve gptqmodel" in registry.incompatibility_reason("gptq", free)
        assert len({c.name for m, c in served.items() if m.layer == 0}) > 1


# --- invalid requests -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ties", "message"),
    [
        ("q_proj", "not a tie"),
        ("q_proj,q_proj", "not a tie"),
        (",", "not a tie"),
        ("q_proj,qq_proj", "names qq_proj"),
        ("proj,q_proj", "names proj"),
        ("o_proj,down_proj", "joins nothing"),
    ],
)
def test_wrong_tie_raises(ties, message):
    with pytest.raises(InputError, match=message):
        make_plan(model(), PlanRequest("mxq", budget="5bpp", ties=(ties,)))


def test_wrong_server_raises():
    with pytest.raises(InputError, match=r"'tgi' is not a server; choose one of vllm"):
        PlanRequest("mxq", serve="tgi")
    with pytest.raises(InputError, match="ties"):
        PlanRequest("mxq", ties=QKV)
    with pytest.raises(InputError, match="axis 1"):
        make_plan(model(), PlanRequest("mxq", budget="5bpp", serve="vllm"), axis=0)
    with pytest.raises(InputError, match="rows of different bits"):
        make_plan(mixed(), PlanRequest("high-impact", budget="2.2bpp", serve="vllm"))
    with pytest.raises(InputError, match=r"out of reach.* for vLLM range from 4\.127 bpp"):
        make_plan(model(), PlanRequest("mxq", budget="3.2bpp", serve="vllm"))
    with pytest.raises(InputError, match=r"vLLM supports .* cannot have b3g128"):
        make_plan(model(), PlanRequest("sensiboost", base="3.13", serve="vllm"))


def test_matrix_that_the_server_cannot_hold_is_named():
    odd = Problem((Matrix("m.0.x", 0, "x", 32, 33),), {}, {"weight_error": np.ones((1, 12))})
    named = r"m\.0\.x \(32×33\) has no configuration left.*vLLM supports"
    with pytest.raises(InputError, match=named):
        make_plan(odd, PlanRequest("mxq", budget="5bpp", serve="vllm"))


# --- recorded ties and merged groups --------------------------------------------------------


def test_plan_records_its_ties_and_cost():
    request = PlanRequest("mxq", budget="5bpp", serve="vllm", ties=["o_proj,q_proj"])
    plan = make_plan(model(), request)
    content = json.loads(json.dumps(plan.to_json()))
    assert content["request"]["serve"] == "vllm"
    assert content["request"]["ties"] == ["o_proj,q_proj"]
    assert Plan.from_json(content, plan.matrices, 0).request == request
    free = make_plan(model(), request.without_ties())
    (note,) = [note for note in plan.notes if "vLLM" in note]
    assert f"{100 * (plan.objective / free.objective - 1):+.2f} %" in note
    assert plan.objective > free.objective


def test_dotted_names_and_overlapping_ties():
    matrices = model(1).matrices
    tie = Tie.parse("self_attn.o_proj, mlp.down_proj")
    assert str(tie) == "self_attn.o_proj,mlp.down_proj"
    assert tie.groups(matrices) == [[3, 6]]
    groups = apply_ties(
        Problem(matrices), PlanRequest("mxq", ties=("q_proj,k_proj", "k_proj,v_proj"))
    )
    assert groups.groups == ((0, 1, 2),)


@given(st.lists(st.sets(st.integers(0, 20), min_size=1), max_size=12))
def test_merged_groups_are_components(groups):
    merged = merge_groups(groups)
    members = [i for group in merged for i in group]
    assert len(members) == len(set(members))
    assert set(members) == set().union(*groups)
    for group in groups:
        assert sum(group <= set(whole) for whole in merged) == 1
    for whole in merged:  # each merged group is connected
        inside = [group for group in groups if group <= set(whole)]
        reached, before = set(inside[0]), None
        while reached != before:
            before = set(reached)
            reached |= set().union(*(group for group in inside if group & reached))
        assert reached == set(whole)
