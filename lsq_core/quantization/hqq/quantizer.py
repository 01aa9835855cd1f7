"""Half-quadratic quantization [D]: the grid of ``hqq`` and this project's fast solver.

``hqq`` itself gives groups narrower than 10⁻⁴ the scale 1 and limits scales to at least 1/20,000,
which destroys matrices with small weights. The grid here is the same without these two rules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lsq_core.bits import QuantConfig
from lsq_core.quantization.base import Grid, highest_codes
from lsq_core.quantization.hqq.solver import solve_several
from lsq_core.quantization.packed import CONSTANT_SPREAD, GridQuantizer


def min_max_grid(weight: Tensor, config: QuantConfig, axis: int, optimize: bool) -> Grid:
    """Return scale and zero (groups,) of an (out, in) float32 matrix of ordinary magnitude.

    The grid runs from the smallest to the largest weight of a group; with ``optimize``, the solver
    then adjusts the zero points. A constant group has scale 1.
    """
    return min_max_grids(weight, [config], axis, optimize)[0]


def min_max_grids(
    weight: Tensor, configs: Sequence[QuantConfig], axis: int, optimize: bool
) -> Grid:
    """Return :func:`min_max_grid` for configurations of one group size: (configs, groups)."""
    size, tops = configs[0].group_size, tuple(2**config.bits - 1 for config in configs)
    groups = weight.reshape(-1, size) if axis == 1 else weight.reshape(size, -1)
    low, high = groups.amin(axis), groups.amax(axis)
    spread = high - low
    inverse = highest_codes(weight.device, tops)[:, None] * spread.reciprocal()
    inverse = torch.where(spread > CONSTANT_SPREAD, inverse, 1.0)
    zero = -low * inverse
    if optimize:
        zero = solve_several(groups, inverse, zero, tops, axis)
    return Grid(1.0 / inverse, zero)


class Hqq(GridQuantizer):
    """Min-max grid with zero points optimized by the half-quadratic solver."""

    def solve(self, weight: Tensor, config: QuantConfig, axis: int) -> Grid:
        """See :class:`lsq_core.quantization.packed.GridQuantizer`."""
        return min_max_grid(weight, config, axis, optimize=True)

    def solve_several(self, weight: Tensor, configs: Sequence[QuantConfig], axis: int) -> Grid:
        """See :class:`lsq_core.quantization.packed.GridQuantizer`."""
        return min_max_grids(weight, configs, axis, optimize=True)
