"""Round to nearest: HQQ's min-max grid without its solver."""

from __future__ import annotations

from torch import Tensor

from lsq_core.config import QuantConfig
from lsq_core.quantize.base import Grid
from lsq_core.quantize.hqq import solve_with_hqq
from lsq_core.quantize.packed import GridQuantizer


class Rtn(GridQuantizer):
    """Round to nearest on the min-max grid of each group."""

    def solve(self, weight: Tensor, config: QuantConfig, axis: int) -> Grid:
        """See :class:`lsq_core.quantize.packed.GridQuantizer`."""
        return solve_with_hqq(weight, config, axis, optimize=False)
