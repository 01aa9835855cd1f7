"""How alike patterns over layers are, and where metrics put matrices in another order."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import rankdata, spearmanr

from lsq_core.bits import LADDER
from lsq_core.profiling.metrics import PROXIES
from lsq_core.profiling.profile import Profile

#: Fewer layers in common than this have no rank correlation worth telling.
MIN_COMMON_LAYERS = 4


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's ρ of two (n,) arrays where both are finite; NaN where too little is.

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
    """Spearman's ρ between lines: over the layers of each part, averaged over the parts.

    ``frame`` has ``line, part, layer, value``. Ranks are taken within a part, since parts differ
    by orders of magnitude and would agree by that alone. Lines with other layers in a part
    (models of another depth) have no correlation there; NaN where no part has one.
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
    """Spearman's ρ of each proxy and its exact score over all matrices, at every stop.

    ``proxy, exact, config, rank_correlation``; no rows for what the profile doesn't hold.
    """
    held = set(zip(profile.values["metric"], profile.values["config"], strict=True))
    rows = [
        (
            proxy,
            exact,
            config.name,
            rank_correlation(profile.scores(proxy, config), profile.scores(exact, config)),
        )
        for proxy, exact in PROXIES.items()
        for config in LADDER
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
    """The two lines that agree least; None where no two can be compared."""
    values = correlations.to_numpy(copy=True)
    values[np.tril_indices(len(values))] = np.nan
    if not np.isfinite(values).any():
        return None
    row, column = np.unravel_index(np.nanargmin(values), values.shape)
    names = correlations.index
    return LinePair(names[row], names[column], float(values[row, column]))


def ranks(values: np.ndarray) -> np.ndarray:
    """Rank of each of (n,), 1 the largest, ties at their mean; NaN where there is no value."""
    result = np.full(len(values), np.nan)
    finite = np.isfinite(values)
    result[finite] = rankdata(-values[finite])
    return result
