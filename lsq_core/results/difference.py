"""The difference between two runs' perplexities, with its interval. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lsq_core.errors import InputError
from lsq_core.evaluation.bootstrap import PerplexityDifference, bootstrap_difference
from lsq_core.evaluation.noise import is_below_noise

if TYPE_CHECKING:
    from lsq_core.store.store import Store


@dataclass(frozen=True)
class RunDifference:
    """The difference between two runs' perplexities, and the number of their common windows.

    ``noise`` is the share by which arithmetic alone changes a perplexity, None if not measured.
    """

    difference: PerplexityDifference
    windows: int
    noise: float | None = None

    @property
    def is_noise(self) -> bool:
        """Whether the difference is within the numerical noise."""
        return is_below_noise(self.difference.relative, self.noise)

    @property
    def is_tie(self) -> bool:
        """Whether neither run is better: the interval contains zero, or the difference is noise."""
        return self.difference.is_tie or self.is_noise


def run_difference(store: Store, a: str, b: str) -> RunDifference:
    """Return the relative difference of two evaluations with its paired bootstrap interval.

    Raises
    ------
    InputError
        If there is no such evaluation, or windows were not stored or differ between the two.
    """
    nll, counts = store.windows(a)
    other, other_counts = store.windows(b)
    if counts.shape != other_counts.shape or (counts != other_counts).any():
        raise InputError("The two runs scored different windows, so they cannot be compared.")
    floor = store.noise_of_evaluation(a)
    noise = floor.perplexity if floor else None
    return RunDifference(bootstrap_difference(nll, other, counts), len(nll), noise)
