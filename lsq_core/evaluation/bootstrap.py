"""Paired bootstrap of the difference between two evaluations on the same windows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lsq_core.evaluation.protocol import MIN_WINDOWS


@dataclass(frozen=True)
class PerplexityDifference:
    """The relative difference of one run's perplexity from another's: their ratio minus one.

    ``low`` and ``high`` bound the 95 % paired bootstrap interval over windows; both are NaN for
    fewer than ``MIN_WINDOWS`` windows.
    """

    relative: float
    low: float
    high: float

    @property
    def is_tie(self) -> bool:
        """Whether zero lies within the interval, or there is no interval."""
        return not (self.low > 0 or self.high < 0)


def bootstrap_difference(
    nll: np.ndarray, other: np.ndarray, counts: np.ndarray, *, draws: int = 2000, seed: int = 0
) -> PerplexityDifference:
    """Compare the perplexity of ``nll`` with that of ``other`` by a paired bootstrap over windows.

    All three arrays are (windows,), for the same windows in the same order.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if not nll.shape == other.shape == counts.shape:
        raise ValueError("the two runs did not score the same windows")
    gap = nll - other
    relative = float(np.expm1(gap.sum() / counts.sum()))
    if len(gap) < MIN_WINDOWS:
        return PerplexityDifference(relative, math.nan, math.nan)
    random = np.random.default_rng(seed)
    picks = random.integers(0, len(gap), size=(draws, len(gap)))
    means = gap[picks].sum(1) / counts[picks].sum(1)
    low, high = np.expm1(np.quantile(means, [0.025, 0.975]))
    return PerplexityDifference(relative, float(low), float(high))
