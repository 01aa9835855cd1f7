"""The difference between two evaluations on the same windows, with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass
from lsq_core.evaluation.protocol import MIN_WINDOWS


@dataclass(frozen=True)
class PerplexityDifference:
    """How much higher one run's perplexity is than another's, as a ratio minus one.

    ``low`` and ``high`` bound the 95 % paired bootstrap interval over windows; both are NaN where
    there are fewer than ``MIN_WINDOWS`` of them, which tell nothing about chance.
    """

    relative: float
    low: float
    high: float

    @property
    def is_tie(self) -> bool:
        """Whether no difference is within the interval, or there is none to tell them apart."""
        return not (self.low > 0 or self.high < 0)


def bootstrap_difference(
    nll: np.ndarray, other: np.ndarray, counts: np.ndarray, *, draws: int = 2000, seed: int = 0
) -> PerplexityDifference:
    """Paired bootstrap over windows: perplexity of ``nll`` against that of ``other``.

    All three are (windows,), of the same windows in the same order.

    Raises
    ------
    ValueError
        When the shapes differ.
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
