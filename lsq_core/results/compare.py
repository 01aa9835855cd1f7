"""Comparison of runs. Needs no torch.

How often a method beats another (method §6, [A] Fig. 6), what more bits buy (Fig. 9), and how two
runs differ in settings and plan (Fig. 8).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lsq_core.bits import EXTENDED_LADDER, PAPER, find_stop, get_ladder, is_mixed, parse_config
from lsq_core.planning.methods import mixes_rows, reads_field

#: Columns that must be equal for two perplexities to be comparable.
_COMPARISON_KEY = ("fingerprint", "corpus", "corpus_sha256", "protocol", "tokens")


def same_measurement(runs: pd.DataFrame, evaluation: str) -> pd.DataFrame:
    """Return the rows with the model, corpus, protocol, tokens and origin of an evaluation.

    ``runs`` are from :meth:`lsq_core.store.store.Store.results`. Runs measured here and runs
    shipped with the project count as the same origin; published runs as another.
    """
    own = runs[runs["evaluation"] == evaluation].iloc[0]
    keys = ["fingerprint", "corpus_sha256", "protocol", "tokens"]
    same = pd.concat(
        [runs[key].eq(own[key]) | (runs[key].isna() & pd.isna(own[key])) for key in keys], axis=1
    ).all(axis=1)
    published = runs["origin"] == "published"
    return runs[same & (published == (own["origin"] == "published"))]


@dataclass(frozen=True)
class WinTieLoss:
    """The numbers of comparisons that a method won, tied and lost against another."""

    wins: int
    ties: int
    losses: int

    def __add__(self, more: WinTieLoss) -> WinTieLoss:
        """Return the sum of both counts."""
        return WinTieLoss(self.wins + more.wins, self.ties + more.ties, self.losses + more.losses)

    @property
    def total(self) -> int:
        """The number of comparisons."""
        return self.wins + self.ties + self.losses

    @property
    def percentages(self) -> tuple[int, int, int]:
        """Wins, ties and losses in percent, rounded half to even; zeros if there are none."""
        shares = (self.wins, self.ties, self.losses)
        return tuple(round(100 * count / self.total) if self.total else 0 for count in shares)


def add_labels(runs: pd.DataFrame) -> pd.DataFrame:
    """Add the columns ``label``, ``boost_stop`` and ``top_m`` of each run's request.

    ``label`` is the name of the base stop (``3.13``). Without a base, it is the budget: the name of
    its stop, or bits per parameter with two decimals; None for a budget in bytes. ``runs`` has the
    columns ``base`` and ``request`` of :meth:`lsq_core.store.store.Store.results`.
    """
    request_fields = [json.loads(text) if isinstance(text, str) else {} for text in runs["request"]]
    bases = runs["base"].astype(object).where(runs["base"].notna(), None)
    labels = [base or _label(request) for base, request in zip(bases, request_fields, strict=True)]
    return runs.assign(
        label=labels,
        boost_stop=[request.get("boost_stop") for request in request_fields],
        top_m=[request.get("top_m") for request in request_fields],
    )


def _label(request: dict) -> str | None:
    budget = request.get("budget") or ""
    stop = find_stop(budget, get_ladder(request.get("ladder", PAPER)))
    if stop is not None:
        return stop.stop_name
    return f"{float(budget.removesuffix('bpp')):.2f}" if budget.endswith("bpp") else None


def win_tie_loss(runs: pd.DataFrame, method: str, other: str) -> WinTieLoss:
    """Compare every run of a method with the other method's runs at the same budget.

    Perplexities are rounded to two decimals; the lower one wins, equal ones tie. As in [A], budgets
    are the same if the *labels* of the bases are, although a boosted run uses up to 7 % more bits:
    show the bits beside the result. Runs are compared within one model, corpus and protocol, and
    at the same ``boost_stop`` and ``top_m`` if the other method uses them; if the other method has
    several such runs, each of them counts.

    Parameters
    ----------
    runs
        Rows of :meth:`lsq_core.store.store.Store.results`, restricted to the models of interest.

    Example
    -------
    >>> runs = store.results("published:Llama-2-7b-hf", origin="published")  # doctest: +SKIP
    >>> win_tie_loss(runs, "sensiboost", "uniform").percentages  # doctest: +SKIP
    (98, 1, 1)
    """
    labelled = add_labels(runs)
    labelled = labelled[labelled["perplexity"].notna() & labelled["label"].notna()]
    key = [*_COMPARISON_KEY, "label"] + [
        field for field in ("boost_stop", "top_m") if reads_field(other, field)
    ]
    columns = [*key, "perplexity"]
    mine = labelled.loc[labelled["method"] == method, columns]
    theirs = labelled.loc[labelled["method"] == other, columns]
    pairs = mine.merge(theirs, on=key, suffixes=("", "_other"))
    return _count_outcomes(pairs["perplexity"], pairs["perplexity_other"])


#: Neighbours whose sizes differ by more than this share are not interpolated.
MAX_INTERPOLATION_GAP = 0.10
#: Sizes that differ by at most this share count as equal.
SAME_SIZE = 0.001
#: Minimum number of comparisons from which to conclude which method is better.
MIN_COMPARISONS = 5


def win_tie_loss_at_equal_bytes(runs: pd.DataFrame, method: str, other: str) -> WinTieLoss:
    """Compare every run of a method with what the other method reaches at the same size.

    The latter is :func:`interpolate_perplexity` of the other method's runs of the same model,
    corpus and protocol at this run's nominal bits per parameter, which for one model are
    proportional to bytes. A run is left out if the other method has neither a run of its size nor
    neighbours close enough. Perplexities are rounded to two decimals as in :func:`win_tie_loss`.

    If a run's plan was not published, its bits are the label it was reported under, which differs
    from the plan's size by up to 0.2 % and is used without correction.

    Parameters
    ----------
    runs
        As in :func:`win_tie_loss`.
    """
    total = WinTieLoss(0, 0, 0)
    known = runs[runs["perplexity"].notna() & runs["bits_per_param"].notna()]
    for _, group in known.groupby(list(_COMPARISON_KEY), dropna=False):
        mine, theirs = (
            group.loc[group["method"] == name, ["bits_per_param", "perplexity"]].to_numpy(float)
            for name in (method, other)
        )
        reached = np.array(
            [interpolate_perplexity(theirs, bits) for bits in mine[:, 0]], dtype=float
        )
        comparable = ~np.isnan(reached)
        total += _count_outcomes(mine[comparable, 1], reached[comparable])
    return total


def interpolate_perplexity(runs: np.ndarray, size: float) -> float:
    """Return the perplexity that a method's runs reach at a size; NaN if it cannot be inferred.

    If runs are within :data:`SAME_SIZE` of the size, the best of them is used. Otherwise the
    logarithm of perplexity is linearly interpolated over size between the neighbours on the
    method's Pareto front (:func:`pareto`), whose sizes must be within
    :data:`MAX_INTERPOLATION_GAP` of each other. Nothing is extrapolated.

    Perplexity decreases ever more slowly with size, so the interpolated value is slightly above
    what a run of this size would reach.

    Parameters
    ----------
    runs
        Sizes (in bits per parameter or any other unit) and perplexities, (k, 2).
    size
        In the same unit.

    >>> round(interpolate_perplexity(np.array([[4.0, 8.0], [4.2, 2.0]]), 4.1), 6)
    4.0
    """
    same = np.abs(runs[:, 0] / size - 1) <= SAME_SIZE
    if same.any():
        return float(runs[same, 1].min())
    front = runs[pareto(pd.Series(runs[:, 0]), pd.Series(runs[:, 1])).to_numpy()]
    below, above = front[front[:, 0] < size], front[front[:, 0] > size]
    if not len(below) or not len(above):
        return float("nan")
    low, high = below[below[:, 0].argmax()], above[above[:, 0].argmin()]
    if high[0] / low[0] - 1 > MAX_INTERPOLATION_GAP:
        return float("nan")
    return float(np.exp(np.interp(size, [low[0], high[0]], np.log([low[1], high[1]]))))


def _count_outcomes(own: pd.Series | np.ndarray, others: pd.Series | np.ndarray) -> WinTieLoss:
    own, others = np.round(own, 2), np.round(others, 2)
    return WinTieLoss(
        int((own < others).sum()), int((own == others).sum()), int((own > others).sum())
    )


#: The pairs of methods compared in [A] Fig. 6.
FIGURE_6 = (
    ("sensiboost", "uniform"),
    ("sensiboost", "mxq"),
    ("sensiboost", "sensiboost-ablation"),
    ("kurtboost", "uniform"),
    ("kurtboost", "mxq"),
    ("kurtboost", "kurtboost-ablation"),
    ("sensiboost", "kurtboost"),
)
#: Pairs that show the value of Algorithm 1's detection over as many top-ranked layers.
DETECTION_WORTH = (("sensiboost", "sensiboost-rank"), ("kurtboost", "kurtboost-rank"))


def figure_6(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the comparisons of :data:`FIGURE_6` for which both methods have runs.

    Those of :data:`DETECTION_WORTH`, which are not in the paper, follow.

    Columns are ``method``, ``against``, ``equal`` (True for equal bytes, False for equal labels),
    ``wins``, ``ties``, ``losses``, ``total``, and ``enough``, whether there are enough
    (:data:`MIN_COMPARISONS`) to be drawn and given as shares.
    """
    available = set(runs["method"])
    counts = {False: win_tie_loss, True: win_tie_loss_at_equal_bytes}
    rows = [
        (*pair, equal, outcome.wins, outcome.ties, outcome.losses, outcome.total)
        for pair in (*FIGURE_6, *DETECTION_WORTH)
        if available.issuperset(pair)
        for equal, count in counts.items()
        if (outcome := count(runs, *pair)).total
    ]
    names = ["method", "against", "equal", "wins", "ties", "losses", "total"]
    return pd.DataFrame(rows, columns=names).assign(enough=lambda f: f["total"] >= MIN_COMPARISONS)


def uniform_bases(runs: pd.DataFrame) -> dict[str, pd.Series]:
    """Return the newest uniform HQQ run of each base stop, by increasing bits.

    ``runs`` are of one model, corpus and protocol.
    """
    uniform = runs[(runs["method"] == "uniform") & (runs["quantizer"] == "hqq")]
    uniform = uniform.dropna(subset=["perplexity", "bits_per_param"]).sort_values("created")
    by_stop = {str(row["base"]): row for _, row in uniform.iterrows()}
    names = [stop.stop_name for stop in EXTENDED_LADDER]
    return {name: by_stop[name] for name in names if name in by_stop}


def relative_to_base(runs: pd.DataFrame, base: Mapping[str, Any]) -> pd.DataFrame:
    """Add the columns ``extra`` and ``drop``: the relative increase in bits and drop in perplexity.

    Both are relative to ``base``, a row of ``runs``: ``extra`` 0.018 and ``drop`` 0.094 mean a
    perplexity 9.4 % lower for 1.8 % more bits ([A] Fig. 9).
    """
    return runs.assign(
        extra=runs["bits_per_param"].astype(float) / base["bits_per_param"] - 1,
        drop=1 - runs["perplexity"].astype(float) / base["perplexity"],
    )


def pareto(size: pd.Series, perplexity: pd.Series) -> pd.Series:
    """Return which runs are Pareto-optimal in size and perplexity.

    Of runs equal in perplexity only the smallest are, and of runs equal in both, all of them. Runs
    without a size or a perplexity never are.

    >>> pareto(pd.Series([1, 2, 3, 3]), pd.Series([9.0, 9.5, 7.0, 8.0])).tolist()
    [True, False, True, False]
    """
    frame = pd.DataFrame({"size": size, "perplexity": perplexity}).astype(float).dropna()
    best = frame.groupby("size")["perplexity"].min()  # sorted by size
    before = best.cummin().shift(fill_value=np.inf)
    front = best[best < before]
    available = (frame["size"].map(front) == frame["perplexity"]).reindex(size.index)
    return available.fillna(False).astype(bool)


# --- two runs -------------------------------------------------------------------------------


def byte_shares(modules: pd.DataFrame, parameters: Mapping[str, int]) -> pd.Series:
    """Return each configuration's share of a plan's nominal bytes, by name ([A] Fig. 8).

    ``modules`` is from :func:`plan_to_frame`; ``parameters`` is the number of weights by module.
    """
    known = [config.name for config in EXTENDED_LADDER]
    names = [name for name in modules["config"].unique() if name in known or is_mixed(name)]
    bits = {name: parse_config(name).nominal_bits for name in names}
    sizes = modules["module"].map(parameters) * modules["config"].map(bits)
    shares = sizes.groupby(modules["config"]).sum() / sizes.sum()
    return shares.reindex(sorted(shares.index, key=lambda name: bits[name]))


def plan_difference(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Return the modules with different configurations in two plans of one model.

    Both plans are from :func:`plan_to_frame`. Columns are ``module, layer, type, config,
    config_other``; rows are in the order of the first plan.
    """
    both = a.merge(b[["module", "config"]], on="module", suffixes=("", "_other"))
    different = both[both["config"] != both["config_other"]]
    return different[["module", "layer", "type", "config", "config_other"]].reset_index(drop=True)


def run_settings(record: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return a run's settings and provenance as text by name; unknown ones are left out.

    ``record`` is from :meth:`lsq_core.store.store.Store.record`.
    """
    run, plan, own = record["run"], record["plan"], record["evaluation"]
    content = plan.get("content") or {}
    request_fields = content.get("request") or {}
    # The text used to score rows or calibrate the quantizer is more specific than the profile's.
    profile = (record["profile"].get("settings") or {}) | (content.get("calibration") or {})
    method = run["method"]
    rows = mixes_rows(method)
    boosts = reads_field(method, "boost_stop")
    known = {
        "method": run["method"],
        "base": content.get("base"),
        "budget": request_fields.get("budget"),
        "boost stops": request_fields.get("boost_stop") if boosts else None,
        "outliers boosted": (request_fields.get("top_m") or "all") if boosts else None,
        "metric": request_fields.get("metric") if reads_field(method, "metric") else None,
        "seed": request_fields.get("seed") if reads_field(method, "seed") else None,
        "bits of rows": f"{request_fields['low_bits']} and {request_fields['high_bits']}"
        if rows
        else None,
        "group size": request_fields.get("group_size") if rows else None,
        "ratios": request_fields.get("ratios") if rows else None,
        "loss for choosing ratios": request_fields.get("loss") if rows else None,
        "negative eigenvalues": "clipped" if rows and request_fields.get("clip") else None,
        "solved": "to the optimum" if request_fields.get("exact") else None,
        "pins": ", ".join(request_fields.get("pins") or []),
        "ties": "; ".join(request_fields.get("ties") or []),
        "server": request_fields.get("serve"),
        "quantizer": run["quantizer"],
        "format": run["format"] if run.get("format", "lsq") != "lsq" else None,
        "exported from run": run.get("exported_from"),
        "axis": content.get("axis"),
        "metadata": content.get("metadata"),
        "calibration": profile.get("calibration"),
        "calibration texts": profile.get("samples"),
        "block tokens": profile.get("block_tokens"),
        "corpus": own["corpus"],
        "corpus SHA-256": own["corpus_sha256"],
        "protocol": own["protocol"],
        "tokens": own["tokens"],
        "full-precision evaluation": own.get("full_precision"),
        "dtype": run["dtype"],
        "device": run["device"],
        "machine": run["machine"],
        "model": record["model"].get("source"),
        "fingerprint": run["fingerprint"],
        "published in": (content.get("published") or {}).get("file"),
    }
    known |= {f"version of {name}": text for name, text in (run["versions"] or {}).items()}
    return {name: str(value) for name, value in known.items() if value not in (None, "")}


def settings_difference(a: Mapping[str, str], b: Mapping[str, str]) -> pd.DataFrame:
    """Return the settings in which two runs differ: ``setting, run, against``; ``–`` if missing."""
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    rows = [(name, a.get(name, "–"), b.get(name, "–")) for name in names]
    return pd.DataFrame(rows, columns=["setting", "run", "against"])
