"""A run's perplexity against another's, with its interval. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lsq_core.errors import InputError
from lsq_core.evaluation.bootstrap import PerplexityDifference, bootstrap_difference

if TYPE_CHECKING:
    from lsq_core.store.store import Store


@dataclass(frozen=True)
class RunDifference:
    """A run's perplexity against another's, and over how many common windows."""

    difference: PerplexityDifference
    windows: int


def run_difference(store: Store, a: str, b: str) -> RunDifference:
    """Return the relative difference of two evaluations with its paired bootstrap interval.

    Raises
    ------
    InputError
        If windows of one were not kept, or they are of different texts.
    """
    nll, counts = store.windows(a)
    other, other_counts = store.windows(b)
    if counts.shape != other_counts.shape or (counts != other_counts).any():
        raise InputError("The two runs scored different windows, so they cannot be compared.")
    return RunDifference(bootstrap_difference(nll, other, counts), len(nll))
