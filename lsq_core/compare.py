"""Runs against runs: how often a method beats another (method §6, [A] Fig. 6). Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd

#: Methods whose runs differ by ``boost_stop`` and ``top_m``; every other has one run a budget.
_BOOSTS = ("sensiboost", "kurtboost", "sensiboost-ablation", "kurtboost-ablation")
#: What two runs must share to be compared: a perplexity means nothing without these.
_SAME = ("fingerprint", "corpus", "corpus_sha256", "protocol", "tokens")


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


def with_labels(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs with ``label``, ``boost_stop`` and ``top_m`` beside them, as they were asked for.

    ``label`` is the name of the base stop (``3.13``); of a method without one its budget in bits
    per parameter with two decimals, or None where that was given in bytes. ``runs`` has the
    columns ``base`` and ``request`` of :meth:`lsq_core.store.Store.results`.
    """
    asked = [json.loads(text) if isinstance(text, str) else {} for text in runs["request"]]
    bases = runs["base"].astype(object).where(runs["base"].notna(), None)
    labels = [base or _label(request) for base, request in zip(bases, asked, strict=True)]
    return runs.assign(
        label=labels,
        boost_stop=[request.get("boost_stop") for request in asked],
        top_m=[request.get("top_m") for request in asked],
    )


def _label(request: dict) -> str | None:
    budget = request.get("budget") or ""
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
        Rows of :meth:`lsq_core.store.Store.results`; leave in only those of the model that is
        meant.

    Example
    -------
    >>> runs = store.results("published:Llama-2-7b-hf", origin="published")  # doctest: +SKIP
    >>> win_tie_loss(runs, "sensiboost", "uniform").percentages  # doctest: +SKIP
    (98, 1, 1)
    """
    labelled = with_labels(runs)
    labelled = labelled[labelled["perplexity"].notna() & labelled["label"].notna()]
    key = [*_SAME, "label"] + (["boost_stop", "top_m"] if other in _BOOSTS else [])
    columns = [*key, "perplexity"]
    mine = labelled.loc[labelled["method"] == method, columns]
    theirs = labelled.loc[labelled["method"] == other, columns]
    pairs = mine.merge(theirs, on=key, suffixes=("", "_other"))
    return _count(pairs["perplexity"], pairs["perplexity_other"])


def win_tie_loss_at_equal_bytes(runs: pd.DataFrame, method: str, other: str) -> WinTieLoss:
    """Every run of a method against the best that the other method has for no more bits.

    The other's best run is that of lowest perplexity among all its runs (of any boost, of the
    same model, corpus and protocol) whose nominal bits per parameter are at most this run's; the
    same model's bytes are in proportion to them. A run below the other's smallest is left out. So
    a loss is a run that the other method beats with no more bytes, and a win one that it cannot
    match with as many. Perplexities are rounded to two decimals as in :func:`win_tie_loss`.

    Where a run's plan was not published its bits are the label it was reported under, which is
    what it spent at most.

    Parameters
    ----------
    runs
        As in :func:`win_tie_loss`.
    """
    total = WinTieLoss(0, 0, 0)
    known = runs[runs["perplexity"].notna() & runs["bits_per_param"].notna()]
    for _, group in known.groupby(list(_SAME), dropna=False):
        theirs = group[group["method"] == other].sort_values("bits_per_param")
        spent = theirs["bits_per_param"].to_numpy(float)
        # the lowest that no more bits than these reached, at each of the other's sizes
        best = theirs["perplexity"].cummin().to_numpy(float)
        mine = group.loc[group["method"] == method, ["bits_per_param", "perplexity"]]
        at = spent.searchsorted(mine["bits_per_param"].to_numpy(float) * _EQUAL, side="right") - 1
        own = mine["perplexity"].to_numpy(float)[at >= 0]
        total += _count(own, best[at[at >= 0]])
    return total


#: Bits computed from the same plan in another order of summing are the same bits.
_EQUAL = 1 + 1e-9


def _count(own: pd.Series | np.ndarray, others: pd.Series | np.ndarray) -> WinTieLoss:
    own, others = np.round(own, 2), np.round(others, 2)
    return WinTieLoss(
        int((own < others).sum()), int((own == others).sum()), int((own > others).sum())
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
    there = (frame["size"].map(front) == frame["perplexity"]).reindex(size.index)
    return there.fillna(False).astype(bool)


def largest_gain(runs: pd.DataFrame) -> tuple[str, str] | None:
    """The boosted run that is furthest below uniform HQQ at its own base, and that uniform run.

    Both are given by ``evaluation``; None when no boosted run has a uniform one beside it. Of
    several with the same plan the one that took every outlier is given. ``runs`` are of one
    model, corpus and protocol.
    """
    labelled = with_labels(runs).dropna(subset=["perplexity", "label"])
    uniform = labelled[(labelled["method"] == "uniform") & (labelled["quantizer"] == "hqq")]
    boosted = labelled[labelled["method"].isin(["sensiboost", "kurtboost"])]
    columns = ["evaluation", "label", "perplexity"]
    pairs = boosted.merge(uniform[columns], on="label", suffixes=("", "_uniform"))
    if pairs.empty:
        return None
    gain = pairs["perplexity"] / pairs["perplexity_uniform"]
    best = pairs.assign(gain=gain).sort_values(["gain", "top_m"]).iloc[0]
    return best["evaluation"], best["evaluation_uniform"]
