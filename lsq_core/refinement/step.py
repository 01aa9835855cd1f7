"""A step of a refinement. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class RefinementStep:
    """A plan that measured better than the one before it; the start has the number 0.

    ``choice`` (n,) are indices of options, ``kl`` the measured divergence and ``expected`` what the
    expansion expected, in nats per token. ``cost`` (n, options) is what the plan minimises within
    its budget, NaN where nothing is known: the expected changes and ``margin`` standard errors; for
    the start it is its own method's. ``rounds`` counts those of the search so far, each on another
    part of the text, and ``failed`` those since this step, which found nothing better.
    """

    number: int
    choice: np.ndarray
    kl: float
    cost: np.ndarray
    margin: float = 0.0
    expected: float | None = None
    rounds: int = 0
    failed: int = 0
