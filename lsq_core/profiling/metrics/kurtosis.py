"""Kurtosis of a weight matrix (method §2)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lsq_core.profiling.context import BlockContext
from lsq_core.profiling.metrics.base import Metric, Score

_CHUNK = 2**22


def kurtosis(weight: Tensor) -> float:
    """Pearson's kurtosis (normal = 3) with population moments, accumulated in float64.

    The same as ``scipy.stats.kurtosis(w, axis=None, fisher=False, bias=True)``; NaN for a
    constant matrix.
    """
    chunks = weight.reshape(-1).split(_CHUNK)
    count = weight.numel()
    mean = sum(chunk.double().sum() for chunk in chunks) / count
    second = fourth = torch.zeros((), dtype=torch.float64, device=weight.device)
    for chunk in chunks:
        squared = (chunk.double() - mean).square_()
        second = second + squared.sum()
        fourth = fourth + squared.square_().sum()
    return float((fourth / count) / (second / count) ** 2)


class Kurtosis(Metric):
    """How heavy the tails of each matrix are; needs no quantizer and no calibration text."""

    name = "kurtosis"
    needs_calibration = False

    def score_unquantized(self, context: BlockContext) -> Iterator[Score]:
        """One score for each matrix."""
        for matrix in context.matrices:
            yield Score(matrix, self.name, None, kurtosis(context.weight(matrix)))
