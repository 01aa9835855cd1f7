"""Rank correlations between patterns over layers and between metrics."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import rankdata, spearmanr

from lsq_core.profiling.metrics import proxies
from lsq_core.profiling.profile import Profile

#: Minimum number of common layers for a rank correlation.
MIN_COMMON_LAYERS = 4


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's ρ of two (n,) arrays over the entries that are finite in both.

    NaN if there are fewer than ``MIN_COMMON_LAYERS`` such entries or either array is constant.

    Example
    -------
    >>> rank_correlation(np.array([1, 2, 3, 9.0]), np.array([2, 4, 5, 6.0]))
    1.0
    """
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    if len(x) < MIN_COMMON_LAYERS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    return round(float(spearmanr(x, y).statistic), 12)


def pattern_correlations(frame: pd.DataFrame) -> pd.DataFrame:
    """Return Spearman's ρ between lines, computed over the layers of each part and averaged.

    ``frame`` has columns ``line, part, layer, value``. Ranks are computed within each part:
    parts differ by orders of magnitude, which alone would make lines agree. Parts in which two
    lines cover different layers (models of different depth) are skipped; NaN if none is left.
    """
    lines = list(dict.fromkeys(frame["line"]))
    wide = {
        part: rows.pivot_table(index="layer", columns="line", values="value")
        for part, rows in frame.groupby("part", sort=False)
    }
    result = pd.DataFrame(np.eye(len(lines)), lines, lines)
    for a, b in combinations(lines, 2):
        each = [_part_correlation(table, a, b) for table in wide.values()]
        finite = [rho for rho in each if np.isfinite(rho)]
        result.loc[a, b] = result.loc[b, a] = np.mean(finite) if finite else np.nan
    return result


def _part_correlation(table: pd.DataFrame, a: str, b: str) -> float:
    if a not in table or b not in table or (table[a].isna() != table[b].isna()).any():
        return np.nan
    return rank_correlation(table[a].to_numpy(), table[b].to_numpy())


def proxy_agreement(profile: Profile) -> pd.DataFrame:
    """Return Spearman's ρ of each proxy and its exact score over all matrices, by configuration.

    Columns are ``proxy, exact, config, rank_correlation``; scores missing from the profile have
    no row.
    """
    held = set(zip(profile.values["metric"], profile.values["config"], strict=True))
    rows = [
        (
            proxy,
            exact,
            config.name,
            rank_correlation(profile.scores(proxy, config), profile.scores(exact, config)),
        )
        for proxy, exact in proxies().items()
        for config in profile.ladder
        if {(proxy, config.name), (exact, config.name)} <= held
    ]
    return pd.DataFrame(rows, columns=["proxy", "exact", "config", "rank_correlation"])


@dataclass(frozen=True)
class LinePair:
    """Two lines and their correlation."""

    first: str
    second: str
    value: float


def lowest_correlation(correlations: pd.DataFrame) -> LinePair | None:
    """Return the two lines with the lowest correlation; None if no two can be compared."""
    values = correlations.to_numpy(copy=True)
    values[np.tril_indices(len(values))] = np.nan
    if not np.isfinite(values).any():
        return None
    row, column = np.unravel_index(np.nanargmin(values), values.shape)
    names = correlations.index
    return LinePair(names[row], names[column], float(values[row, column]))


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks (n,): 1 for the largest, the mean rank for ties, NaN for a missing value."""
    result = np.full(len(values), np.nan)
    finite = np.isfinite(values)
    result[finite] = rankdata(-values[finite])
    return result
