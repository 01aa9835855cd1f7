"""Compare the GPU kernel with the solver on the CPU; run with ``TRITON_INTERPRET=1``."""

from __future__ import annotations

from itertools import product

import torch

from lsq_core.quantization.hqq import solver, solver_triton


def check_kernel(
    dtype: torch.dtype, axis: int, group_size: int, bits: tuple[int, ...], spread: float
) -> None:
    """Check zero points of 75 groups, more than a block but not a multiple, on several grids."""
    torch.manual_seed(0)
    weight = (spread * torch.randn(75 * group_size)).to(dtype)
    weight = weight.reshape((-1, group_size) if axis == 1 else (group_size, -1))
    low = weight.float().amin(axis)
    tops = [2**b - 1 for b in bits]
    scale = torch.stack([top / (weight.float().amax(axis) - low) for top in tops])
    inputs = (weight, scale, -low * scale, tops, axis)
    zeros, errors = solver_triton.run_all_steps(
        *inputs, steps=solver.STEPS, lp_norm=solver.LP_NORM, beta=solver.BETA
    )
    stop = solver.stopping_step((errors / weight.numel()).float())
    found = torch.stack([zeros[step, grid] for grid, step in enumerate(stop)])
    torch.testing.assert_close(found, solver.solve_several(*inputs), rtol=1e-5, atol=1e-4)


if __name__ == "__main__":
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    # errors of the second spread survive the shrinking; 24 is not a power of two
    cases = list(product(dtypes, (0, 1), (32, 128, 24), (((8, 3), 0.02), ((2,), 2.0))))
    for dtype, axis, group_size, (bits, spread) in cases:
        check_kernel(dtype, axis, group_size, bits, spread)
    print(len(cases), "cases")
