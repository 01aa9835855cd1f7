"""The half-quadratic solver's steps on a GPU: one kernel that keeps each group in registers.

A weight is read once for each grid. The kernel writes each group's zero point after every step,
because the step at which ``hqq`` stops is known only when all groups' errors are, and these errors,
summed by block. That is 80 bytes for a group of 64 weights, hidden by the arithmetic in between.

``TRITON_INTERPRET=1`` runs the same kernel on the CPU, which is how the tests check it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from math import log2

import torch
from torch import Tensor

from lsq_core.quantization.base import highest_codes

#: Weights that one block holds in registers, and its warps: 16 weights per thread.
TILE = 2048
WARPS = 4


def available() -> bool:
    """Return whether Triton is installed, as it is with PyTorch for CUDA."""
    return find_spec("triton") is not None


def run_all_steps(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor,
    tops: Sequence[int],
    axis: int,
    *,
    steps: int,
    lp_norm: float,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Run every step of every group for several grids, in one launch.

    Parameters
    ----------
    weight
        (groups, group_size) for axis 1, (group_size, groups) for axis 0; float32, bfloat16 or
        float16, any strides.
    scale, zero
        float32 (grids, groups).
    tops
        The highest code of each grid.

    Returns
    -------
    zeros, errors
        The zero points after each step, float32 (steps, grids, groups), and the summed absolute
        error before each, float64 (steps, grids), excluding groups in which it is not finite.
    """
    import triton

    grids, groups, group_size = len(tops), weight.shape[1 - axis], weight.shape[axis]
    padded = triton.next_power_of_2(group_size)
    block = max(TILE // padded, 1)
    blocks = triton.cdiv(groups, block)
    zeros = torch.empty(steps, grids, groups, dtype=torch.float32, device=weight.device)
    errors = torch.empty(steps, grids, blocks, dtype=torch.float32, device=weight.device)
    with torch.cuda.device(weight.device if weight.is_cuda else -1):
        _kernel()[(blocks, grids)](
            weight,
            scale.contiguous(),
            zero.contiguous(),
            highest_codes(weight.device, tuple(tops)),
            zeros,
            errors,
            groups,
            blocks,
            weight.stride(1 - axis),
            weight.stride(axis),
            STEPS=steps,
            NORM=lp_norm,
            LOG_BETA=log2(beta),
            SIZE=group_size,
            PADDED=padded,
            BLOCK=block,
            num_warps=WARPS,
        )
    return zeros, errors.sum(-1, dtype=torch.float64)


@cache
def _kernel():
    """Return the kernel, defined on first use so that importing this module needs no Triton."""
    import triton
    import triton.language as tl

    @triton.jit
    def solve(
        weight,
        scale,
        zero,
        tops,
        zeros,
        errors,
        groups,
        blocks,
        group_stride,
        item_stride,
        STEPS: tl.constexpr,
        NORM: tl.constexpr,
        LOG_BETA: tl.constexpr,
        SIZE: tl.constexpr,
        PADDED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        items = tl.arange(0, PADDED)
        real = rows < groups
        inside = real[:, None] & (items < SIZE)[None, :]
        offsets = rows[:, None] * group_stride + items[None, :] * item_stride
        grid = tl.program_id(1).to(tl.int64)
        grids = tl.num_programs(1).to(tl.int64)
        top = tl.load(tops + grid)
        s = tl.load(scale + grid * groups + rows, mask=real, other=1.0)
        z = tl.load(zero + grid * groups + rows, mask=real, other=0.0)
        scaled = tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32) * s[:, None]
        mean = tl.sum(scaled, 1) / SIZE
        strength = (2 - NORM) * tl.log2(s) - LOG_BETA
        zeros += grid * groups + rows
        errors += grid * blocks + tl.program_id(0)
        for _ in range(STEPS):
            shifted = scaled + z[:, None]
            codes = tl.minimum(tl.maximum(shifted, 0.0), top)
            # Adding 1.5 · 2^23 leaves no fraction bits: rounds half to even, as torch does.
            codes = (codes + 12582912.0) - 12582912.0
            error = shifted - codes
            size = tl.abs(error)
            shrunk = tl.maximum(size - tl.exp2(strength[:, None] + (NORM - 1) * tl.log2(size)), 0.0)
            shifted_codes = codes + tl.where(error < 0, -shrunk, shrunk)
            total_error = tl.sum(tl.where(inside, size, 0.0), 1) / s
            tl.store(errors, tl.sum(tl.where(real & (total_error < 3.0e38), total_error, 0.0), 0))
            z = tl.sum(tl.where(inside, shifted_codes, 0.0), 1) / SIZE - mean
            tl.store(zeros, z, mask=real)
            zeros += grids * groups
            errors += grids * blocks

    return solve
