"""Divergence of a model's predictions from the reference's, token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lsq_core.evaluation.protocol import MIN_WINDOWS

#: The stored quantiles by name, among those of llama.cpp's ``perplexity --kl-divergence``.
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "max": 1.0}
_BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True)
class Divergence:
    """KL divergence from full precision, in nats: its mean and its distribution over tokens.

    ``low`` and ``high`` bound the 95 % bootstrap interval of the mean over windows; both are NaN
    for fewer than ``MIN_WINDOWS`` windows. ``rms_log_prob`` is the root mean square change, in
    nats, of the log-probability of the actual token.
    """

    mean: float
    low: float
    high: float
    median: float
    p90: float
    p99: float
    p999: float
    max: float
    rms_log_prob: float


def summarize_divergence(
    kl: np.ndarray, squared_change: np.ndarray, counts: np.ndarray
) -> Divergence:
    """Summarize ``kl`` (tokens,), which is ordered by windows of ``counts`` (windows,) tokens.

    ``squared_change`` (windows,) is the sum of squared changes of the tokens' log-probabilities.
    """
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    sums = np.add.reduceat(kl.astype(float), starts)
    low, high = _mean_interval(sums, counts)
    quantiles = np.quantile(kl, list(QUANTILES.values()))
    return Divergence(
        mean=float(sums.sum() / counts.sum()),
        low=low,
        high=high,
        rms_log_prob=math.sqrt(squared_change.sum() / counts.sum()),
        **dict(zip(QUANTILES, quantiles.tolist(), strict=True)),
    )


def _mean_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    if len(counts) < MIN_WINDOWS:
        return math.nan, math.nan
    picks = np.random.default_rng(0).integers(0, len(counts), (_BOOTSTRAP_DRAWS, len(counts)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def format_distribution(values: Mapping[str, float]) -> str:
    """Format the quantiles of a stored :class:`Divergence`: ``median 0.12, 90 % 0.84, …``."""
    titles = {"median": "median", "p90": "90 %", "p99": "99 %", "p999": "99.9 %", "max": "max"}
    return ", ".join(f"{title} {values[name]:.3g}" for name, title in titles.items())
