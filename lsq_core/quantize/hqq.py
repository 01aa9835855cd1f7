"""Half-quadratic quantization [D], by the ``hqq`` package with this project's fast solver in it."""

from __future__ import annotations

from hqq.core.quantize import Quantizer as HqqPackage
from torch import Tensor

from lsq_core.config import QuantConfig
from lsq_core.quantize.base import Grid
from lsq_core.quantize.packed import GridQuantizer
from lsq_core.quantize.solver import plugged_in


def solve_with_hqq(weight: Tensor, config: QuantConfig, axis: int, optimize: bool) -> Grid:
    """Scale and zero as ``hqq`` finds them, with the solver or from the min-max grid alone."""
    with plugged_in():
        _, meta = HqqPackage.quantize(
            weight,
            nbits=config.bits,
            group_size=config.group_size,
            axis=axis,
            optimize=optimize,
            bitpack=False,
            device=str(weight.device),
        )
    return Grid(meta["scale"].float().flatten(), meta["zero"].float().flatten())


class Hqq(GridQuantizer):
    """Min-max grid whose zero point the half-quadratic solver then moves."""

    def solve(self, weight: Tensor, config: QuantConfig, axis: int) -> Grid:
        """See :class:`lsq_core.quantize.packed.GridQuantizer`."""
        return solve_with_hqq(weight, config, axis, optimize=True)
