"""Highlights of a model's runs: the gain of boosting sensitive layers, the saving by planning."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from lsq_core.results.compare import add_labels
from lsq_core.results.gains import is_ablation, usable


@dataclass(frozen=True, eq=False)
class BoostGain:
    """A boosted run, the uniform HQQ run at its base, and its ablation if it was run.

    Each is a row of :meth:`lsq_core.store.store.Store.results`.
    """

    boosted: pd.Series
    uniform: pd.Series
    ablation: pd.Series | None

    @property
    def drop(self) -> float:
        """The relative decrease in perplexity from uniform."""
        return 1 - self.boosted["perplexity"] / self.uniform["perplexity"]

    @property
    def extra(self) -> float:
        """The relative increase in bits over uniform."""
        return self.boosted["bits_per_param"] / self.uniform["bits_per_param"] - 1

    @property
    def ablation_drop(self) -> float | None:
        """The ablation's relative decrease in perplexity from uniform; None without an ablation."""
        if self.ablation is None:
            return None
        return 1 - self.ablation["perplexity"] / self.uniform["perplexity"]


@dataclass(frozen=True, eq=False)
class Saving:
    """A planned run that is smaller than a uniform HQQ run and has a lower perplexity."""

    planned: pd.Series
    uniform: pd.Series

    @property
    def bytes(self) -> float:
        """The saved share of the uniform run's bits."""
        return 1 - self.planned["bits_per_param"] / self.uniform["bits_per_param"]


def boost_gain(runs: pd.DataFrame) -> BoostGain | None:
    """Return the boosted run with the largest relative gain over uniform HQQ at its base, or None.

    Runs with an ablation are preferred to others. Unusable runs
    (:func:`lsq_core.results.gains.usable`) are left out. Of equal gains, the run that boosts all
    outliers is returned; None if no run's perplexity is below uniform.
    ``runs`` are of one model, corpus and protocol.
    """
    labelled = add_labels(usable(runs)).dropna(subset=["perplexity", "label"])
    uniform = labelled[(labelled["method"] == "uniform") & (labelled["quantizer"] == "hqq")]
    boosted = labelled[labelled["method"].isin(["sensiboost", "kurtboost"])]
    boosted = boosted[boosted["quantizer"] == "hqq"]
    columns = ["evaluation", "label", "perplexity"]
    pairs = boosted.merge(uniform[columns], on="label", suffixes=("", "_uniform"))
    pairs = pairs.assign(ratio=pairs["perplexity"] / pairs["perplexity_uniform"])
    pairs = pairs[pairs["ratio"] < 1]
    if pairs.empty:
        return None
    ablations = {e: _ablation(labelled, e) for e in pairs["evaluation"]}
    pairs = pairs.assign(alone=[ablations[e] is None for e in pairs["evaluation"]])
    best = pairs.sort_values(["alone", "ratio", "top_m"]).iloc[0]
    own, uniform = (_row(runs, best[name]) for name in ("evaluation", "evaluation_uniform"))
    return BoostGain(own, uniform, ablations[best["evaluation"]])


def _row(runs: pd.DataFrame, evaluation: str) -> pd.Series:
    return runs[runs["evaluation"] == evaluation].iloc[0]


def _ablation(labelled: pd.DataFrame, boosted: str) -> pd.Series | None:
    """Return the newest ablation with the same request as the boosted run of an evaluation."""
    own = _row(labelled, boosted)
    same = labelled[
        (labelled["method"] == f"{own['method']}-ablation")
        & (labelled["quantizer"] == own["quantizer"])
        & (labelled["label"] == own["label"])
        & (labelled["boost_stop"] == own["boost_stop"])
        & (labelled["top_m"] == own["top_m"])
    ]
    return None if same.empty else same.sort_values("created").iloc[-1]


def largest_saving(runs: pd.DataFrame, max_increase: float = 1.0) -> Saving | None:
    """Return the planned HQQ run that saves most over a uniform run of higher perplexity, or None.

    Uniform runs whose perplexity is more than ``max_increase`` (a share) above full precision are
    left out, because both models would be unusable. ``runs`` are of one model, corpus and protocol.
    """
    hqq = runs[(runs["quantizer"] == "hqq") & runs["perplexity"].notna()]
    uniform = hqq[(hqq["method"] == "uniform") & (hqq["increase"] <= max_increase)]
    planned = hqq[(hqq["method"] != "uniform") & ~hqq["method"].map(is_ablation)]
    pairs = planned.merge(uniform, how="cross", suffixes=("", "_uniform"))
    pairs = pairs[pairs["perplexity"] < pairs["perplexity_uniform"]]
    if pairs.empty:
        return None
    ratio = pairs["bits_per_param"] / pairs["bits_per_param_uniform"]
    best = pairs.loc[ratio.idxmin()]
    saving = Saving(*(_row(runs, best[name]) for name in ("evaluation", "evaluation_uniform")))
    return saving if saving.bytes > 0 else None
