"""Frobenius norm of the weight error at every configuration (method §2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lsq_core.bits import LADDER, QuantConfig
from lsq_core.model.info import Matrix
from lsq_core.profiling.metrics.base import Metric, Score

if TYPE_CHECKING:
    from torch import Tensor

    from lsq_core.profiling.context import BlockContext

#: Between these bounds, no square in the sum left the range of float32.
_MIN_SQUARES, _MAX_SQUARES = 1e-24, 1e36


def squared_norm(values: Tensor) -> float:
    """Return ``Σ v²`` of (…, n): over n in the dtype of the values, over the rest in float64.

    If squares could leave the range of float32, all of it is computed in float64, more slowly.
    """
    import torch

    total = float(torch.linalg.vector_norm(values, dim=-1).double().square().sum())
    if _MIN_SQUARES < total < _MAX_SQUARES:
        return total
    norms = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64)
    return float(norms.square().sum())


class WeightError(Metric):
    """``‖W − Ŵ_c‖_F`` of each matrix at each configuration; needs no calibration text."""

    name = "weight_error"
    title = "Weight error"
    label = short = "weight error"
    axis = "‖W − Ŵ‖ (Frobenius)"
    meaning = "How far the weights move when they are quantized."
    needs_calibration = False
    configs = LADDER
    by_config = True

    def score_at_config(
        self, context: BlockContext, config: QuantConfig, quantized: dict[Matrix, Tensor]
    ) -> Iterator[Score]:
        """Yield one score for each matrix."""
        for matrix, weight in quantized.items():
            error = squared_norm(context.weight(matrix).float() - weight) ** 0.5
            yield Score(matrix, self.name, config, error)
