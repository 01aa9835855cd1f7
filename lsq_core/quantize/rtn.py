"""Round to nearest: the min-max grid without the solver of HQQ."""

from __future__ import annotations

from torch import Tensor

from lsq_core.config import QuantConfig
from lsq_core.quantize.base import Grid
from lsq_core.quantize.hqq import min_max_grid
from lsq_core.quantize.packed import GridQuantizer


class Rtn(GridQuantizer):
    """Round to nearest on the min-max grid of each group."""

    def solve(self, weight: Tensor, config: QuantConfig, axis: int) -> Grid:
        """See :class:`lsq_core.quantize.packed.GridQuantizer`."""
        return min_max_grid(weight, config, axis, optimize=False)
