"""The half-quadratic solver of [D], as ``hqq`` defines it, over pieces that stay in cache.

``hqq`` moves each group's zero point in 20 steps over the whole tensor: round to the grid, shrink
the error towards a sparse one, take the mean. Two things make that fast without changing it:

* Groups are independent but for the early stop, which looks at the error of the whole tensor. So
  a piece runs all its steps while it is in cache (or registers), remembers the zero points of each,
  and the step at which ``hqq`` would have stopped is looked up in the end.
* The shrinking operator ``sign(e)·relu(|e| − |e|^(p−1)/β)`` is zero for every error below
  ``β^(−1/(2−p))``, 0.17 for its parameters. Weights of language models stay far below that, and
  then the step is ``zero ← mean(code) − scale·mean(weight)``: no power, no dequantized weights.
  Groups with a larger error take the step in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

import torch
from hqq.core.quantize import Quantizer as HqqPackage
from torch import Tensor

#: ``hqq``'s own parameters of the solver: the norm p, β, and the steps.
LP_NORM = 0.7
BETA = 10.0
STEPS = 20
#: Errors up to this size shrink to nothing.
THRESHOLD = BETA ** (-1 / (2 - LP_NORM))
#: Weights worked on at a time: 1 MiB of float32 on the CPU, a large launch on a GPU.
CPU_PIECE = 2**18
GPU_PIECE = 2**26

_plugging = Lock()


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
    zero = solve_zero(tensor, scale, zero, top, axis)
    codes = torch.addcmul(zero, tensor, scale).round_().clamp_(0, top)
    return codes, scale, zero


@torch.inference_mode()
def solve_zero(weight: Tensor, scale: Tensor, zero: Tensor, top: int, axis: int) -> Tensor:
    """The zero points, shaped as they came: (groups, 1) for axis 1, (1, groups) for axis 0."""
    weight, scale, zero = weight.float(), scale.float(), zero.float()
    history, errors = [], torch.zeros(STEPS, dtype=torch.float64, device=weight.device)
    steps = _steps_for(weight.device.type)
    for piece in _pieces(weight, axis):
        zeros, error, largest = steps(
            weight[piece] * scale[piece], scale[piece], zero[piece], top, axis
        )
        survives = ~(largest <= THRESHOLD)  # larger, or not a number
        if bool(survives.any()):
            some = (survives, slice(None)) if axis == 1 else (slice(None), survives)
            part = _full_steps(
                weight[piece][some], scale[piece][some], zero[piece][some], top, axis
            )
            zeros[(slice(None), *some)], error[:, survives] = part
        history.append(zeros)
        errors += error.double().sum(1)
    stop = _stopping_step((errors / weight.numel()).float().tolist())
    return torch.cat([zeros[stop] for zeros in history], dim=1 - axis)


def _pieces(weight: Tensor, axis: int) -> Iterator[tuple[slice, slice]]:
    """Slices of whole groups, small enough for the cache."""
    groups, group_size = weight.shape[1 - axis], weight.shape[axis]
    length = max((CPU_PIECE if weight.device.type == "cpu" else GPU_PIECE) // group_size, 1)
    everything = slice(None)
    for start in range(0, groups, length):
        some = slice(start, start + length)
        yield (some, everything) if axis == 1 else (everything, some)


@cache
def _steps_for(device: str) -> Callable:
    """The steps as they are on the CPU; compiled to a kernel or two on a GPU."""
    return _steps if device == "cpu" else torch.compile(_steps, dynamic=True)


def _steps(
    scaled: Tensor, scale: Tensor, zero: Tensor, top: int, axis: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All steps of one piece, right for groups whose errors all shrink to nothing.

    ``scaled`` is weight · scale. Returns the zero points after each step (steps, …), the summed
    error before each (steps, groups), and the largest single error of each group (groups,).
    """
    mean = scaled.mean(axis, keepdim=True)
    zeros, errors, largest = [], [], torch.zeros_like(zero)
    for _ in range(STEPS):
        codes = torch.add(scaled, zero).round_().clamp_(0, top)
        after = codes.mean(axis, keepdim=True) - mean
        error = codes.sub_(scaled).sub_(zero).abs_()
        errors.append((error.sum(axis, keepdim=True) / scale).flatten())
        largest = torch.maximum(largest, error.amax(axis, keepdim=True))
        zero = after
        zeros.append(zero)
    return torch.stack(zeros), torch.stack(errors), (largest / scale).flatten()


def _full_steps(
    weight: Tensor, scale: Tensor, zero: Tensor, top: int, axis: int
) -> tuple[Tensor, Tensor]:
    """All steps of some groups as ``hqq`` writes them; returns as :func:`_steps`."""
    zeros, errors = [], []
    for _ in range(STEPS):
        codes = torch.addcmul(zero, weight, scale).round_().clamp_(0, top)
        error = weight - (codes - zero) / scale
        size = error.abs()
        errors.append(size.sum(axis))
        kept = size.sub_(size.pow(LP_NORM - 1).div_(BETA)).clamp_min_(0).copysign_(error)
        zero = codes.add_(kept.sub_(weight).mul_(scale)).mean(axis, keepdim=True)
        zeros.append(zero)
    return torch.stack(zeros), torch.stack(errors)


def _stopping_step(errors: list[float]) -> int:
    """The first step whose error is no improvement: ``hqq`` stops after it, else after the last."""
    best = float("inf")
    for step, error in enumerate(errors):
        if not error < best:
            return step
        best = error
    return len(errors) - 1


@contextmanager
def plugged_in() -> Iterator[None]:
    """``hqq``'s ``Quantizer`` with this solver in place of its own, within the block."""
    with _plugging:
        own = HqqPackage.optimize_weights
        HqqPackage.optimize_weights = staticmethod(optimize_weights)
        try:
            yield
        finally:
            HqqPackage.optimize_weights = own
