"""Frobenius norm of the weight error at every configuration (method §2)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lsq_core.bits import LADDER, QuantConfig
from lsq_core.model.info import Matrix
from lsq_core.profiling.context import BlockContext
from lsq_core.profiling.metrics.base import Metric, Score

#: Sums of squares between these were made of squares that float32 can hold.
_MIN_SQUARES, _MAX_SQUARES = 1e-24, 1e36


def squared_norm(values: Tensor) -> float:
    """``Σ v²`` of (…, n): over n in the dtype of the values, over the rest in float64.

    Where squares could leave the range of float32, all of it is in float64, which takes longer.
    """
    total = float(torch.linalg.vector_norm(values, dim=-1).double().square().sum())
    if _MIN_SQUARES < total < _MAX_SQUARES:
        return total
    norms = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64)
    return float(norms.square().sum())


class WeightError(Metric):
    """``‖W − Ŵ_c‖_F`` of each matrix at each configuration; needs no calibration text."""

    name = "weight_error"
    needs_calibration = False
    configs = LADDER

    def score_at_config(
        self, context: BlockContext, config: QuantConfig, quantized: dict[Matrix, Tensor]
    ) -> Iterator[Score]:
        """One score for each matrix; ``quantized`` holds float32 (out, in)."""
        for matrix, weight in quantized.items():
            error = squared_norm(context.weight(matrix).float() - weight) ** 0.5
            yield Score(matrix, self.name, config, error)
