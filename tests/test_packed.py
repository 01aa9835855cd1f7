"""Bit packing and stored metadata, and their error compared with that of ``hqq`` itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hqq.core.quantize import Quantizer as HqqPackage
from hypothesis import given, settings
from hypothesis import strategies as st

from lsq_core.bits import EXTENDED_LADDER, LADDER, QuantConfig
from lsq_core.errors import InputError, LsqError
from lsq_core.model.loading import load_model
from lsq_core.model.source import DEMO_FOLDER, ModelSource
from lsq_core.quantization import layout, packed_triton
from lsq_core.quantization.base import from_groups, to_groups
from lsq_core.quantization.packed import (
    Metadata,
    PackedMatrix,
    pack_bits,
    quantize_matrix,
    unpack_bits,
)
from lsq_core.quantization.registry import get_quantizer
from lsq_core.quantized.artifact import make_meta_tensors
from lsq_core.quantized.modules import PackedLinear
from tests.conftest import ROOT, packed_bytes


@given(
    bits=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8]),
    count=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
def test_pack_bits_round_trip_and_size(bits, count, seed):
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (count,), generator=random, dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.numel() == -(-count * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, count), codes)


def test_pack_bits_lowest_bits_first():
    """The layout is part of the file format, so it is tested with explicit values."""
    assert pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]
    eight = torch.tensor([1, 0, 0, 0, 0, 0, 0, 7], dtype=torch.uint8)
    assert pack_bits(eight, 3).tolist() == [1, 0, 0xE0]


@given(axis=st.sampled_from([0, 1]), rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_to_groups_round_trip(axis, rows, columns):
    weight = torch.arange(rows * columns * 32.0).view(rows * 32, columns)
    groups = to_groups(weight, 32, axis)
    assert groups.shape == (rows * columns, 32)
    assert torch.equal(from_groups(groups, tuple(weight.shape), axis), weight)


@given(
    count=st.integers(1, 400),
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1e-4, 1.0, 100.0]),
)
def test_8_bit_metadata_error_within_half_step(count, seed, size):
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=random) * size
    stored = Metadata.store(values, "8bit")
    assert stored.values.dtype == torch.uint8
    assert stored.values.numel() == count
    decoded = stored.decode()
    for begin in range(0, count, 128):
        part = values[begin : begin + 128]
        spread = part.max() - part.min()
        # half a step of the range, which is a little wider because it is stored in fp16
        allowed = spread / 510 + part.abs().max() * 2**-9 / 255 + 1e-7
        assert (decoded[begin : begin + 128] - part).abs().max() <= allowed


@settings(deadline=None, max_examples=60)
@given(
    config=st.sampled_from(EXTENDED_LADDER),
    metadata=st.sampled_from(["8bit", "fp16"]),
    axis=st.sampled_from([0, 1]),
    rows=st.integers(1, 12),
    columns=st.sampled_from([32, 96, 128, 172, 384]),
)
def test_packed_nbytes_match_plan(config, metadata, axis, rows, columns):
    shape = (rows * 32, columns)
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(rows))
    numel = weight.numel()
    if numel % config.group_size:
        with pytest.raises(InputError, match=f"groups of {config.group_size}"):
            quantize_matrix(weight, config, get_quantizer("rtn"), axis=axis, metadata=metadata)
        return
    packed = quantize_matrix(weight, config, get_quantizer("rtn"), axis=axis, metadata=metadata)
    assert packed.nbytes == packed_bytes(numel, config, metadata)
    empty = make_meta_tensors(layout.packed(shape, config, metadata))
    kinds = {n: (t.shape, t.dtype) for n, t in packed.tensors.items()}
    assert kinds == {n: (t.shape, t.dtype) for n, t in empty.items()}
    restored = PackedMatrix.from_tensors(packed.tensors, shape, config, axis)
    assert torch.equal(restored.dequantize(), packed.dequantize())


@pytest.fixture(scope="module")
def demo_weights():
    from lsq_core.model.architecture import get_weight

    loaded = load_model(ModelSource("demo"), "cpu")
    return [get_weight(loaded.model, m) for m in loaded.info.matrices[::17]]


def frobenius_error(weights, config, axis, metadata, name="hqq"):
    """Return the total Frobenius error of our storage over several matrices."""
    quantizer = get_quantizer(name)
    return sum(
        (
            quantize_matrix(w, config, quantizer, axis=axis, metadata=metadata).dequantize() - w
        ).norm()
        for w in weights
    )


def hqq_error(weights, config, axis, optimize=True):
    """Return the same total for the ``hqq`` package's own quantize and dequantize."""
    total = 0.0
    for weight in weights:
        codes, meta = HqqPackage.quantize(
            weight,
            nbits=config.bits,
            group_size=config.group_size,
            axis=axis,
            optimize=optimize,
            device="cpu",
        )
        meta["compute_dtype"] = torch.float32
        total += (HqqPackage.dequantize(codes, meta) - weight).norm()
    return total


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("config", LADDER, ids=lambda c: c.name)
def test_fp16_metadata_error_matches_hqq(demo_weights, config, axis):
    ours = frobenius_error(demo_weights, config, axis, "fp16")
    assert ours / hqq_error(demo_weights, config, axis) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("config", LADDER[::4], ids=lambda c: c.name)
def test_rtn_error_matches_hqq_without_solver(demo_weights, config):
    ours = frobenius_error(demo_weights, config, 1, "fp16", "rtn")
    assert ours / hqq_error(demo_weights, config, 1, False) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("config", LADDER, ids=lambda c: c.name)
def test_8_bit_metadata_adds_little_error(demo_weights, config):
    """Codes are rounded on the stored grid, which keeps it far below the quantization error."""
    fp16 = frobenius_error(demo_weights, config, 1, "fp16")
    added = frobenius_error(demo_weights, config, 1, "8bit") / fp16 - 1
    assert added < (0.06 if config.bits == 8 else 0.001)


@pytest.mark.parametrize("name", ["hqq", "rtn"])
@pytest.mark.parametrize("metadata", ["8bit", "fp16"])
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(64, 128),
        torch.full((64, 128), 0.25),
        torch.full((64, 128), -300.0),
        torch.randn(64, 128) * 1e-7,
        5 + torch.randn(64, 128) * 1e-6,
        1e4 + torch.randn(64, 128),
    ],
    ids=["zeros", "constant", "large constant", "tiny", "offset", "far offset"],
)
def test_degenerate_matrices(weight, metadata, name):
    packed = quantize_matrix(weight, QuantConfig(3, 64), get_quantizer(name), metadata=metadata)
    error = (packed.dequantize() - weight).abs().max()
    assert error <= 5e-3 * weight.abs().max() + 1e-6


def test_zero_row_does_not_affect_other_groups(demo_weights):
    """A naive scale of 1 for a constant group would dominate the 8-bit range of 127 others."""
    weight = demo_weights[0].clone()
    config, quantizer = QuantConfig(4, 128), get_quantizer("hqq")
    error_before = (quantize_matrix(weight, config, quantizer).dequantize() - weight)[1:].norm()
    weight[0] = 0
    error_after = (quantize_matrix(weight, config, quantizer).dequantize() - weight)[1:].norm()
    assert error_after / error_before == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_quantize_matrix_non_finite_raises(bad):
    weight = torch.randn(32, 128)
    weight[3, 4] = bad
    with pytest.raises(LsqError, match=r"layers\.3\.up_proj .*\b1 NaN"):
        quantize_matrix(weight, QuantConfig(4, 64), get_quantizer("hqq"), name="layers.3.up_proj")


def test_get_quantizer_unknown_raises():
    with pytest.raises(InputError, match="hqq, rtn"):
        get_quantizer("gptq2")


def test_demo_model_shape_and_size():
    loaded = load_model(ModelSource("demo"), "cpu")
    assert loaded.info.layers >= 24
    assert all(m.in_features % 128 == 0 for m in loaded.info.matrices)
    assert sum(p.stat().st_size for p in DEMO_FOLDER.iterdir() if p.is_file()) < 40e6


@pytest.mark.skipif(not packed_triton.available(), reason="Triton is not installed")
@pytest.mark.parametrize(
    ("interpret", "arguments", "said"), [("1", [], "58 matrices"), ("0", ["compile"], "compiled")]
)
def test_triton_kernels(interpret, arguments, said):
    """Runs in a subprocess, because Triton reads the variable when it is imported."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.triton_packed", *arguments],
        env=os.environ | {"TRITON_INTERPRET": interpret},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert said in run.stdout


def test_triton_kernels_have_to_be_turned_on(monkeypatch):
    monkeypatch.delenv(packed_triton.SWITCH, raising=False)
    assert not packed_triton.enabled()
    monkeypatch.setenv(packed_triton.SWITCH, "1")
    assert packed_triton.enabled() == packed_triton.available()


def test_matrix_on_the_cpu_is_decoded_by_pytorch():
    module = PackedLinear(quantize_matrix(torch.randn(8, 64), LADDER[0], get_quantizer("rtn")))
    assert module.kernel == "pytorch"
