"""Round to nearest: the min-max grid without HQQ's solver."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lsq_core.bits import QuantConfig
from lsq_core.quantization.base import Grid
from lsq_core.quantization.hqq.quantizer import min_max_grid, min_max_grids
from lsq_core.quantization.packed import GridQuantizer


class Rtn(GridQuantizer):
    """Round to nearest on the min-max grid of each group."""

    def solve(self, weight: Tensor, config: QuantConfig, axis: int) -> Grid:
        """See :class:`lsq_core.quantization.packed.GridQuantizer`."""
        return min_max_grid(weight, config, axis, optimize=False)

    def solve_several(self, weight: Tensor, configs: Sequence[QuantConfig], axis: int) -> Grid:
        """See :class:`lsq_core.quantization.packed.GridQuantizer`."""
        return min_max_grids(weight, configs, axis, optimize=False)
