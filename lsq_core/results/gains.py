"""The gain of a run over the uniform run of nearest size. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from lsq_core.evaluation.noise import format_noise, is_below_noise
from lsq_core.evaluation.result import UNUSABLE_RATIO
from lsq_core.planning.methods import PLANNERS

#: Sizes that differ by at most this share count as equal, so that a gain in perplexity is not due
#: to size.
EQUAL_SIZE = 0.03


@dataclass(frozen=True)
class Gain:
    """The gain of a run over a uniform one, both identified by their evaluations.

    ``drop`` is the relative decrease in perplexity and ``extra`` the relative increase in size;
    ``candidates`` is the number of runs among which this one has the largest gain. ``noise`` is the
    share by which arithmetic alone changes a perplexity, None if not measured.
    """

    evaluation: str
    uniform: str
    drop: float
    extra: float
    candidates: int
    noise: float | None = None

    @property
    def is_noise(self) -> bool:
        """Whether the difference is within the numerical noise."""
        return is_below_noise(self.drop, self.noise)


#: Sizes that differ by less than this share would be displayed as differing by 0.0 %.
_SAME_PERCENT = 0.0005


def describe_gain(gain: Gain, base_bits: float, what: str = "memory") -> str:
    """Return a gain in words: ``3.3 % lower perplexity for 2.7 % more memory than uniform 3.13``.

    ``base_bits`` are the uniform run's bits per parameter; ``what`` is ``memory`` or ``bits``.
    """
    change = f"{100 * abs(gain.drop):.1f} % {'lower' if gain.drop >= 0 else 'higher'} perplexity"
    if gain.is_noise:
        change = f"no change of perplexity beyond numerical noise ({format_noise(gain.noise)})"
    if abs(gain.extra) < _SAME_PERCENT:
        return f"{change} at the same size as uniform {base_bits:.2f}"
    more = "more" if gain.extra > 0 else "less" if what == "memory" else "fewer"
    return f"{change} for {100 * abs(gain.extra):.1f} % {more} {what} than uniform {base_bits:.2f}"


def gain_of_run(runs: pd.DataFrame, evaluation: str, size: str) -> Gain | None:
    """Return a run's gain over the uniform run of nearest size.

    None for a uniform run, an ablation or an unusable run (:func:`usable`), or if there is no
    uniform run. Arguments are as in :func:`against_nearest_uniform`.
    """
    pairs = against_nearest_uniform(usable(runs), size)
    own = pairs[pairs["evaluation"] == evaluation]
    if own.empty:
        return None
    row = own.iloc[0]
    drop, extra = float(row["drop"]), float(row["extra"])
    return Gain(evaluation, row["uniform"], drop, extra, 1, _noise(runs, evaluation))


def usable(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs whose perplexity is at most :data:`UNUSABLE_RATIO` times full precision's.

    Runs without a full-precision figure are included. The perplexity of a broken model can easily
    be halved without making the model any more usable.
    """
    return runs[~(runs["increase"].astype(float) > UNUSABLE_RATIO - 1)]


def is_ablation(method: str) -> bool:
    """Return whether a method is the control of another, with as many layers drawn at random."""
    return method.endswith("-ablation")


def against_nearest_uniform(runs: pd.DataFrame, size: str) -> pd.DataFrame:
    """Pair each planned run with the uniform run of nearest size.

    Returns the columns ``evaluation, uniform, drop, extra``. Planned runs are those of methods
    implemented here, except uniform and ablations. The uniform run uses the same quantizer; of
    several of the same size, the one with the lowest perplexity is used.

    Parameters
    ----------
    runs
        Rows of :meth:`lsq_core.store.store.Store.results` of one model, corpus and protocol.
    size
        The name of the size column.
    """
    known = runs.dropna(subset=["perplexity", size])
    uniform = known[known["method"] == "uniform"].sort_values("perplexity", kind="stable")
    planned = known[known["method"].map(_is_planned)]
    parts = [
        _pair_with_nearest(part, uniform[uniform["quantizer"] == quantizer], size)
        for quantizer, part in planned.groupby("quantizer", sort=False)
    ]
    parts = parts or [_pair_with_nearest(planned, uniform, size)]
    return pd.concat(parts, ignore_index=True)


def _pair_with_nearest(planned: pd.DataFrame, uniform: pd.DataFrame, size: str) -> pd.DataFrame:
    """Pair runs with the nearest uniform ones, the first of those of equal size, if there are any.

    Distance is in the logarithm of size; of two equally near sizes, the smaller one is used.
    """
    if uniform.empty:
        planned = planned.iloc[:0]
        at = np.zeros(0, dtype=int)
    else:
        own, bases = (np.log(frame[size].to_numpy(float)) for frame in (planned, uniform))
        sizes, first = np.unique(bases, return_index=True)
        above = np.searchsorted(sizes, own).clip(1, max(len(sizes) - 1, 1))
        below = above - 1
        above = np.minimum(above, len(sizes) - 1)
        nearer = np.abs(sizes[above] - own) < np.abs(sizes[below] - own)
        at = first[np.where(nearer, above, below)]
    base = uniform.iloc[at]
    return pd.DataFrame(
        {
            "evaluation": planned["evaluation"].to_numpy(),
            "uniform": base["evaluation"].to_numpy(),
            "drop": 1 - planned["perplexity"].to_numpy(float) / base["perplexity"].to_numpy(float),
            "extra": planned[size].to_numpy(float) / base[size].to_numpy(float) - 1,
        }
    )


def _is_planned(method: str) -> bool:
    return method in PLANNERS and method != "uniform" and not is_ablation(method)


def gain_at_equal_size(runs: pd.DataFrame, size: str) -> Gain | None:
    """Return the largest gain over a uniform run of equal size (:data:`EQUAL_SIZE`).

    None if no run has a uniform one of its size. Unusable runs (:func:`usable`) are left out. Of
    equal gains, the one with the least additional size is returned. Arguments are as in
    :func:`against_nearest_uniform`.
    """
    pairs = against_nearest_uniform(usable(runs), size)
    equal = pairs[pairs["extra"].abs() <= EQUAL_SIZE]
    if equal.empty:
        return None
    best = equal.sort_values(["drop", "extra"], ascending=[False, True], kind="stable").iloc[0]
    return Gain(
        best["evaluation"],
        best["uniform"],
        float(best["drop"]),
        float(best["extra"]),
        len(equal),
        _noise(runs, best["evaluation"]),
    )


def _noise(runs: pd.DataFrame, evaluation: str) -> float | None:
    """Return the noise floor of a run's perplexity, None if it was not measured."""
    if "noise" not in runs:
        return None
    (noise,) = runs.loc[runs["evaluation"] == evaluation, "noise"]
    return None if pd.isna(noise) else float(noise)


def first_pair(runs: pd.DataFrame, size: str) -> tuple[str, str] | None:
    """Return the evaluations of the run to compare by default and its nearest uniform run.

    This is the pair of :func:`gain_at_equal_size`, or if no sizes are equal, the pair of nearest
    sizes; None if there is no uniform run or no other usable run.
    """
    gain = gain_at_equal_size(runs, size)
    if gain is not None:
        return gain.evaluation, gain.uniform
    pairs = against_nearest_uniform(usable(runs), size)
    if pairs.empty:
        return None
    nearest = pairs.loc[pairs["extra"].abs().idxmin()]
    return nearest["evaluation"], nearest["uniform"]
