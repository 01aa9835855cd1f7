"""What a model's runs show: the gain of boosting sensitive layers, and what planning saves."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from lsq_core.results.compare import add_labels
from lsq_core.results.gains import is_ablation, usable


@dataclass(frozen=True, eq=False)
class BoostGain:
    """A boosted run beside uniform HQQ at its base, and the ablation of equal size if it was run.

    Each is a row of :meth:`lsq_core.store.store.Store.results`. ``drop`` is the share of perplexity
    below uniform, ``extra`` the share of bits above it; ``ablation_drop`` is that of the ablation,
    None without one.
    """

    boosted: pd.Series
    uniform: pd.Series
    ablation: pd.Series | None

    @property
    def drop(self) -> float:
        """Perplexity below uniform, as a share."""
        return 1 - self.boosted["perplexity"] / self.uniform["perplexity"]

    @property
    def extra(self) -> float:
        """Bits above uniform, as a share."""
        return self.boosted["bits_per_param"] / self.uniform["bits_per_param"] - 1

    @property
    def ablation_drop(self) -> float | None:
        """Perplexity of the ablation below uniform, as a share."""
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
        """The share of the uniform run's bits that is saved."""
        return 1 - self.planned["bits_per_param"] / self.uniform["bits_per_param"]


def boost_gain(runs: pd.DataFrame) -> BoostGain | None:
    """The boosted run furthest below uniform HQQ at its own base, None where none is below.

    Runs whose ablation was run too come before others, and runs that are of no use
    (:func:`lsq_core.results.gains.usable`) are left out. Of several with the same plan the one that
    took every outlier is given.
    ``runs`` are of one model, corpus and protocol.
    """
    labelled = add_labels(usable(runs)).dropna(subset=["perplexity", "label"])
    uniform = labelled[(labelled["method"] == "uniform") & (labelled["quantizer"] == "hqq")]
    boosted = labelled[labelled["method"].isin(["sensiboost", "kurtboost"])]
    columns = ["evaluation", "label", "perplexity"]
    pairs = boosted.merge(uniform[columns], on="label", suffixes=("", "_uniform"))
    if pairs.empty:
        return None
    ablations = {e: _ablation(labelled, e) for e in pairs["evaluation"]}
    pairs = pairs.assign(
        ratio=pairs["perplexity"] / pairs["perplexity_uniform"],
        alone=[ablations[e] is None for e in pairs["evaluation"]],
    )
    best = pairs.sort_values(["alone", "ratio", "top_m"]).iloc[0]
    own, uniform = (_row(runs, best[name]) for name in ("evaluation", "evaluation_uniform"))
    gain = BoostGain(own, uniform, ablations[best["evaluation"]])
    return gain if gain.drop > 0 else None


def _row(runs: pd.DataFrame, evaluation: str) -> pd.Series:
    return runs[runs["evaluation"] == evaluation].iloc[0]


def _ablation(labelled: pd.DataFrame, boosted: str) -> pd.Series | None:
    """The newest ablation of a boosted run, an evaluation, that was asked for in the same way."""
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
    """The planned HQQ run that saves most against a uniform one and has a lower perplexity.

    Of a uniform run whose perplexity is more than ``max_increase`` (a share) above full precision
    nothing is said: both models would be of no use. ``runs`` are of one model, corpus and protocol.
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
