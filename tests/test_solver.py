"""The fast half-quadratic solver, compared with that of the ``hqq`` package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hqq.core.quantize import Quantizer

from lsq_core.quantization.hqq import solver, solver_compiled, solver_triton
from lsq_core.quantization.hqq.solver import (
    THRESHOLD,
    solve_zero_points,
    stopping_step,
)
from lsq_core.quantization.hqq.solver_compiled import AdaptiveSteps, SolverBackend

SHAPE = (256, 384)


def weights(kind: str) -> torch.Tensor:
    """Return weights of the given kind, always from the same seed."""
    torch.manual_seed(0)
    if kind == "student-t":  # heavy tails: in some groups, errors survive the shrinking
        return 0.02 * torch.distributions.StudentT(2.0).sample(SHAPE)
    if kind == "wide":  # errors survive in all groups
        return 3 * torch.randn(SHAPE)
    if kind == "constant":
        return torch.full(SHAPE, 0.3)
    if kind == "zeros":
        return torch.zeros(SHAPE)
    if kind == "tiny":
        return 1e-6 * torch.randn(SHAPE)
    return 0.02 * torch.randn(SHAPE)


def to_groups(weight: torch.Tensor, group_size: int, axis: int) -> torch.Tensor:
    """Return float32 (groups, group_size) for axis 1, (group_size, groups) for axis 0."""
    return weight.float().reshape((-1, group_size) if axis == 1 else (group_size, -1))


def grid(weight: torch.Tensor, bits: int, axis: int = 1) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return ``hqq``'s min-max grid of groups: inverse scale, zero point and highest code."""
    low, high = weight.amin(axis, keepdim=True), weight.amax(axis, keepdim=True)
    scale = (2**bits - 1) / (high - low)
    scale = scale.where((high - low).abs() > 1e-4, 1.0).clamp(max=2e4)
    return scale, -low * scale, 2**bits - 1


def solve(weight: torch.Tensor, bits: int, group_size: int, axis: int) -> torch.Tensor:
    """Return groups decoded from ``hqq``'s min-max grid with this project's zero points."""
    groups = to_groups(weight, group_size, axis)
    scale, zero, top = grid(groups, bits, axis)
    zero = solve_zero_points(groups, scale, zero, top, axis)
    return ((groups * scale + zero).round().clamp(0, top) - zero) / scale


def solve_by_hqq(weight: torch.Tensor, bits: int, group_size: int, axis: int) -> torch.Tensor:
    """Return groups quantized and decoded by ``hqq``, float32."""
    codes, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=group_size, axis=axis, bitpack=False, device="cpu"
    )
    return (codes.float() - meta["zero"]) * meta["scale"]


def errors(
    quantize: Callable, weight: torch.Tensor, bits: int, group_size: int, axis: int
) -> tuple[float, float]:
    """Return the mean absolute and Frobenius errors of decoded weights."""
    decoded = quantize(weight, bits, group_size, axis)
    error = to_groups(weight, group_size, axis) - decoded
    return float(error.abs().mean()), float(error.norm())


@pytest.mark.parametrize("kind", ["normal", "student-t", "wide", "constant", "zeros", "tiny"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("axis", [0, 1])
def test_solver_errors_match_hqq(kind, bits, group_size, axis, monkeypatch):
    monkeypatch.setattr(solver, "CHUNK_WEIGHTS", 20 * 2**10)  # five chunks, the last one partial
    weight = weights(kind)
    ours = errors(solve, weight, bits, group_size, axis)
    theirs = errors(solve_by_hqq, weight, bits, group_size, axis)
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-12)


def test_student_t_weights_exceed_threshold():
    """Only some groups of the heavy-tailed weights can have errors above the threshold."""
    groups = weights("student-t").reshape(-1, 64)
    spread = (groups.amax(1) - groups.amin(1)) / 3 / 2
    assert 0 < int((spread > THRESHOLD).sum()) < len(groups)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_solver_half_precision_matches_hqq(dtype):
    weight = weights("normal").to(dtype)
    ours = errors(solve, weight, 4, 64, 1)
    assert ours == pytest.approx(errors(solve_by_hqq, weight, 4, 64, 1), rel=1e-3)


def test_solver_infinite_weight_affects_only_its_group():
    """``hqq`` stops all groups at the first step because their total error is NaN."""
    weight = weights("normal").reshape(-1, 64)
    initial = grid(weight, 4)
    broken = weight.clone()
    broken[3, 5] = torch.inf
    others = torch.arange(len(weight)) != 3
    separate = solve_zero_points(weight[others], *grid(weight[others], 4), axis=1)
    for start in (initial, grid(broken, 4)):
        zeros = solve_zero_points(broken, *start, axis=1)
        assert not zeros[3].isfinite().any()
        assert torch.equal(zeros[others], separate)
    assert solve_zero_points(weight, *initial, axis=1).isfinite().all()


def test_stopping_step():
    def stop(*errors):
        return int(stopping_step(torch.tensor(errors)))

    assert stop(3.0, 2.0, 2.5, 1.0) == 2
    assert stop(3.0, 2.0, 2.0, 1.0) == 2  # no improvement also stops
    assert stop(3.0, 2.0, 1.0) == 2
    assert stop(float("nan"), 2.0, 1.0) == 0


def test_engine_eager_for_small_work():
    with solver.steps.force_compiled(compiled=False):
        assert solver.backend("cpu") == SolverBackend("eager", "requested")
    assert solver.backend("cpu").name == "eager"
    assert solver.backend("cpu").reason


def test_engine_compiler_failure_falls_back_to_eager(monkeypatch):
    def broken(function, **_):
        def call(*inputs):
            raise RuntimeError("no headers\nand more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(solver_compiled, "COMPILE_AFTER_WEIGHTS", 2**16)
    monkeypatch.setattr(solver_compiled, "_missing_compiler", lambda: "")
    steps = AdaptiveSteps(solver._eager_steps)
    weight = weights("normal").reshape(-1, 64)
    scale, zero, top = grid(weight, 4)
    scaled = weight * scale
    top = torch.full((1,), top)
    inputs = (scaled, scaled.mean(1), scale[:, 0], zero[:, 0], top, -1, False)
    assert steps.backend.name == "eager"
    zeros, _ = steps(*inputs)
    assert steps.backend.name == "eager"
    assert "no headers" in steps.backend.reason
    assert torch.equal(zeros, solver._eager_steps(*inputs)[0])


def test_engine_missing_compiler_reported(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with solver.steps.force_compiled(compiled=True):
        assert "no-such-compiler" in solver.backend("cpu").reason


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on the CPU")
def test_compiled_steps_identical_to_eager():
    """Compiling takes most of the time."""
    weight = weights("normal").reshape(-1, 64)
    plain = solve_zero_points(weight, *grid(weight, 4), axis=1)
    with solver.steps.force_compiled(compiled=True):
        compiled = solve_zero_points(weight, *grid(weight, 4), axis=1)
        assert solver.backend("cpu").name == "compiled"  # compilation did not fail
    assert torch.equal(compiled, plain)


@pytest.mark.skipif(not solver_triton.available(), reason="Triton is not installed")
def test_triton_kernel_in_interpreter():
    """Runs in its own process because Triton reads the variable on import."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.triton_kernel"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "36 cases" in run.stdout
