"""Runs against runs: how often a method beats another (method §6, [A] Fig. 6), what more bits
buy (Fig. 9), and how two runs differ in settings and plan (Fig. 8). Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lsq_core.bits import EXTENDED_LADDER, PAPER, find_stop, get_ladder, is_mixed, parse_config
from lsq_core.planning.methods import mixes_rows, reads_field

#: What two runs must share to be compared: a perplexity means nothing without these.
_COMPARISON_KEY = ("fingerprint", "corpus", "corpus_sha256", "protocol", "tokens")


def same_measurement(runs: pd.DataFrame, evaluation: str) -> pd.DataFrame:
    """The rows of one model, corpus, protocol, number of tokens and origin: those of an evaluation.

    ``runs`` are of :meth:`lsq_core.store.store.Store.results`. What was measured here and what came
    with the project are of one origin; what was published is of another.
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
    """How many comparisons a method won, tied and lost against another."""

    wins: int
    ties: int
    losses: int

    def __add__(self, more: WinTieLoss) -> WinTieLoss:
        """The comparisons of both together."""
        return WinTieLoss(self.wins + more.wins, self.ties + more.ties, self.losses + more.losses)

    @property
    def total(self) -> int:
        """How many comparisons were made."""
        return self.wins + self.ties + self.losses

    @property
    def percentages(self) -> tuple[int, int, int]:
        """Wins, ties and losses in whole percent, a half to the even one; zeros when none."""
        shares = (self.wins, self.ties, self.losses)
        return tuple(round(100 * count / self.total) if self.total else 0 for count in shares)


def add_labels(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs with ``label``, ``boost_stop`` and ``top_m`` beside them, as they were asked for.

    ``label`` is the name of the base stop (``3.13``); of a method without one its budget in bits
    per parameter with two decimals, or None where that was given in bytes. ``runs`` has the
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
    """Every run of a method against the other method's run at the same budget.

    Perplexities are rounded to two decimals; lower wins, equal ties. The same budget is the
    *label* of the base, as [A] has it, although a boost then spends up to 7 % more bits than
    that: show the bits beside it. Runs are compared within one model, corpus and protocol, and
    at the same ``boost_stop`` and ``top_m`` where the other method has them; where the other has
    several such runs, with each.

    Parameters
    ----------
    runs
        Rows of :meth:`lsq_core.store.store.Store.results`; leave in only those of the model that is
        meant.

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


#: Neighbours further apart than this share of their size say nothing about what lies between.
MAX_INTERPOLATION_GAP = 0.10
#: Sizes that differ by less than this share are the same size.
SAME_SIZE = 0.001
#: Fewer comparisons than this say nothing about which method is better.
MIN_COMPARISONS = 5


def win_tie_loss_at_equal_bytes(runs: pd.DataFrame, method: str, other: str) -> WinTieLoss:
    """Every run of a method against what the other method reaches at the same size.

    That is :func:`interpolate_perplexity` of the other's runs of the same model, corpus and
    protocol, at this run's nominal bits per parameter, to which the same model's bytes are in
    proportion. A run to which the other method has no run of its size, nor neighbours near enough,
    is left out. Perplexities are rounded to two decimals as in :func:`win_tie_loss`.

    Where a run's plan was not published its bits are the label it was reported under, which
    differs from the plan's size by up to 0.2 % and counts as it is.

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
    """The perplexity that a method's runs reach at a size; NaN where they don't tell.

    The best run within :data:`SAME_SIZE` of the size counts as it is. Else the logarithm of
    perplexity is interpolated over the size between the neighbours on the method's front (runs
    that no smaller or equal one beats), which have to lie within :data:`MAX_INTERPOLATION_GAP` of
    each other. Nothing is extrapolated.

    Perplexity falls ever more slowly with size, so that what is interpolated lies a little above
    what a run there would reach.

    Parameters
    ----------
    runs
        Sizes in bits per parameter, or any unit, and perplexities, (k, 2).
    size
        In the same unit.

    >>> round(perplexity_at(np.array([[4.0, 8.0], [4.2, 2.0]]), 4.1), 6)
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


#: The comparisons of [A] Fig. 6: a method against another.
FIGURE_6 = (
    ("sensiboost", "uniform"),
    ("sensiboost", "mxq"),
    ("sensiboost", "sensiboost-ablation"),
    ("kurtboost", "uniform"),
    ("kurtboost", "mxq"),
    ("kurtboost", "kurtboost-ablation"),
    ("sensiboost", "kurtboost"),
)
#: What Algorithm 1's detection is worth: against as many layers from the top of the ranking.
DETECTION_WORTH = (("sensiboost", "sensiboost-rank"), ("kurtboost", "kurtboost-rank"))


def figure_6(runs: pd.DataFrame) -> pd.DataFrame:
    """The comparisons of :data:`FIGURE_6` of which there are both methods' runs.

    Those of :data:`DETECTION_WORTH`, which the paper does not have, follow.

    Gives a row each: ``method, against, equal`` (bytes, or the label in their place), ``wins``,
    ``ties``, ``losses``, ``total``, and whether they are ``enough`` (:data:`MIN_COMPARISONS`) to be
    drawn and given as shares.
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
    """The uniform HQQ runs by their base stop, from few bits to many; of several the newest.

    ``runs`` are of one model, corpus and protocol.
    """
    uniform = runs[(runs["method"] == "uniform") & (runs["quantizer"] == "hqq")]
    uniform = uniform.dropna(subset=["perplexity", "bits_per_param"]).sort_values("created")
    by_stop = {str(row["base"]): row for _, row in uniform.iterrows()}
    names = [stop.stop_name for stop in EXTENDED_LADDER]
    return {name: by_stop[name] for name in names if name in by_stop}


def relative_to_base(runs: pd.DataFrame, base: Mapping[str, Any]) -> pd.DataFrame:
    """Runs with ``extra``, the share of bits above a run's, and ``drop``, that of perplexity below.

    Both are relative to ``base``, a row of ``runs``: ``extra`` 0.018 and ``drop`` 0.094 is a
    perplexity 9.4 % lower for 1.8 % more bits ([A] Fig. 9).
    """
    return runs.assign(
        extra=runs["bits_per_param"].astype(float) / base["bits_per_param"] - 1,
        drop=1 - runs["perplexity"].astype(float) / base["perplexity"],
    )


def pareto(size: pd.Series, perplexity: pd.Series) -> pd.Series:
    """Which runs no other beats: none of at most their size has a lower perplexity.

    Of runs equal in both every one is marked; a run without a size or a perplexity never is.

    >>> pareto(pd.Series([1, 2, 3, 3]), pd.Series([9.0, 9.5, 7.0, 8.0])).tolist()
    [True, False, True, False]
    """
    frame = pd.DataFrame({"size": size, "perplexity": perplexity}).astype(float).dropna()
    best = frame.groupby("size")["perplexity"].min()  # in the order of sizes
    before = best.cummin().shift(fill_value=np.inf)
    front = best[best < before]
    available = (frame["size"].map(front) == frame["perplexity"]).reindex(size.index)
    return available.fillna(False).astype(bool)


# --- two runs -------------------------------------------------------------------------------


def byte_shares(modules: pd.DataFrame, parameters: Mapping[str, int]) -> pd.Series:
    """The share of a plan's nominal bytes that each configuration takes, by its name ([A] Fig. 8).

    ``modules`` is of :func:`plan_to_frame`; ``parameters`` says how many weights a module has.
    """
    known = [config.name for config in EXTENDED_LADDER]
    names = [name for name in modules["config"].unique() if name in known or is_mixed(name)]
    bits = {name: parse_config(name).nominal_bits for name in names}
    sizes = modules["module"].map(parameters) * modules["config"].map(bits)
    shares = sizes.groupby(modules["config"]).sum() / sizes.sum()
    return shares.reindex(sorted(shares.index, key=lambda name: bits[name]))


def plan_difference(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """The modules that two plans of one model treat differently, in the order of the first.

    Both are of :func:`plan_to_frame`; gives ``module, layer, type, config, config_other``.
    """
    both = a.merge(b[["module", "config"]], on="module", suffixes=("", "_other"))
    different = both[both["config"] != both["config_other"]]
    return different[["module", "layer", "type", "config", "config_other"]].reset_index(drop=True)


def run_settings(record: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What a run was asked to do and was made with, by name, in words.

    ``record`` is of :meth:`lsq_core.store.store.Store.record`. What isn't known is left out.
    """
    run, plan, own = record["run"], record["plan"], record["evaluation"]
    content = plan.get("content") or {}
    request_fields = content.get("request") or {}
    # A text that rows were scored on or a quantizer reads tells more of the run than a profile's.
    profile = (record["profile"].get("settings") or {}) | (content.get("calibration") or {})
    method = run["method"]
    rows = mixes_rows(method)
    boosts = reads_field(method, "boost_stop")
    known = {
        "method": run["method"],
        "base": content.get("base"),
        "budget": request_fields.get("budget"),
        "boost stops": request_fields.get("boost_stop") if boosts else None,
        "outliers kept": (request_fields.get("top_m") or "all") if boosts else None,
        "metric": request_fields.get("metric") if reads_field(method, "metric") else None,
        "seed": request_fields.get("seed") if reads_field(method, "seed") else None,
        "bits of rows": f"{request_fields['low_bits']} and {request_fields['high_bits']}"
        if rows
        else None,
        "group size": request_fields.get("group_size") if rows else None,
        "ratios": request_fields.get("ratios") if rows else None,
        "loss of ratios": request_fields.get("loss") if rows else None,
        "negative curvature": "taken out" if rows and request_fields.get("clip") else None,
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
    """The settings in which two runs differ: ``setting, run, against``; ``–`` for none."""
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    rows = [(name, a.get(name, "–"), b.get(name, "–")) for name in names]
    return pd.DataFrame(rows, columns=["setting", "run", "against"])
