"""Runs against runs: how often a method beats another (method §6, [A] Fig. 6). Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    own, others = pairs["perplexity"].round(2), pairs["perplexity_other"].round(2)
    return WinTieLoss(
        int((own < others).sum()), int((own == others).sum()), int((own > others).sum())
    )
