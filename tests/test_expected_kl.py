"""The expected KL divergence against a plain loop and against measured divergences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lsq_core.bits import LADDER, QuantConfig, is_divisible
from lsq_core.model.architecture import get_weight, locate_parameter, matrix_view, parameter_name
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from lsq_core.planning.hull import hull_frontier
from lsq_core.planning.methods import PLANNERS
from lsq_core.profiling import backward
from lsq_core.profiling.calibration import load_calibration
from lsq_core.profiling.measure import measure_profile
from lsq_core.profiling.metrics.expected_kl import ExpectedKl
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.packed import quantize_matrix
from lsq_core.quantization.registry import get_quantizer
from lsq_core.session import Session
from lsq_core.stages.plan import build_problem
from lsq_core.store.store import Store
from tests.campaigns import cross_terms
from tests.conftest import ARCHITECTURES
from tests.test_plan import problem as random_problem

METRIC = ("expected_kl",)


@pytest.fixture
def settings(small_text):
    return ProfileSettings(
        calibration=str(small_text), samples=24, block_tokens=48, quantizer="rtn", metadata="fp16"
    )


def plain_scores(loaded, settings):
    """Return scores from one full backward pass per sequence and draw, summed in float64."""
    ids = torch.from_numpy(load_calibration(loaded, settings.text).ids)
    sequences = ids[: backward.MAX_SEQUENCES]
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for matrix in loaded.info.matrices:
        weight = get_weight(loaded.model, matrix)
        for config in LADDER:
            if is_divisible(matrix.numel, config.group_size):
                quantized = quantize_matrix(
                    weight, config, get_quantizer("rtn"), axis=1, metadata="fp16"
                ).dequantize()
                changes[matrix.name, config.name] = (quantized - weight).double()
    sums = dict.fromkeys(changes, 0.0)
    for sequence in sequences:
        log_probs = loaded.model(sequence[None], use_cache=False).logits[0].float().log_softmax(-1)
        labels = torch.multinomial(
            log_probs.exp(), backward.DRAWS, replacement=True, generator=generator
        )
        for drawn in labels.T:
            for parameter in loaded.model.parameters():
                parameter.requires_grad_(True)
                parameter.grad = None
            logits = loaded.model(sequence[None], use_cache=False).logits[0].float()
            torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
            for matrix in loaded.info.matrices:
                holder, _ = locate_parameter(loaded.model, matrix)
                gradient = loaded.model.get_parameter(parameter_name(matrix)).grad
                own = matrix_view(gradient, holder, matrix).double()
                for config in LADDER:
                    if (key := (matrix.name, config.name)) in changes:
                        sums[key] += float((own * changes[key]).sum()) ** 2
    samples = sequences.numel() * backward.DRAWS
    return {key: 0.5 * total / samples for key, total in sums.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_expected_kl_matches_plain_loop(architecture, random_model, settings):
    folder = random_model(architecture)
    loaded = load_model(ModelSource(str(folder)), "cpu")
    before = {n: t.clone() for n, t in loaded.model.state_dict().items()}
    profile = measure_profile(loaded, settings, "key", metrics=METRIC)
    assert all(torch.equal(before[n], t) for n, t in loaded.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    expected = plain_scores(load_model(ModelSource(str(folder)), "cpu"), settings)
    table = profile.by_config("expected_kl")
    assert np.isfinite(table).sum() > 0
    for matrix, scores in zip(profile.matrices, table, strict=True):
        for config, score in zip(LADDER, scores, strict=True):
            wanted = expected.get((matrix.name, config.name), np.nan)
            if np.isnan(score):
                assert np.isnan(wanted) or (matrix.expert is not None and wanted == 0)
            else:
                assert score == pytest.approx(wanted, rel=2e-4, abs=1e-12), matrix.name


@pytest.mark.slow
def test_sums_are_close_to_what_is_measured():
    """Uniform plans of the demo model on the same text; measuring takes half a minute."""
    loaded = load_model(ModelSource("demo"), "cpu")
    settings = ProfileSettings("rtn")
    profile = measure_profile(loaded, settings, "key", metrics=METRIC)
    table = profile.by_config("expected_kl")
    cost = PLANNERS["kl-aware"].cost(build_problem(loaded.info, profile))
    assert np.array_equal(cost, table, equal_nan=True)
    blocks = load_calibration(loaded, settings.text).ids[: ExpectedKl.sequences]
    sequences = backward.cut_sequences(torch.from_numpy(blocks))
    assert sequences.shape == (backward.MAX_SEQUENCES, backward.SEQUENCE_TOKENS)
    original = {m: get_weight(loaded.model, m).clone() for m in loaded.info.matrices}
    with torch.no_grad():
        full = loaded.model(sequences, use_cache=False).logits.log_softmax(-1)
        for config in (QuantConfig(3, 64), QuantConfig(4, 64)):
            for matrix, weight in original.items():
                changed = get_quantizer("rtn").round_trip(weight, config, 1, "8bit")
                get_weight(loaded.model, matrix).copy_(changed)
            quantized = loaded.model(sequences, use_cache=False).logits.log_softmax(-1)
            measured = float((full.exp() * (full - quantized)).sum(-1).mean())
            expected = table[:, LADDER.index(config)].sum()
            assert measured == pytest.approx(expected, rel=0.15), config.name


def test_streamed_profile_equals_loaded(random_model, settings, tmp_path):
    folder = random_model("llama-gqa")
    session = Session(ModelSource(str(folder)), Store(tmp_path / "lsq.duckdb"), "cpu")
    streamed = session.profile(settings, METRIC)
    assert not session.is_loaded
    assert streamed.provenance["streamed"]
    loaded = load_model(ModelSource(str(folder)), "cpu")
    expected = measure_profile(loaded, settings, "key", metrics=METRIC).by_config("expected_kl")
    assert streamed.by_config("expected_kl") == pytest.approx(expected, rel=1e-5, nan_ok=True)


# --- cross terms -------------------------------------------------------------------------------


@pytest.fixture
def pairs():
    """A problem, and samples of its matrices whose scale halves from stop to stop."""
    of = random_problem(layers=4)
    random = np.random.default_rng(0)
    shape = (len(of.matrices), 16, 1)
    values = random.standard_normal((*shape[:2], len(LADDER))) + random.standard_normal(shape)
    return of, cross_terms.Samples(values * 2.0 ** -np.arange(len(LADDER)))


def test_estimates_of_a_choice_match_a_plain_loop(pairs):
    of, samples = pairs
    choice = np.arange(len(of.matrices)) % len(LADDER)
    own = [[samples.values[i, s, c] for s in range(16)] for i, c in enumerate(choice)]
    joint = np.mean([sum(row[s] for row in own) ** 2 for s in range(16)])
    summed = sum(np.mean([value**2 for value in row]) for row in own)
    assert samples.joint(choice) == pytest.approx(joint)
    assert samples.summed(choice) == pytest.approx(summed)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_no_single_change_improves_a_choice(pairs, share):
    of, samples = pairs
    price = 1e-8

    def cost(choice):
        alone, joint = samples.summed(choice), samples.joint(choice)
        return alone + share * (joint - alone) + price * of.nominal(choice)

    found = cross_terms._descend(samples, of, share, price, of.at_most(len(LADDER) - 1))
    assert 0 < found.mean() < len(LADDER) - 1, "the price decides nothing"
    for i in range(len(found)):
        for stop in np.flatnonzero(of.allowed[i]):
            other = found.copy()
            other[i] = stop
            assert cost(other) >= cost(found) * (1 - 1e-12)


def test_choice_without_products_is_the_knapsacks(pairs):
    of, samples = pairs
    budget = 3.5 * of.total / 8
    (segment,) = hull_frontier(samples.alone, of).segments
    expected = segment.after(segment.count_within(budget))
    np.testing.assert_array_equal(cross_terms.choose(samples, of, 0.0, budget), expected)
