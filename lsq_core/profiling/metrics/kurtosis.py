"""Kurtosis of a weight matrix (method §2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lsq_core.profiling.metrics.base import Metric, Score

if TYPE_CHECKING:
    from torch import Tensor

    from lsq_core.profiling.context import BlockContext

_CHUNK = 2**22


def kurtosis(weight: Tensor) -> Tensor:
    """Return Pearson's kurtosis (normal = 3) with population moments, float64.

    Equals ``scipy.stats.kurtosis(w, axis=None, fisher=False, bias=True)``; NaN for a constant
    matrix.
    """
    import torch

    chunks = weight.reshape(-1).split(_CHUNK)
    count = weight.numel()
    mean = sum(chunk.double().sum() for chunk in chunks) / count
    second = fourth = torch.zeros((), dtype=torch.float64, device=weight.device)
    for chunk in chunks:
        squared = (chunk.double() - mean).square_()
        second = second + squared.sum()
        fourth = fourth + squared.square_().sum()
    return (fourth / count) / (second / count) ** 2


class Kurtosis(Metric):
    """Heaviness of each matrix's tails; needs no quantizer and no calibration text."""

    name = "kurtosis"
    title = "Weight kurtosis"
    label = short = "kurtosis"
    axis = "kurtosis (normal = 3)"
    meaning = "How heavy the tails of a matrix's weights are; a normal distribution has 3."
    detects_outliers = True
    needs_calibration = False
    splits_by_layer = True

    def score_unquantized(self, context: BlockContext) -> Iterator[Score]:
        """Yield one score for each matrix."""
        for matrix in context.matrices:
            yield Score(matrix, self.name, None, kurtosis(context.weight(matrix)))
