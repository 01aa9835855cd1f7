"""Frobenius norm of the weight error at every configuration (method §2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lsq_core.bits import EXTENDED_LADDER, QuantConfig
from lsq_core.model.info import Matrix
from lsq_core.profiling.metrics.base import Metric, Score

if TYPE_CHECKING:
    from torch import Tensor

    from lsq_core.profiling.context import BlockContext

#: Values squared at a time: 32 MiB in float64.
_CHUNK = 2**22


def squared_norm(values: Tensor) -> Tensor:
    """Return ``Σ v²`` of all values, float64, on their device."""
    return squared_norms(values[None])[0]


def squared_norms(values: Tensor) -> Tensor:
    """Return ``Σ v²`` over all but the first dimension of (n, …), float64 (n,).

    Squares are those of float64, as some leave the range of float32.
    """
    import torch

    chunks = values.flatten(1).split(max(_CHUNK // len(values), 1), dim=1)
    norms = [torch.linalg.vector_norm(chunk, dim=1, dtype=torch.float64) for chunk in chunks]
    return sum(norm.square_() for norm in norms)


class WeightError(Metric):
    """``‖W − Ŵ_c‖_F`` of each matrix at each configuration; needs no calibration text."""

    name = "weight_error"
    title = "Weight error"
    label = short = "weight error"
    axis = "‖W − Ŵ‖ (Frobenius)"
    meaning = "How far the weights move when they are quantized."
    needs_calibration = False
    configs = EXTENDED_LADDER
    by_config = True

    def score_at_configs(
        self,
        context: BlockContext,
        configs: Sequence[QuantConfig],
        quantized: dict[Matrix, Tensor],
    ) -> Iterator[Score]:
        """Yield one score for each matrix and configuration."""
        for matrix, weights in quantized.items():
            errors = squared_norms(context.weight(matrix).float() - weights).sqrt_()
            for config, error in zip(configs, errors, strict=True):
                yield Score(matrix, self.name, config, error)
