"""Quantization commutes with scaling: a matrix times 2^k is stored as accurately."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from lsq_core.bits import QuantConfig, mixed_rows
from lsq_core.errors import LsqError
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from lsq_core.profiling.measure import measure_profile
from lsq_core.profiling.metrics.weight_error import squared_distances
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.hybrid import LearnedMatrix
from lsq_core.quantization.magnitude import normalizing_exponent, scale_by_power_of_two
from lsq_core.quantization.packed import quantize_matrix
from lsq_core.quantization.registry import get_quantizer, planned_bytes
from lsq_core.quantization.rows import quantize_config
from lsq_core.quantization.task import QuantizationTask
from lsq_core.quantized.artifact import load_quantized, save_quantized
from lsq_core.quantized.convert import quantize_model
from lsq_core.quantized.modules import PackedLinear
from lsq_core.results.audit import audit_folder
from lsq_core.store.store import Store
from tests.conftest import save_random_model

FORMAT_2_MODEL = Path(__file__).parent / "data" / "saved_format_2"
SHAPE = (32, 256)


def normal_matrix(seed: int = 0, shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_matrix(kind: str, seed: int) -> torch.Tensor:
    """Return a (32, 256) matrix with σ = 0.02 and a feature that is hard to quantize."""
    weight = normal_matrix(seed)
    if kind == "constant groups":
        weight[3], weight[5] = 0.017, -0.4
    elif kind == "zero groups":
        weight[::4] = 0
    elif kind == "huge groups":
        weight[7] *= 2e4
    elif kind == "one outlier":
        weight[9, 130] = 1e6
    elif kind == "far from zero":
        weight[11] = 3 + weight[11] / 100
    elif kind == "all zero":
        weight[:] = 0
    elif kind == "all constant":
        weight[:] = 0.02
    return weight


KINDS = (
    "plain",
    "constant groups",
    "zero groups",
    "huge groups",
    "one outlier",
    "far from zero",
    "all zero",
    "all constant",
)


def relative_error(actual: torch.Tensor, weight: torch.Tensor) -> float:
    """Return the relative error, in float64 because squares can leave the range of float32."""
    norm = weight.double().norm()
    return float((actual.double() - weight.double()).norm() / norm) if norm else 0.0


@st.composite
def scaled_matrices(draw) -> tuple[torch.Tensor, int]:
    """Draw a matrix and a k for which its largest weight stays finite, and most stay normal."""
    weight = make_matrix(draw(st.sampled_from(KINDS)), draw(st.integers(0, 99)))
    largest = float(weight.abs().amax()) or 1.0
    k = draw(st.integers(-110, 126 - int(np.ceil(np.log2(largest)))))
    return weight, k


CONFIGS = [QuantConfig(bits, group) for bits in (2, 3, 4, 8) for group in (64, 128)]


@settings(deadline=None, max_examples=150)
@given(
    scaled_matrices(),
    st.sampled_from(CONFIGS),
    st.sampled_from(["8bit", "fp16"]),
    st.sampled_from([0, 1]),
    st.sampled_from(["hqq", "rtn"]),
)
def test_quantize_matrix_commutes_with_power_of_two(scaled, config, metadata, axis, name):
    """Codes are identical, and so are weights, except in the lowest binades of float32."""
    weight, k = scaled
    quantizer = get_quantizer(name)
    base = quantize_matrix(weight, config, quantizer, axis=axis, metadata=metadata)
    shifted = quantize_matrix(
        scale_by_power_of_two(weight, k), config, quantizer, axis=axis, metadata=metadata
    )
    assert torch.equal(shifted.codes, base.codes)
    assert shifted.nbytes == planned_bytes(name, SHAPE, config, metadata)
    decoded = shifted.dequantize()
    assert bool(decoded.isfinite().all())
    expected = scale_by_power_of_two(base.dequantize(), k)
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=0)
    trip = quantizer.round_trip(scale_by_power_of_two(weight, k), config, axis, metadata)
    assert torch.equal(trip, decoded)


@settings(deadline=None, max_examples=60)
@given(scaled_matrices(), st.sampled_from(["nf4", "nf4-dq"]))
def test_nf4_commutes_with_power_of_two(scaled, name):
    weight, k = scaled
    config = QuantConfig(4, 64)
    base = quantize_matrix(weight, config, get_quantizer(name))
    shifted = quantize_matrix(scale_by_power_of_two(weight, k), config, get_quantizer(name))
    assert torch.equal(shifted.codes, base.codes)
    expected = scale_by_power_of_two(base.dequantize(), k)
    torch.testing.assert_close(shifted.dequantize(), expected, rtol=1e-4, atol=0)


@settings(deadline=None, max_examples=60)
@given(
    scaled_matrices(),
    st.sampled_from([*mixed_rows(2, 4, 128), *mixed_rows(3, 16, 64)]),
    st.sampled_from(["8bit", "fp16"]),
    st.sampled_from([0, 1]),
)
def test_mixed_rows_commute_with_power_of_two(scaled, config, metadata, axis):
    weight, k = scaled
    rows = range(9, 9 + config.high_rows(SHAPE[0]))
    result = [
        quantize_config(w, config, get_quantizer("rtn"), rows=rows, axis=axis, metadata=metadata)
        for w in (weight, scale_by_power_of_two(weight, k))
    ]
    assert result[1].nbytes == planned_bytes("rtn", SHAPE, config, metadata)
    expected = scale_by_power_of_two(result[0].dequantize(), k)
    torch.testing.assert_close(result[1].dequantize(), expected, rtol=1e-4, atol=0)


@settings(deadline=None, max_examples=25)
@given(scaled_matrices(), st.sampled_from(["8bit", "fp16"]))
def test_learned_matrix_init_commutes_with_power_of_two(scaled, metadata):
    weight, k = scaled
    (config,) = mixed_rows(2, 4, 64)[-1:]
    rows = range(config.high_rows(SHAPE[0]))
    base, shifted = (
        LearnedMatrix(w, config, rows, 1, metadata)
        for w in (weight, scale_by_power_of_two(weight, k))
    )
    for one, other in (
        (base(), shifted()),
        (base.pack().dequantize(), shifted.pack().dequantize()),
    ):
        expected = scale_by_power_of_two(one.detach(), k)
        torch.testing.assert_close(other.detach(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("metadata", ["8bit", "fp16"])
@pytest.mark.parametrize("name", ["hqq", "rtn"])
@pytest.mark.parametrize("sigma", [1e-30, 2e-5, 2e-4, 1e-3, 0.02, 300.0, 1e30])
def test_relative_error_independent_of_scale(sigma, name, metadata):
    """Without scaling, it was 0.005, 0.07 and 0.8 at 8 bits for σ of 0.02, 0.0002 and 0.00002."""
    weight = normal_matrix() * (sigma / 0.02)
    packed = quantize_matrix(weight, QuantConfig(8, 64), get_quantizer(name), metadata=metadata)
    assert relative_error(packed.dequantize(), weight) == pytest.approx(0.0052, abs=0.0006)


@pytest.mark.parametrize("metadata", ["8bit", "fp16"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@pytest.mark.parametrize("outlier", [2e5, -1e6])
def test_outlier_affects_only_its_group(outlier, config, metadata):
    """With 8-bit metadata, the 127 groups sharing its scale's range lose some accuracy."""
    weight = make_matrix("plain", 1)
    before = quantize_matrix(weight, config, get_quantizer("hqq"), metadata=metadata).dequantize()
    with_outlier = weight.clone()
    with_outlier[9, 130] = outlier
    after = quantize_matrix(
        with_outlier, config, get_quantizer("hqq"), metadata=metadata
    ).dequantize()
    assert after[9, 130] == pytest.approx(outlier, rel=0.01)
    others = torch.ones(SHAPE, dtype=torch.bool)
    others[9, 128:256] = False
    actual, without = (relative_error(w[others], weight[others]) for w in (after, before))
    assert actual < (1.02 if metadata == "fp16" else 2.5) * without


@pytest.mark.parametrize("metadata", ["8bit", "fp16"])
def test_rows_of_different_scales_have_equal_error(metadata):
    """Rows of differently scaled heads have equal relative errors with either metadata."""
    weight, config = normal_matrix(shape=(256, 256)), QuantConfig(4, 64)
    weight[:128] *= 2.0**-13
    actual = quantize_matrix(weight, config, get_quantizer("hqq"), metadata=metadata).dequantize()
    errors = [relative_error(actual[rows], weight[rows]) for rows in (slice(128), slice(128, 256))]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)
    assert errors[1] < 0.11


@pytest.mark.parametrize("name", ["hqq", "rtn"])
def test_quantize_matrix_scale_range_too_wide_raises(name):
    weight = normal_matrix()
    weight[2, 3] = 1e9
    with pytest.raises(LsqError, match=r"layers\.3\.up_proj holds a weight of 1e\+09 in one group"):
        quantize_matrix(weight, QuantConfig(4, 64), get_quantizer(name), name="layers.3.up_proj")
    weight[2, 3] = 0  # a dead group is accepted, however small its weights
    weight[2] *= 1e-30
    quantize_matrix(weight, QuantConfig(4, 64), get_quantizer(name))


def test_exponent_of_ordinary_weights_is_zero():
    """Recorded comparisons with ``hqq`` remain valid because such weights are not scaled."""
    assert {
        normalizing_exponent(sigma * normal_matrix() / 0.02) for sigma in (0.02, 0.025, 0.035)
    } == {0}
    assert normalizing_exponent(normal_matrix() * 2.0**-90) == -90
    assert normalizing_exponent(torch.zeros(4, 4)) == 0


@given(st.integers(-126, 126), st.integers(-126, 126))
def test_times_power_of_two_is_exact(start, end):
    """From any normal float32 number to any other, by up to 2^±252."""
    values, k = torch.tensor([1.0, -1.5, 1.25]) * 2.0**start, end - start
    expected = np.ldexp(values.numpy(), k)
    for exponent in (k, torch.tensor([k], dtype=torch.int16)):
        assert np.array_equal(scale_by_power_of_two(values, exponent).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [-13, 0, 10])
def test_packed_linear_forward_matches_cast_weights(dtype, k):
    """Decoding is in float32 with a final cast, so no intermediate step overflows the dtype."""
    weight = scale_by_power_of_two(normal_matrix(), k)
    packed = quantize_matrix(weight, QuantConfig(8, 64), get_quantizer("rtn"))
    assert torch.equal(packed.dequantize(dtype), packed.dequantize().to(dtype))
    inputs = torch.randn(3, SHAPE[1], generator=torch.Generator().manual_seed(2)).to(dtype)
    outputs = PackedLinear(packed)(inputs)
    assert bool(outputs.isfinite().all())
    assert torch.equal(outputs, F.linear(inputs, packed.dequantize().to(dtype)))


# --- full models ------------------------------------------------------------------------------


def scaled_model(folder: Path, k: int) -> Path:
    """Save a random Llama with v_proj divided and o_proj multiplied by 2^k."""
    import transformers

    save_random_model(folder, "llama-gqa")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight *= 2.0**-k
            layer.self_attn.o_proj.weight *= 2.0**k
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["hqq", "rtn", "nf4"])
@pytest.mark.parametrize("k", [13, -20])
def test_rescaled_model_quantizes_to_same_outputs(name, k, tmp_path):
    ids, logits = torch.arange(1, 60)[None], []
    for folder in (
        save_random_model(tmp_path / "plain", "llama-gqa"),
        scaled_model(tmp_path / "scaled", k),
    ):
        loaded = load_model(ModelSource(str(folder)), "cpu", "float32")
        choice = dict.fromkeys(loaded.info.matrices, QuantConfig(4, 64))
        result = quantize_model(QuantizationTask(loaded, choice), get_quantizer(name))
        with torch.inference_mode():
            logits.append((loaded.model(ids).logits, result(ids).logits))
    (full, quantized), (full_scaled, quantized_scaled) = logits
    torch.testing.assert_close(full_scaled, full, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantized_scaled, quantized, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(quantized, full, atol=1e-3)


def test_profile_scores_scale_with_weights(tmp_path, small_text):
    """Errors scale by 2^k, and squared output changes by 4^k unless the inputs compensate."""
    metrics = ("weight_error", "sensitivity_module", "sensitivity", "gram_diagonal")
    profile_settings = ProfileSettings(
        "rtn", calibration=str(small_text), samples=4, block_tokens=64
    )
    plain = save_random_model(tmp_path / "plain", "llama-gqa")
    scores = []
    for folder in (plain, scaled_model(tmp_path / "scaled", 13)):
        loaded = load_model(ModelSource(str(folder)), "cpu", "float32")
        scores.append(measure_profile(loaded, profile_settings, "key", metrics=metrics).values)
    one, other = scores
    actual = (other["value"] / one["value"]).groupby([one["metric"], one["type"]]).median()
    for (metric, kind), ratio in actual.items():
        k = {"self_attn.v_proj": -13, "self_attn.o_proj": 13}.get(kind, 0)
        inputs = -13 if kind == "self_attn.o_proj" else 0
        squared = 0 if metric == "sensitivity" else 2 * (k + inputs)
        expected = 2.0**k if metric == "weight_error" else 2.0**squared
        assert ratio == pytest.approx(expected, rel=1e-3), (metric, kind)


@pytest.mark.parametrize("k", [-100, -60, 60, 100])
def test_squared_norm_no_overflow_or_underflow(k):
    values = normal_matrix()
    base, shifted = (
        float(squared_distances(v[None], torch.zeros_like(v)))
        for v in (values, scale_by_power_of_two(values, k))
    )
    assert shifted == pytest.approx(base * 4.0**k, rel=1e-5)


@pytest.mark.parametrize("name", ["hqq", "rtn", "nf4"])
@pytest.mark.parametrize("k", [-90, 60])
def test_levels_commute_with_power_of_two(name, k):
    groups, quantizer = normal_matrix(shape=(5, 64)), get_quantizer(name)
    base = quantizer.levels(groups, QuantConfig(4, 64))
    shifted = quantizer.levels(scale_by_power_of_two(groups, k), QuantConfig(4, 64))
    torch.testing.assert_close(shifted, scale_by_power_of_two(base, k), rtol=1e-6, atol=0)


@pytest.mark.parametrize("architecture", ["llama-gqa", "mixtral-moe", "gpt2-conv1d"])
def test_saved_model_small_weights_round_trip(architecture, random_model, tmp_path):
    loaded = load_model(ModelSource(str(random_model(architecture))), "cpu", "float32")
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter *= 2.0**-12 if parameter.dim() > 1 else 1
    matrices = loaded.info.matrices
    options = (QuantConfig(3, 32), QuantConfig(8, 64))
    choice = {m: options[i % 2] for i, m in enumerate(matrices)}
    result = quantize_model(QuantizationTask(loaded, choice), get_quantizer("rtn"))
    modules = {m.name: {"bits": c.bits, "group_size": c.group_size} for m, c in choice.items()}
    manifest = {"modules": modules, "metadata": "8bit", "axis": 1, "quantizer": "rtn"}
    save_quantized(result, loaded.tokenizer, manifest, tmp_path / "saved", loaded.folder)
    ids = torch.arange(1, 60)[None]
    reloaded = load_quantized(tmp_path / "saved", "cpu", "float32").model
    with torch.inference_mode():
        assert torch.equal(reloaded(ids).logits, result(ids).logits)


def test_load_quantized_format_2():
    """The model and its logits are from the version before: all widths, mixed and fp16 rows."""
    expected = load_file(FORMAT_2_MODEL.parent / "saved_format_2_logits.safetensors")
    assert json.loads((FORMAT_2_MODEL / "lsq.json").read_text())["format"] == 2
    model = load_quantized(FORMAT_2_MODEL, "cpu", "float32").model
    with torch.inference_mode():
        torch.testing.assert_close(
            model(expected["ids"]).logits, expected["logits"], rtol=1e-6, atol=1e-6
        )
    actual = audit_folder(FORMAT_2_MODEL, Store())
    assert not actual.mismatches
    assert {line.stored for line in actual.lines} >= {"b4g64", "b2h16r20g32", "b2h4r20g32"}
