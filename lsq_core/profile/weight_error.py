"""Frobenius norm of the weight error at every configuration (method §2)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lsq_core.config import LADDER, QuantConfig
from lsq_core.model import Matrix
from lsq_core.profile.base import Metric, Score
from lsq_core.profile.context import BlockContext


class WeightError(Metric):
    """``‖W − Ŵ_c‖_F`` of each matrix at each configuration; needs no calibration text."""

    name = "weight_error"
    needs_text = False
    configs = LADDER

    def at_config(
        self, context: BlockContext, config: QuantConfig, quantized: dict[Matrix, Tensor]
    ) -> Iterator[Score]:
        """One score for each matrix; ``quantized`` holds float32 (out, in)."""
        for matrix, weight in quantized.items():
            error = (context.weight(matrix).float() - weight).double().norm()
            yield Score(matrix, self.name, config, float(error))
