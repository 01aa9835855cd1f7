"""Half-quadratic quantization [D]: the grid of ``hqq`` and this project's fast solver.

``hqq`` itself gives every group narrower than 10⁻⁴ the scale 1 and no group a scale below
1/20,000, which destroys matrices of small weights. The grid is the same here without these two.
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
    """Scale and zero (groups,) of a (out, in) float32 matrix of ordinary magnitude.

    The grid runs from the least weight of a group to the greatest; with ``optimize`` the
    solver then moves the zero points. A constant group has the scale 1.
    """
    return min_max_grids(weight, [config], axis, optimize)[0]


def min_max_grids(
    weight: Tensor, configs: Sequence[QuantConfig], axis: int, optimize: bool
) -> Grid:
    """:func:`min_max_grid` of several configurations of one group size, (configs, groups)."""
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
    """Min-max grid whose zero point the half-quadratic solver then moves."""

    def solve(self, weight: Tensor, config: QuantConfig, axis: int) -> Grid:
        """See :class:`lsq_core.quantization.packed.GridQuantizer`."""
        return min_max_grid(weight, config, axis, optimize=True)

    def solve_several(self, weight: Tensor, configs: Sequence[QuantConfig], axis: int) -> Grid:
        """See :class:`lsq_core.quantization.packed.GridQuantizer`."""
        return min_max_grids(weight, configs, axis, optimize=True)
