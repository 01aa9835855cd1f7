"""High-impact ratios: row scores and M against their definitions, plans against brute force."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from lsq_core.bits import RATIOS, mixed_rows
from lsq_core.cli.program import main
from lsq_core.errors import InputError
from lsq_core.model.architecture import get_weight
from lsq_core.model.info import Matrix
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from lsq_core.planning.block_plans import (
    block_front,
    clip_negative_eigenvalues,
    combine,
    diagonal_only,
    predicted_loss,
)
from lsq_core.planning.make import make_frontier, make_plan
from lsq_core.planning.methods.high_impact import build_impact, effective_matrix, group_into_units
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling import interactions as measuring
from lsq_core.profiling.calibration import load_calibration
from lsq_core.profiling.interactions import limit_tokens, measure_interactions
from lsq_core.profiling.rows import measure_row_scores
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import get_quantizer
from lsq_core.quantization.task import QuantizationTask
from lsq_core.quantized.convert import quantize_model
from lsq_core.session import Session
from lsq_core.stages.plan import request_incompatibility
from lsq_core.store.profiles import InteractionKey
from lsq_core.store.store import Store
from tests.helpers import nominal_budget

OPTIONS = mixed_rows(2, 3, 128)


# --- row scores ---------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2-conv1d", "gpt-oss-moe"])
def test_row_scores_match_mean_squared_gradients(random_model, architecture):
    loaded = load_model(ModelSource(str(random_model(architecture))), "cpu")
    ids = torch.randint(0, 4096, (3, 24), generator=torch.Generator().manual_seed(0))
    found = measure_row_scores(loaded, ids)
    model = load_model(ModelSource(str(random_model(architecture))), "cpu").model
    model.requires_grad_(True)
    expected = {m.name: 0.0 for m in loaded.info.matrices}
    for sequence in ids:
        model.zero_grad()
        model(sequence[None], labels=sequence[None]).loss.backward()
        gradients = model.state_dict(keep_vars=True)
        for matrix in loaded.info.matrices:
            grad = _gradient(gradients, matrix, model)
            expected[matrix.name] += grad.double().square().mean(1).numpy() / len(ids)
    for name, scores in found.items():
        np.testing.assert_allclose(scores, expected[name], rtol=1e-4, atol=1e-20)
    assert not any(p.requires_grad or p.grad is not None for p in loaded.model.parameters())


def _gradient(parameters: dict, matrix: Matrix, model: torch.nn.Module) -> torch.Tensor:
    """Return a matrix's gradient, (out, in), without using the code under test."""
    if matrix.expert is None:
        grad = parameters[f"{matrix.name}.weight"].grad
        return grad.T if "Conv1D" in type(model.get_submodule(matrix.name)).__name__ else grad
    grad = parameters[matrix.name.rsplit(".", 1)[0]].grad[matrix.expert]
    return grad.T if grad.shape[0] == matrix.in_features else grad


def test_row_scores_resume_from_checkpoint(random_model, tmp_path):
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")
    ids = torch.randint(0, 4096, (20, 8), generator=torch.Generator().manual_seed(0))
    whole = measure_row_scores(loaded, ids)

    class Interrupted(Exception):
        pass

    def interrupt(done: int, total: int, message: str) -> None:
        if done == 18:
            raise Interrupted

    path = tmp_path / "scores.npz"
    with pytest.raises(Interrupted):
        measure_row_scores(loaded, ids, interrupt, path)
    done_counts = []
    again = measure_row_scores(loaded, ids, lambda done, *_: done_counts.append(done), path)
    assert done_counts[0] == 16
    assert all((again[name] == whole[name]).all() for name in whole)
    path.write_bytes(path.read_bytes()[:-40])
    observed = []
    again = measure_row_scores(loaded, ids, lambda *update: observed.append(update), path)
    assert "scores.npz is damaged" in observed[0][2]
    assert observed[1][0] == 0
    assert all((again[name] == whole[name]).all() for name in whole)


# --- interactions -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(random_model):
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")
    ids = torch.randint(0, 4096, (2, 16), generator=torch.Generator().manual_seed(1))
    return loaded, ids, measure_row_scores(loaded, ids)


def quantized_outputs(loaded, ids, scores, chosen, layer, loss):
    """Return outputs with mixed rows in some matrices, without using the code under test."""
    rows = {
        m.name: np.argsort(-scores[m.name])[: option.high_rows(m.out_features)]
        for m, option in chosen.items()
    }
    model = quantize_model(QuantizationTask(loaded, chosen, rows=rows), get_quantizer("rtn"))
    with torch.inference_mode():
        if loss == "model":
            return model(ids).logits.double()
        states = model(ids, output_hidden_states=True).hidden_states
        return states[layer + 1].double()


@pytest.mark.parametrize("loss", ["block", "model"])
def test_interactions_match_whole_model_losses(small, loss):
    """M of layer 0, whose hidden state has no final norm, from entire quantized models."""
    loaded, ids, scores = small
    first = next(measure_interactions(loaded, ids, scores, OPTIONS, loss))
    assert first.layer == 0
    own = [m for m in loaded.info.matrices if m.layer == 0]
    assert first.units == tuple(m.type for m in own)
    assert (first.matrix == first.matrix.T).all()
    full = quantized_outputs(loaded, ids, scores, {}, 0, loss)
    scale = full.square().mean() if loss == "block" else 1.0

    def loss_increase(*places: tuple[int, int]) -> float:
        chosen = {own[u]: OPTIONS[m] for u, m in places}
        output = quantized_outputs(loaded, ids, scores, chosen, 0, loss)
        return float((output - full).square().mean() / scale)

    for u, m in ((0, 0), (3, 2), (6, 4)):
        assert first.matrix[5 * u + m, 5 * u + m] == pytest.approx(
            2 * loss_increase((u, m)), rel=1e-3
        )
    for a, b in (((4, 0), (5, 1)), ((3, 4), (6, 0))):
        expected = loss_increase(a, b) - loss_increase(a) - loss_increase(b)
        place = 5 * a[0] + a[1], 5 * b[0] + b[1]
        assert first.matrix[place] == pytest.approx(expected, rel=1e-2, abs=1e-4 * loss_increase(a))
    tiles = first.matrix.reshape(7, 5, 7, 5)
    for u in range(7):
        assert not (tiles[u, :, u, :] - np.diag(np.diag(tiles[u, :, u, :]))).any()


def test_interactions_restore_weights_and_skip_known_layers(small):
    loaded, ids, scores = small
    before = {m: get_weight(loaded.model, m).clone() for m in loaded.info.matrices}
    observed = []
    found = list(
        measure_interactions(
            loaded,
            ids[:1, :8],
            scores,
            OPTIONS,
            "block",
            known=[0],
            progress=lambda done, total, _: observed.append((done, total)),
        )
    )
    assert [block.layer for block in found] == [1]
    assert observed[0] == (561, 1122)
    assert all(torch.equal(get_weight(loaded.model, m), w) for m, w in before.items())


def test_few_tokens_shape():
    ids = torch.arange(6 * 512).view(6, 512)
    assert limit_tokens(ids, "block").shape == (2, 512)
    assert limit_tokens(ids, "model").shape == (1, 256)


def test_interactions_group_experts_into_units(random_model):
    """The experts of a layer are changed together."""
    loaded = load_model(ModelSource(str(random_model("mixtral-moe"))), "cpu")
    ids = torch.randint(0, 4096, (1, 8), generator=torch.Generator().manual_seed(1))
    scores = measure_row_scores(loaded, ids)
    first = next(measure_interactions(loaded, ids, scores, OPTIONS[::4], "block"))
    own = [m for m in loaded.info.matrices if m.layer == 0]
    units = group_into_units(own)
    assert first.units == tuple(units)
    assert max(len(members) for members in units.values()) == 4
    assert first.matrix.shape == (2 * len(units),) * 2


@pytest.fixture(scope="module")
def demo():
    """The demo model, tokens to measure losses on, and row scores of four other sequences."""
    loaded = load_model(ModelSource("demo"), "cpu")
    blocks = load_calibration(loaded, ProfileSettings().text)
    ids = torch.from_numpy(blocks.ids)
    return loaded, ids[4:5, :256], measure_row_scores(loaded, ids[:4, :256])


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "layer"), [("block", 12), ("model", 21)])
def test_predicted_loss_ranks_like_measured_loss(demo, loss, layer):
    """Slow: M of a block of the demo model takes 561 evaluations, and each plan another one.

    M is symmetric, the loss falls as ratios grow, a slack budget gives nearly all matrices the
    largest ratio, and ½·δᵀMδ ranks random plans like the measured loss of quantized models.
    """
    loaded, ids, scores = demo
    others = [k for k in range(loaded.info.layers) if k != layer]
    (block,) = measure_interactions(loaded, ids, scores, OPTIONS, loss, known=others)
    assert (block.matrix == block.matrix.T).all()
    alone = np.diag(block.matrix).reshape(7, 5)
    # The loss of one unimportant matrix may rise slightly; their sum falls at each step.
    assert (alone[:, -1] < alone[:, 0]).sum() >= 6
    assert (np.diff(alone.sum(axis=0)) < 0).all()
    random = np.random.default_rng(0)
    choices = np.concatenate([random.integers(0, 5, (40, 7)), np.full((1, 7), 4)])
    own = [m for m in loaded.info.matrices if m.layer == layer]
    full = quantized_outputs(loaded, ids, scores, {}, layer, loss)
    measured = []
    for choice in choices:
        chosen = {m: OPTIONS[option] for m, option in zip(own, choice, strict=True)}
        output = quantized_outputs(loaded, ids, scores, chosen, layer, loss)
        measured.append(float((output - full).square().mean()))
    predicted = predicted_loss(block.matrix, choices, 5)
    rho = spearmanr(predicted, measured).statistic
    print(f"{loss} loss, layer {layer}: Spearman {rho:.3f} over 41 plans")
    assert rho > 0.9
    if loss == "block":
        scale = full.square().mean()
        np.testing.assert_allclose(predicted, np.array(measured) / float(scale), rtol=0.25)
    matrices = tuple(own)
    slack = Problem(matrices, options=OPTIONS)
    slack = replace(slack, impact=build_impact(matrices, scores, {layer: block.matrix}))
    widest = make_frontier(slack, PlanRequest("high-impact")).segments[-1].start
    assert widest.mean() > 3.5


# --- plans --------------------------------------------------------------------------------------


def random_interactions(
    units: int, random: np.random.Generator, coupling: float = 0.3
) -> np.ndarray:
    """Return an M like measured ones: it falls as ratios grow, and units interact."""
    fall = np.array([0.98, 0.93, 0.85, 0.78, 0.72])
    base = np.exp(random.normal(size=units))
    tiles = np.zeros((units, 5, units, 5))
    for u in range(units):
        tiles[u, :, u, :] = np.diag(2 * base[u] * fall ** random.uniform(1, 2))
    for u, v in itertools.combinations(range(units), 2):
        both = coupling * random.normal() * np.sqrt(base[u] * base[v]) * np.outer(fall, fall)
        tiles[u, :, v, :] = both * random.normal(1, 0.05, (5, 5))
        tiles[v, :, u, :] = tiles[u, :, v, :].T
    return tiles.reshape(5 * units, 5 * units)


def problem(layers: int = 3, seed: int = 0, types: int = 3, **more: object) -> Problem:
    random = np.random.default_rng(seed)
    matrices = tuple(
        Matrix(f"m.layers.{k}.t{u}", k, f"t{u}", 64 * int(random.integers(1, 4)), 128)
        for k in range(layers)
        for u in range(types)
    )
    scores = {m.name: random.random(m.out_features) for m in matrices}
    found = {k: random_interactions(types, random, **more) for k in range(layers)}
    return Problem(matrices, options=OPTIONS, impact=build_impact(matrices, scores, found))


def all_plans(small: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the choices, bytes and loss (by the quadratic form) of all possible plans."""
    choices = np.array(list(itertools.product(range(5), repeat=len(small.matrices))))
    size = small.bytes[np.arange(len(small.matrices)), choices].sum(axis=1)
    loss = np.zeros(len(choices))
    for block in small.impact.blocks:
        delta = np.zeros((len(choices), len(block.units) * 5))
        for u, (i,) in enumerate(block.units):
            delta[np.arange(len(choices)), 5 * u + choices[:, i]] = 1
        loss += 0.5 * np.einsum("ki,ij,kj->k", delta, block.matrix, delta)
    return choices, size, loss


@pytest.mark.parametrize("seed", range(6))
def test_plan_within_0_1_percent_of_brute_force(seed):
    small = problem(layers=4, types=2, seed=seed)
    _, size, loss = all_plans(small)
    for budget in np.linspace(size.min(), size.max(), 60):
        plan = make_plan(small, PlanRequest("high-impact", budget=nominal_budget(budget, small)))
        best = loss[size <= budget * (1 + 1e-9)].min()
        assert plan.nominal_bytes <= budget * (1 + 1e-9)
        assert plan.objective <= best + 1e-3 * abs(best)
        assert plan.lower_bound <= best + 1e-9 * abs(best)
        choice = [OPTIONS.index(c) for c in plan.configs]
        observed = sum(
            predicted_loss(b.matrix, np.array([choice[i] for (i,) in b.units]), 5)[0]
            for b in small.impact.blocks
        )
        assert plan.objective == pytest.approx(observed)


def test_frontier_large_model_gap_to_bound():
    """With 32 blocks of seven, fronts are thinned; most plans are within 0.1 % of the bound."""
    large = problem(layers=32, types=7)
    frontier = make_frontier(large, PlanRequest("high-impact"))
    gaps = (frontier.losses - frontier.lower_bounds) / frontier.losses
    assert (gaps > -1e-9).all()
    assert np.median(gaps) < 1e-3
    assert gaps.max() < 1e-2
    assert (np.diff(frontier.losses) < 0).all()


def test_block_front_matches_brute_force():
    random = np.random.default_rng(3)
    matrix, size = (
        random_interactions(3, random),
        random.integers(1, 50, (3, 5)).cumsum(axis=1) * 1.0,
    )
    front = block_front(matrix, size, np.ones((3, 5), dtype=bool))
    choices = np.array(list(itertools.product(range(5), repeat=3)))
    sizes = size[np.arange(3), choices].sum(axis=1)
    losses = predicted_loss(matrix, choices, 5)
    for own, loss, choice in zip(front.size, front.loss, front.choice, strict=True):
        assert loss == pytest.approx(losses[sizes <= own].min())
        assert loss == pytest.approx(predicted_loss(matrix, choice, 5)[0])
    assert front.loss[-1] == pytest.approx(losses.min())


def test_diagonal_ratios_loss_is_sum_of_diagonal():
    """Without interactions, the loss is the sum of the matrices' own losses."""
    small = problem(layers=2, types=3)
    frontier = make_frontier(small, PlanRequest("high-impact", ratios="diagonal"))
    for segment, loss in zip(frontier.segments, frontier.losses, strict=True):
        own = 0.0
        for block in small.impact.blocks:
            places = [5 * u + segment.start[i] for u, (i,) in enumerate(block.units)]
            own += np.diag(block.matrix)[places].sum() / 2
        assert loss == pytest.approx(own)


def test_uniform_ratios_give_five_plans():
    small = problem()
    frontier = make_frontier(small, PlanRequest("high-impact", ratios="uniform"))
    assert [set(s.start.tolist()) for s in frontier.segments] == [{i} for i in range(5)]
    unmeasured = replace(small, impact=build_impact(small.matrices, _scores(small), {}))
    bare = make_frontier(unmeasured, PlanRequest("high-impact", ratios="uniform"))
    assert bare.losses is None
    with pytest.raises(InputError, match=r"b2h3g128 .*model loss"):
        make_frontier(unmeasured, PlanRequest("high-impact", loss="model"))


def _scores(small: Problem) -> dict[str, np.ndarray]:
    return {m.name: s for m, s in zip(small.matrices, small.impact.row_scores, strict=True)}


def test_large_budget_assigns_largest_ratio():
    large = problem(layers=12, types=7, coupling=0.02)
    widest = make_frontier(large, PlanRequest("high-impact")).segments[-1].start
    assert (widest == 4).mean() > 0.95


def test_pins_are_respected():
    small = problem(layers=4)
    request = PlanRequest(
        "high-impact",
        budget=nominal_budget(1.5 * small.feasible[0], small),
        pins=("*.layers.1.*=b2h3r20g128", "*.layers.2.*=b2h3r02g128..b2h3r10g128"),
    )
    low, high = small.feasible
    for share in (0.4, 0.8):
        plan = make_plan(
            small, replace(request, budget=nominal_budget(low + share * (high - low), small))
        )
        for matrix, config in plan.choice.items():
            assert matrix.layer != 1 or config.ratio == 0.20
            assert matrix.layer != 2 or config.ratio <= 0.10
        assert any("The pins cost" in note for note in plan.notes)
    with pytest.raises(InputError, match="'b4g64'"):
        make_plan(small, replace(request, budget=nominal_budget(high, small), pins=("*=b4g64",)))


def test_plan_rows_have_highest_scores_and_nest():
    small = problem()
    plans = [
        make_plan(
            small, PlanRequest("high-impact", ratios="uniform", budget=nominal_budget(size, small))
        )
        for size in (small.feasible[0], small.feasible[1])
    ]
    for i, matrix in enumerate(small.matrices):
        few, many = (set(plan.rows[matrix.name]) for plan in plans)
        assert few < many
        scores = small.impact.row_scores[i]
        assert min(scores[list(many)]) >= max(np.delete(scores, list(many)))


def test_infeasible_requests_raise():
    small = problem()
    with pytest.raises(InputError, match="takes a budget"):
        make_plan(small, PlanRequest("high-impact", base="3.13"))
    with pytest.raises(InputError, match="chooses all matrices jointly"):
        make_plan(
            small,
            PlanRequest("high-impact", budget=nominal_budget(small.feasible[1], small), exact=True),
        )
    with pytest.raises(InputError, match="out of reach"):
        make_plan(small, PlanRequest("high-impact", budget="4bpp"))
    with pytest.raises(InputError, match="block, model"):
        PlanRequest("high-impact", loss="logits")
    with pytest.raises(InputError, match="uniform, diagonal, full"):
        PlanRequest("high-impact", ratios="best")
    with pytest.raises(InputError, match="need row scores"):
        make_frontier(replace(small, impact=None), PlanRequest("high-impact"))
    odd = Problem((Matrix("m.0.odd", 0, "odd", 64, 96),), options=OPTIONS)
    odd = replace(odd, impact=build_impact(odd.matrices, {"m.0.odd": np.ones(64)}, {}))
    with pytest.raises(InputError, match=r"m\.0\.odd \(64×96\)"):
        make_frontier(odd, PlanRequest("high-impact", ratios="uniform"))


def problem_with_576_columns(group_size: int) -> tuple[Problem, PlanRequest]:
    """Return a problem with a 576-column matrix, and a request for uniform ratios."""
    matrices = (Matrix("m.0.q", 0, "q", 128, 128), Matrix("m.0.k", 0, "k", 192, 576))
    impact = build_impact(matrices, {m.name: np.ones(m.out_features) for m in matrices}, {})
    request = PlanRequest("high-impact", budget="2.4bpp", group_size=group_size, ratios="uniform")
    return Problem(matrices, options=mixed_rows(2, 3, group_size), impact=impact), request


def test_indivisible_rows_raise_before_budget():
    """With groups of 128, plans used to range "from inf bpp (inf GiB) to -inf bpp"."""
    whole, request = problem_with_576_columns(128)
    for call in (
        lambda: whole.feasible,
        lambda: request.resolve_budget(whole),
        lambda: make_plan(whole, request),
        lambda: request_incompatibility(whole, request, "hqq", 1),
    ):
        with pytest.raises(InputError, match=r"m\.0\.k \(192×576\) .*groups of 128") as error:
            call()
        assert "inf" not in str(error.value)


def test_rows_divisible_by_64_are_planned():
    whole, request = problem_with_576_columns(64)
    low, high = whole.feasible
    assert 0 < low < high < np.inf
    assert make_plan(whole, request).rows["m.0.k"]


def test_clipped_removes_negative_eigenvalues():
    matrix = random_interactions(4, np.random.default_rng(0), coupling=2.0)
    assert np.linalg.eigvalsh(matrix).min() < 0
    clipped_matrix = clip_negative_eigenvalues(matrix)
    assert np.linalg.eigvalsh(clipped_matrix).min() > -1e-12
    assert np.linalg.norm(clipped_matrix - matrix) == pytest.approx(
        np.linalg.norm(np.minimum(np.linalg.eigvalsh(matrix), 0))
    )
    small = problem(coupling=2.0)
    block, request = small.impact.blocks[0], PlanRequest("high-impact", clip=True)
    assert (effective_matrix(block, request) == clip_negative_eigenvalues(block.matrix)).all()
    diagonal = replace(request, ratios="diagonal", clip=False)
    assert (effective_matrix(block, diagonal) == diagonal_only(block.matrix)).all()


def test_plan_eleven_module_types_adds_note():
    """Blocks of eleven matrices are enumerated in groups, and a note says so."""
    many = problem(layers=2, types=11)
    plan = make_plan(
        many, PlanRequest("high-impact", budget=nominal_budget(many.feasible[1], many))
    )
    assert "11 module types" in plan.notes[0]
    seven = problem(layers=1, types=7)
    budget = nominal_budget(seven.feasible[1], seven)
    assert make_plan(seven, PlanRequest("high-impact", budget=budget)).notes == ()


def test_plan_experts_share_ratio():
    random = np.random.default_rng(0)
    matrices = tuple(
        Matrix(f"m.0.{kind}.{e}", 0, kind, 64, 128, e) for kind in ("up", "down") for e in range(3)
    )
    scores = {m.name: random.random(64) for m in matrices}
    moe = Problem(
        matrices, impact=build_impact(matrices, scores, {0: random_interactions(2, random)})
    )
    moe = moe.with_options(OPTIONS)
    for segment in make_frontier(moe, PlanRequest("high-impact")).segments:
        assert len(set(segment.start[:3])) == len(set(segment.start[3:])) == 1
    middle = nominal_budget(sum(moe.feasible) / 2, moe)
    one = PlanRequest("high-impact", budget=middle, pins=("*.up.0=b2h3r20g128",))
    plan = make_plan(moe, one)
    assert {c.ratio for m, c in plan.choice.items() if m.type == "up"} == {0.20}
    both = replace(one, pins=("*.up.0=b2h3r20g128", "*.up.1=b2h3r02g128"))
    with pytest.raises(InputError, match="different ratios"):
        make_plan(moe, both)


def test_combine_is_order_independent():
    random = np.random.default_rng(5)
    size = np.tile(np.arange(1.0, 6) ** 2, (2, 1))
    fronts = [
        block_front(random_interactions(2, random), size, np.ones((2, 5), bool)) for _ in range(3)
    ]
    one, other = combine(fronts), combine(fronts[::-1])
    np.testing.assert_allclose(one.size, other.size)
    np.testing.assert_allclose(one.loss, other.loss)


# --- end to end ---------------------------------------------------------------------------------


def command(model: object, text: object, *more: str) -> list[str]:
    return [
        *("--model", str(model), "--device", "cpu", "--method", "high-impact"),
        *("--calibration", str(text), "--samples", "60", "--block-tokens", "128", *more),
    ]


@pytest.fixture
def few(monkeypatch) -> None:
    """Measure losses on eight tokens, for tests in which the values don't matter."""
    monkeypatch.setattr(measuring, "LOSS_TOKENS", {"block": 8, "model": 8})


def test_cli_high_impact_plan_run_audit_eval(random_model, small_text, tmp_path, capsys, few):
    model, saved = random_model("llama-gqa"), tmp_path / "saved"
    out = tmp_path / "plan.json"
    options_given = command(model, small_text, "--budget", "2.24bpp")
    assert main(["plan", *options_given, "--out", str(out), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    entry = next(iter(plan["modules"].values()))
    assert entry["bits"] == 2
    assert (entry["high_bits"], entry["group_size"]) == (3, 128)
    assert entry["ratio"] in RATIOS
    assert plan["bits_per_param"] <= 2.24
    assert plan["gap"] >= 0
    assert "rows have different bits" in plan["predicted"]["reason"]
    evaluation = ["--corpus", str(small_text), "--max-tokens", "600"]
    options_given = ["--model", str(model), "--device", "cpu", *evaluation, "--quantizer", "rtn"]
    assert main(["run", *options_given, "--plan", str(out), "--save", str(saved), "--json"]) == 0
    run = json.loads(capsys.readouterr().out)
    assert run["measured_bytes"] == plan["planned_bytes"]
    assert run["modules"] == plan["modules"]
    assert main(["audit", str(saved)]) == 0
    assert "are as planned" in capsys.readouterr().out
    assert main(["eval", "--model", str(saved), "--device", "cpu", *evaluation, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] == pytest.approx(run["perplexity"])


def test_cli_high_impact_bad_options_exit_2(random_model, small_text, capsys, few):
    model = random_model("llama-gqa")
    for more, sentence in {
        ("--budget", "3bpp"): "range from",
        ("--budget", "2.2bpp", "--high-bits", "2"): "high-bits must be one of 3, 4, 16, not 2",
        ("--max-loss", "1%"): "Give a budget instead of max-loss",
        ("--budget", "2.2bpp", "--ratios", "best"): "ratios must be one of",
    }.items():
        assert main(["plan", *command(model, small_text, *more)]) == 2
        assert sentence in capsys.readouterr().err


def test_cli_sweep_high_impact_with_uniform(random_model, small_text, capsys, few):
    options_given = command(random_model("llama-gqa"), small_text, "--method", "uniform")
    options_given += ["--budget", "2.24bpp", "--corpus", str(small_text), "--max-tokens", "300"]
    for state in ("done", "found"):
        assert main(["sweep", *options_given, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["counts"][state] == 2


def test_interactions_resume_block_by_block(random_model, small_text, few):
    """An interrupted measurement resumes at the next block; a finished one is reused."""
    source = ModelSource(str(random_model("llama-gqa")))
    settings = ProfileSettings(calibration=str(small_text), samples=60, block_tokens=128)
    request = PlanRequest("high-impact", budget="2.24bpp", loss="model")

    class Interrupted(Exception):
        pass

    def interrupt(stage: str, done: int, total: int, message: str) -> None:
        if "layer 2 of 2" in message:
            raise Interrupted

    with pytest.raises(Interrupted):
        Session(source, Store(), "cpu", report=interrupt).plan(request, settings)
    session = Session(source, Store(), "cpu")
    key, kind = session.profile_key(settings), InteractionKey("model", 2, 3, 128)
    first = Store().interactions(key, kind)
    assert list(first) == [0]
    messages = []
    session.report = lambda stage, done, total, message: messages.append((stage, message))
    plan = session.plan(request, settings)
    assert plan.profile is None
    rows = [message for stage, message in messages if stage == "rows"]
    assert rows
    assert not any("layer 1 of 2" in message or "sequence" in message for message in rows)
    kept = Store().interactions(key, kind)
    assert (kept[0] == first[0]).all()
    observed = Store().query("SELECT provenance FROM interactions")["provenance"]
    assert {json.loads(text)["tokens"] for text in observed} == {8}
    messages.clear()
    again = session.plan(request, settings)
    assert again.modules == plan.modules
    assert not [1 for stage, _ in messages if stage == "rows"]
