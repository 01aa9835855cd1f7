"""The half-quadratic solver of [D], as ``hqq`` defines it, over pieces that stay in cache.

``hqq`` moves each group's zero point in 20 steps over the whole tensor: round to the grid, shrink
the error towards a sparse one, take the mean. Three things make that fast without changing it:

* Groups are independent but for the early stop, which looks at the error of the whole tensor. So
  a piece runs all its steps while it is in cache (or registers), remembers the zero points of each,
  and the step at which ``hqq`` would have stopped is looked up in the end.
* The shrinking operator ``sign(e)·relu(|e| − |e|^(p−1)/β)`` is zero for every error below
  ``β^(−1/(2−p))``, 0.17 for its parameters. Weights of language models stay far below that, and
  then the step is ``zero ← mean(code) − scale·mean(weight)``: no power, no dequantized weights.
  Groups with a larger error take the step in full.
* The steps are compiled where that pays: :mod:`solver_compiled` on the CPU, :mod:`solver_triton` on
  a GPU. :func:`backend` says which runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import log2
from threading import Lock

import torch
from hqq.core.quantize import Quantizer as HqqPackage
from torch import Tensor

from lsq_core.quantization.hqq import solver_triton
from lsq_core.quantization.hqq.solver_compiled import AdaptiveSteps, SolverBackend

#: ``hqq``'s own parameters of the solver: the norm p, β, and the steps.
LP_NORM = 0.7
BETA = 10.0
STEPS = 20
#: Errors up to this size shrink to nothing. It is no matter of a model's units: weights come here
#: at an ordinary magnitude (:mod:`lsq_core.quantization.magnitude`).
THRESHOLD = BETA ** (-1 / (2 - LP_NORM))
#: Weights worked on at a time: 1 MiB of float32, which stays in a core's cache.
CHUNK_WEIGHTS = 2**18

_patch_lock = Lock()


def optimize_weights(
    tensor: Tensor,
    scale: Tensor,
    zero: Tensor,
    min_max: list[int],
    axis: int = 0,
    device: object = None,
    **_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``hqq``'s ``optimize_weights_proximal`` does, in its signature.

    ``tensor`` is float32 (groups, group_size) for axis 1, (group_size, groups) for axis 0;
    ``scale`` is the inverse of what is stored. Returns codes, scale and zero.
    """
    top = min_max[1]
    zero = solve_zero_points(tensor, scale, zero, top, axis)
    codes = torch.addcmul(zero, tensor, scale).round_().clamp_(0, top)
    return codes, scale, zero


@torch.inference_mode()
def solve_zero_points(weight: Tensor, scale: Tensor, zero: Tensor, top: int, axis: int) -> Tensor:
    """The zero points, float32 and shaped as they came: (groups, 1) for axis 1, (1, groups) for 0.

    ``weight`` may be float32, bfloat16 or float16. A group that holds a NaN or an infinity gets
    zero points that are none; it has no say in when the others stop.
    """
    scale, zero = scale.float(), zero.float()
    if _uses_triton(weight.device):
        zeros, errors = solver_triton.run_all_steps(
            weight, scale, zero, top, axis, steps=STEPS, lp_norm=LP_NORM, beta=BETA
        )
    else:
        parts = [
            _solve_piece(weight[piece].float(), scale[piece], zero[piece], top, axis)
            for piece in _pieces(weight, axis)
        ]
        zeros = torch.cat([zeros for zeros, _ in parts], dim=2 - axis)
        errors = sum(errors for _, errors in parts)
    return zeros.index_select(0, stopping_step((errors / weight.numel()).float()))[0]


def backend(device: torch.device | str) -> SolverBackend:
    """What runs the steps on a device: ``triton``, ``compiled`` or ``eager``, and why."""
    device = torch.device(device)
    if device.type == "cpu":
        return steps.backend
    if _uses_triton(device):
        return SolverBackend("triton")
    return SolverBackend(
        "eager", f"there is no kernel for {device.type} here (needs CUDA and Triton)"
    )


def _uses_triton(device: torch.device) -> bool:
    return device.type == "cuda" and solver_triton.available()


def stopping_step(errors: Tensor) -> Tensor:
    """The first step whose error is no improvement: ``hqq`` stops after it, else after the last.

    ``errors`` is (steps,), the mean absolute error before each; returns (1,), the step. It stays
    on the device, so that a GPU need not wait for the answer.
    """
    before = torch.cat([errors.new_full((1,), torch.inf), errors[:-1]])
    worse = ~(errors < before)
    worse[-1] = True
    return worse.int().argmax().view(1)


def _pieces(weight: Tensor, axis: int) -> Iterator[tuple[slice, slice]]:
    """Slices of whole groups, small enough for the cache."""
    groups, group_size = weight.shape[1 - axis], weight.shape[axis]
    length = max(CHUNK_WEIGHTS // group_size, 1)
    everything = slice(None)
    for start in range(0, groups, length):
        chunk = slice(start, start + length)
        yield (chunk, everything) if axis == 1 else (everything, chunk)


def _solve_piece(
    weight: Tensor, scale: Tensor, zero: Tensor, top: int, axis: int
) -> tuple[Tensor, Tensor]:
    """Zero points after each step (steps, …) and the summed error before each (steps,).

    The steps without shrinking come first; groups whose errors turn out too large for them, and
    those only, start again in full.
    """
    scaled = weight * scale
    mean = scaled.mean(axis, keepdim=True)
    if bool((scale < 0.5 / THRESHOLD).all()):  # half a step survives the shrinking everywhere
        zeros, errors = steps(scaled, mean, scale, zero, top, axis, True)
        return zeros, _sum_finite(errors)
    zeros, errors = steps(scaled, mean, scale, zero, top, axis, False)
    exceeds_threshold = ~(
        _largest_error(scaled, scale, zeros, top, axis) <= THRESHOLD
    )  # or not a number
    if bool(exceeds_threshold.any()):
        chunk = (exceeds_threshold, slice(None)) if axis == 1 else (slice(None), exceeds_threshold)
        part = (scaled[chunk], mean[chunk], scale[chunk], zero[chunk])
        zeros[(slice(None), *chunk)], errors[(slice(None), *chunk)] = _eager_steps(
            *part, top, axis, True
        )
    return zeros, _sum_finite(errors)


def _largest_error(scaled: Tensor, scale: Tensor, zeros: Tensor, top: int, axis: int) -> Tensor:
    """A bound (groups,) on the size of any error of a group in any step.

    Rounding leaves half a step at most, and what lies beyond the grid as much more as it does.
    """
    above = scaled.amax(axis, keepdim=True) + zeros.amax(0) - top
    below = -scaled.amin(axis, keepdim=True) - zeros.amin(0)
    return (torch.maximum(above, below).clamp_min_(0.5) / scale).flatten()


def _sum_finite(errors: Tensor) -> Tensor:
    """Errors (steps, …) of groups as (steps,), those that are no numbers left out."""
    return torch.where(errors.isfinite(), errors, 0).flatten(1).sum(1, dtype=torch.float64)


def _eager_steps(
    scaled: Tensor,
    mean: Tensor,
    scale: Tensor,
    zero: Tensor,
    top: int,
    axis: int,
    shrinks: bool,
) -> tuple[Tensor, Tensor]:
    """All steps of some groups, in units of the grid: ``scaled`` is weight · scale.

    Returns the zero points after each step and the summed error before each, (steps, …) both.
    Without ``shrinks`` it is right for groups whose errors all shrink to nothing.
    """
    zeros, errors = [], []
    strength = (2 - LP_NORM) * scale.log2() - log2(BETA)
    for _ in range(STEPS):
        error = scaled + zero
        codes = error.round().clamp_(0, top)
        error.sub_(codes)
        size = error.abs() if shrinks else error.abs_()
        errors.append(size.sum(axis, keepdim=True))
        if shrinks:
            power = size.log2().mul_(LP_NORM - 1).add_(strength).exp2_()
            codes.add_(size.sub_(power).clamp_min_(0).copysign_(error))
        zero = codes.mean(axis, keepdim=True) - mean
        zeros.append(zero)
    return torch.stack(zeros), torch.stack(errors) / scale


#: The steps on the CPU: as they are, or compiled.
steps = AdaptiveSteps(_eager_steps)


@contextmanager
def patched_hqq() -> Iterator[None]:
    """``hqq``'s ``Quantizer`` with this solver in place of its own, within the block."""
    with _patch_lock:
        own = HqqPackage.optimize_weights
        HqqPackage.optimize_weights = staticmethod(optimize_weights)
        try:
            yield
        finally:
            HqqPackage.optimize_weights = own
