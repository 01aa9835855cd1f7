"""A step of a refinement. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class RefinementStep:
    """A plan with a lower measured divergence than the previous step; the start is number 0.

    ``choice`` (n,) holds option indices. ``kl`` is the measured divergence and ``expected`` the one
    that the expansion predicted, in nats per token. ``cost`` (n, options), NaN where unknown, is
    what the plan minimises within its budget: an equal share of the previous plan's divergence for
    each matrix, plus the expected changes and ``margin`` standard errors; for the start, the cost
    of its own method. ``rounds`` is the number of rounds of the search so far, each on the next
    part of the text, and ``failed`` the number since this step, none of which found a better plan.
    """

    number: int
    choice: np.ndarray
    kl: float
    cost: np.ndarray
    margin: float = 0.0
    expected: float | None = None
    rounds: int = 0
    failed: int = 0
