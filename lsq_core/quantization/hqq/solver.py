"""The half-quadratic solver of [D], as defined by ``hqq``, run on pieces that fit in cache.

``hqq`` adjusts each group's zero point in 20 steps over the entire tensor: round to the grid,
shrink the error towards a sparse one, take the mean. Three things make this fast without changing
the result:

* Groups are independent except for early stopping, which depends on the error of the entire tensor.
  So a piece runs all its steps while it is in cache (or registers) and records the zero points
  after each; the step at which ``hqq`` would have stopped is selected at the end. Several grids of
  one matrix with the same groups go through the steps together.
* The shrinking operator ``sign(e)·relu(|e| − |e|^(p−1)/β)`` is zero for every error below
  ``β^(−1/(2−p))``, which is 0.17 for these parameters. Errors of language models' weights stay far
  below that, and the step becomes ``zero ← mean(code) − scale·mean(weight)``: no power, no
  dequantized weights. Groups with a larger error take the full step.
* The steps are compiled where that pays off: by :mod:`solver_compiled` on the CPU, by
  :mod:`solver_triton` on a GPU. :func:`backend` returns which one runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2

import torch
from torch import Tensor

from lsq_core.quantization.base import highest_codes
from lsq_core.quantization.hqq import solver_triton
from lsq_core.quantization.hqq.solver_compiled import AdaptiveSteps, SolverBackend

#: ``hqq``'s own solver parameters: the norm p, β, and the number of steps.
LP_NORM = 0.7
BETA = 10.0
STEPS = 20
#: Errors up to this size shrink to zero. This does not depend on a model's units, because weights
#: are scaled to an ordinary magnitude before (:mod:`lsq_core.quantization.magnitude`).
THRESHOLD = BETA ** (-1 / (2 - LP_NORM))
#: Weights processed at a time: 1 MiB of float32, which stays in a core's cache.
CHUNK_WEIGHTS = 2**18


def solve_zero_points(weight: Tensor, scale: Tensor, zero: Tensor, top: int, axis: int) -> Tensor:
    """Optimize the zero point of every group, as ``hqq``'s ``optimize_weights_proximal`` does.

    Parameters
    ----------
    weight
        (groups, group_size) for axis 1, (group_size, groups) for axis 0; float32, bfloat16 or
        float16.
    scale, zero
        The min-max grid, (groups, 1) for axis 1 and (1, groups) for axis 0. ``scale`` is the
        inverse of the stored scale: ``code = weight · scale + zero``.
    top
        The highest code.

    Returns
    -------
    The zero points, float32 in the shape of ``zero``. A group that contains a NaN or an infinity
    gets a non-finite zero point and does not affect when the other groups stop.
    """
    grids = scale.view(1, -1), zero.view(1, -1)
    return solve_several(weight, *grids, [top], axis).view(zero.shape)


@torch.inference_mode()
def solve_several(
    weight: Tensor, scale: Tensor, zero: Tensor, tops: Sequence[int], axis: int
) -> Tensor:
    """Optimize the zero points of several grids of one matrix, each with its own highest code.

    ``weight`` is as in :func:`solve_zero_points`; ``scale`` and ``zero`` are (grids, groups).
    Returns the zero points, float32 (grids, groups). Each grid stops at its own step. Nothing here
    waits for a GPU.
    """
    scale, zero = scale.float(), zero.float()
    if _uses_triton(weight.device):
        zeros, errors = solver_triton.run_all_steps(
            weight, scale, zero, tops, axis, steps=STEPS, lp_norm=LP_NORM, beta=BETA
        )
    else:
        zeros, errors = _solve_in_pieces(weight, scale, zero, tops, axis)
    stop = stopping_step((errors / weight.numel()).float())
    return zeros.gather(0, stop[None, :, None].expand(1, *zero.shape))[0]


def backend(device: torch.device | str) -> SolverBackend:
    """Return what runs the steps on a device (``triton``, ``compiled`` or ``eager``), and why."""
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
    """Return the first step whose error does not improve, after which ``hqq`` stops, or the last.

    ``errors`` is (steps, grids), the mean absolute error before each step. Returns the steps
    (grids,), which stay on the device, so that the host need not wait for a GPU.
    """
    improves = torch.ones_like(errors, dtype=torch.bool)
    torch.lt(errors[1:], errors[:-1], out=improves[1:])
    torch.lt(errors[0], torch.inf, out=improves[0])
    return improves.int().cumprod(0).sum(0).clamp_(max=len(errors) - 1)


def _solve_in_pieces(
    weight: Tensor, scale: Tensor, zero: Tensor, tops: Sequence[int], axis: int
) -> tuple[Tensor, Tensor]:
    """Return zero points after each step (steps, grids, groups), and errors before (steps, grids).

    Errors are summed over all weights, float64. Pieces are complete groups that fit in cache with
    all their grids.
    """
    groups, group_size = weight.shape[1 - axis], weight.shape[axis]
    length = max(CHUNK_WEIGHTS // (group_size * len(tops)), 1)
    top = highest_codes(weight.device, tuple(tops))[:, None]
    parts = []
    for start in range(0, groups, length):
        own = slice(start, start + length)
        piece = weight[own] if axis == 1 else weight[:, own]
        parts.append(_solve_piece(piece.float(), scale[:, own], zero[:, own], top, axis))
    zeros = torch.cat([zeros for zeros, _ in parts], dim=2) if len(parts) > 1 else parts[0][0]
    return zeros, sum(errors for _, errors in parts)


def _solve_piece(
    weight: Tensor, scale: Tensor, zero: Tensor, top: Tensor, axis: int
) -> tuple[Tensor, Tensor]:
    """Return zero points after each step (steps, grids, groups), and summed errors (steps, grids).

    ``top`` is (grids, 1). Unless all groups need shrinking, the steps first run without it, and
    only groups whose errors turn out too large are run again in full.
    """
    dim = -1 if axis == 1 else 0  # dimension of a group's weights when there are several grids
    top = top.expand(scale.shape)
    scaled = weight.unsqueeze(1 - axis) * scale.unsqueeze(dim)
    mean = scaled.mean(dim)
    if bool((scale < 0.5 / THRESHOLD).all()):  # half a step survives the shrinking in every group
        zeros, errors = steps(scaled, mean, scale, zero, top, dim, True)
        return zeros, _sum_finite(errors)
    zeros, errors = steps(scaled, mean, scale, zero, top, dim, False)
    exceeds_threshold = ~(
        _largest_error(scaled, scale, zeros, top, dim) <= THRESHOLD
    )  # or not a number
    if bool(exceeds_threshold.any()):
        own = scaled[exceeds_threshold] if dim == -1 else scaled[:, exceeds_threshold]
        part = (own, *(values[exceeds_threshold] for values in (mean, scale, zero, top)))
        zeros[:, exceeds_threshold], errors[:, exceeds_threshold] = _eager_steps(*part, dim, True)
    return zeros, _sum_finite(errors)


def _largest_error(scaled: Tensor, scale: Tensor, zeros: Tensor, top: Tensor, dim: int) -> Tensor:
    """Return a bound (grids, groups) on the size of any error of a group in any step.

    Rounding errors are at most half a step; a weight beyond the grid's end is off by its distance.
    """
    above = scaled.amax(dim) + zeros.amax(0) - top
    below = -scaled.amin(dim) - zeros.amin(0)
    return torch.maximum(above, below).clamp_min_(0.5) / scale


def _sum_finite(errors: Tensor) -> Tensor:
    """Sum errors (steps, grids, groups) over groups, ignoring non-finite ones: (steps, grids)."""
    return torch.where(errors.isfinite(), errors, 0).sum(-1, dtype=torch.float64)


def _eager_steps(
    scaled: Tensor,
    mean: Tensor,
    scale: Tensor,
    zero: Tensor,
    top: Tensor,
    dim: int,
    shrinks: bool,
) -> tuple[Tensor, Tensor]:
    """Run all steps for some groups, in units of the grid: ``scaled`` is weight · scale.

    ``dim`` is the dimension of ``scaled`` that ``mean``, ``scale``, ``zero`` and ``top`` lack.
    Returns the zero points after each step and the summed errors before it, both (steps, …).
    Without ``shrinks``, the result is correct only for groups whose errors all shrink to zero.
    """
    zeros, errors = [], []
    highest = top.unsqueeze(dim)
    if shrinks:
        strength = ((2 - LP_NORM) * scale.log2() - log2(BETA)).unsqueeze(dim)
    for _ in range(STEPS):
        error = scaled + zero.unsqueeze(dim)
        codes = error.round().clamp_min_(0)
        torch.minimum(codes, highest, out=codes)
        error.sub_(codes)
        size = error.abs() if shrinks else error.abs_()
        errors.append(size.sum(dim))
        if shrinks:
            power = size.log2().mul_(LP_NORM - 1).add_(strength).exp2_()
            codes.add_(size.sub_(power).clamp_min_(0).copysign_(error))
        zero = codes.mean(dim) - mean
        zeros.append(zero)
    return torch.stack(zeros), torch.stack(errors) / scale


#: The steps on the CPU, eager or compiled.
steps = AdaptiveSteps(_eager_steps)
