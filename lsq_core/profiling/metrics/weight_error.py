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

#: Values of each row to compare at a time, by device: few on a CPU, to stay in its cache and limit
#: the memory of the float64 copy; many on a GPU, where launching a kernel takes longer than running
#: it. Independent of the number of rows, so that a row's sum is the same to the last digit.
_CHUNK = {"cpu": 2**15, "cuda": 2**22}


def squared_distances(values: Tensor, other: Tensor) -> Tensor:
    """Return ``Σ (v − o)²`` over all but the first dimension of (n, …), float64 (n,).

    ``other`` is (…), shared by all n. Differences are computed in float32 and squared in float64,
    since some squares exceed the range of float32.
    """
    import torch

    size = _CHUNK[values.device.type]
    chunks = zip(values.flatten(1).split(size, dim=1), other.flatten().split(size), strict=True)
    norms = [
        torch.linalg.vector_norm(own.float() - others.float(), dim=1, dtype=torch.float64)
        for own, others in chunks
    ]
    return sum(norm.square_() for norm in norms)


class WeightError(Metric):
    """``‖W − Ŵ_c‖_F`` of each matrix at each configuration; needs no calibration text."""

    name = "weight_error"
    title = "Weight error"
    label = short = "weight error"
    axis = "‖W − Ŵ‖ (Frobenius)"
    meaning = "How far the weights move when they are quantized."
    needs_calibration = False
    splits_by_layer = True
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
            errors = squared_distances(weights, context.weight(matrix)).sqrt_()
            for config, error in zip(configs, errors, strict=True):
                yield Score(matrix, self.name, config, error)
