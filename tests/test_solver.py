"""The fast half-quadratic solver against the one of the ``hqq`` package."""

from __future__ import annotations

import shutil

import pytest
import torch
from hqq.core.optimize import optimize_weights_proximal
from hqq.core.quantize import Quantizer

from lsq_core.quantize import solver
from lsq_core.quantize.solver import THRESHOLD, plugged_in, solve_zero

SHAPE = (256, 384)


def weights(kind: str) -> torch.Tensor:
    """Weights of one kind, the same each time."""
    torch.manual_seed(0)
    if kind == "student-t":  # heavy tails: some groups' errors survive the shrinking
        return 0.02 * torch.distributions.StudentT(2.0).sample(SHAPE)
    if kind == "wide":  # all of them do
        return 3 * torch.randn(SHAPE)
    if kind == "constant":
        return torch.full(SHAPE, 0.3)
    if kind == "zeros":
        return torch.zeros(SHAPE)
    if kind == "tiny":
        return 1e-6 * torch.randn(SHAPE)
    return 0.02 * torch.randn(SHAPE)


def quantized(weight: torch.Tensor, bits: int, group_size: int, axis: int) -> torch.Tensor:
    """What ``hqq``'s quantizer makes of a matrix, float32 in its groups' shape."""
    codes, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=group_size, axis=axis, bitpack=False, device="cpu"
    )
    return (codes.float() - meta["zero"]) * meta["scale"]


def errors(weight: torch.Tensor, bits: int, group_size: int, axis: int) -> tuple[float, float]:
    """Mean absolute and Frobenius error."""
    shape = (-1, group_size) if axis == 1 else (group_size, -1)
    error = weight.float().reshape(shape) - quantized(weight, bits, group_size, axis)
    return float(error.abs().mean()), float(error.norm())


@pytest.mark.parametrize("kind", ["normal", "student-t", "wide", "constant", "zeros", "tiny"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("axis", [0, 1])
def test_errors_are_those_of_the_package(kind, bits, group_size, axis, monkeypatch):
    monkeypatch.setattr(solver, "PIECE", 2**14)  # several pieces, the last one short
    weight = weights(kind)
    theirs = errors(weight, bits, group_size, axis)
    with plugged_in():
        ours = errors(weight, bits, group_size, axis)
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-12)


def test_the_shrinking_decides_something_in_the_tests():
    """Errors above the threshold occur in the heavy-tailed weights, in some groups only."""
    groups = weights("student-t").reshape(-1, 64)
    spread = (groups.amax(1) - groups.amin(1)) / 3 / 2
    assert 0 < int((spread > THRESHOLD).sum()) < len(groups)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    weight = weights("normal").to(dtype)
    theirs = errors(weight, 4, 64, 1)
    with plugged_in():
        assert errors(weight, 4, 64, 1) == pytest.approx(theirs, rel=1e-3)


def test_an_infinite_weight_harms_its_own_group_alone():
    weight = weights("normal").reshape(-1, 64)
    scale = 15 / (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True))
    zero = -weight.amin(1, keepdim=True) * scale
    clean = solve_zero(weight, scale, zero, 15, axis=1)
    weight = weight.clone()
    weight[3, 5] = torch.inf
    broken = solve_zero(weight, scale, zero, 15, axis=1)
    assert not torch.isfinite(broken[3]).all()
    others = torch.arange(len(weight)) != 3
    assert torch.isfinite(broken[others]).all()
    assert clean.isfinite().all()


def test_the_package_is_left_as_it_was():
    assert Quantizer.optimize_weights is optimize_weights_proximal
    with plugged_in():
        assert Quantizer.optimize_weights is solver.optimize_weights
    with pytest.raises(AssertionError), plugged_in():
        Quantizer.quantize(torch.zeros(3, 5), group_size=64)  # refuses what groups don't fill
    assert Quantizer.optimize_weights is optimize_weights_proximal


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on the CPU")
def test_compiled_steps_are_the_same():
    """What a GPU runs, compiled for the CPU; compiling takes most of the time."""
    weight = weights("normal").reshape(-1, 64)
    scale = 15 / (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True))
    zero = -weight.amin(1, keepdim=True) * scale
    plain = solver._steps(weight * scale, scale, zero, 15, 1)
    compiled = torch.compile(solver._steps, dynamic=True)(weight * scale, scale, zero, 15, 1)
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
