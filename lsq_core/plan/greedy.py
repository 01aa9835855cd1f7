"""Spending a knapsack's budget well where the hull's moves end: fill, repair, swap.

Every step takes the best single change, ties going to the first matrix and then the lowest stop,
so that the browser, taking the same steps in the same order, finds the same plan. Arrays are
(n, 12) nominal bytes and costs; a choice is (n,) stops, and none given is changed.
"""

from __future__ import annotations

import numpy as np

#: Swaps tried at most; each is the best there is, and few plans need more than two.
MAX_SWAPS = 8


def fill(choice: np.ndarray, nominal: np.ndarray, cost: np.ndarray, limit: float) -> np.ndarray:
    """Spend what is left: again and again the change that saves most cost and fits."""
    choice = choice.copy()
    left = limit - _total(nominal, choice)
    more, saved = _changes(nominal, cost, choice)
    while True:
        worth = np.where((more > 0) & (more <= left), saved, 0.0)
        row, stop = divmod(int(worth.argmax()), worth.shape[1])
        if worth[row, stop] <= 0:
            return choice
        left -= more[row, stop]
        choice[row] = stop
        more[row] = nominal[row] - nominal[row, stop]
        saved[row] = cost[row, stop] - cost[row]


def repair(
    choice: np.ndarray, nominal: np.ndarray, cost: np.ndarray, limit: float
) -> np.ndarray | None:
    """Bring a choice that exceeds the budget back with the cheapest single change, then fill.

    None when no single change is enough.
    """
    over = _total(nominal, choice) - limit
    more, saved = _changes(nominal, cost, choice)
    lost = np.where(-more >= over, -saved, np.inf)
    row, stop = divmod(int(lost.argmin()), lost.shape[1])
    if not np.isfinite(lost[row, stop]):
        return None
    repaired = choice.copy()
    repaired[row] = stop
    return fill(repaired, nominal, cost, limit)


def swap(choice: np.ndarray, nominal: np.ndarray, cost: np.ndarray, limit: float) -> np.ndarray:
    """Pay for one matrix's better stop with another's worse one while that lowers the cost."""
    for _ in range(MAX_SWAPS):
        better = _best_swap(choice, nominal, cost, limit - _total(nominal, choice))
        if better is None:
            return choice
        choice = fill(better, nominal, cost, limit)
    return choice


def _best_swap(
    choice: np.ndarray, nominal: np.ndarray, cost: np.ndarray, left: float
) -> np.ndarray | None:
    """The choice after the swap that lowers the cost most, or None when none does.

    Changes that free bytes are put in order of what they free; for each change that needs bytes
    the cheapest of those that free enough is then a look-up.
    """
    more, saved = (a.ravel() for a in _changes(nominal, cost, choice))
    frees = np.flatnonzero((more < 0) & np.isfinite(saved))
    frees = frees[np.argsort(-more[frees], kind="stable")]
    wants = np.flatnonzero((more > left) & (saved > 0))
    if len(frees) == 0 or len(wants) == 0:
        return None
    lost = -saved[frees]
    cheapest = np.minimum.accumulate(lost[::-1])[::-1]
    first = np.searchsorted(-more[frees], more[wants] - left)
    enough = first < len(frees)
    net = np.where(enough, saved[wants] - cheapest[np.minimum(first, len(frees) - 1)], -np.inf)
    best = int(net.argmax())
    width = nominal.shape[1]
    row, stop = divmod(int(wants[best]), width)
    if not net[best] > 1e-12 * saved[wants[best]]:
        return None
    payer = frees[first[best] + int(lost[first[best] :].argmin())]
    other, lower = divmod(int(payer), width)
    if other == row:
        return None
    swapped = choice.copy()
    swapped[row], swapped[other] = stop, lower
    return swapped


def _total(nominal: np.ndarray, choice: np.ndarray) -> float:
    return float(nominal[np.arange(len(choice)), choice].sum())


def _changes(
    nominal: np.ndarray, cost: np.ndarray, choice: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For every matrix and stop the bytes more and the cost saved against the choice."""
    rows = np.arange(len(choice))
    return (
        nominal - nominal[rows, choice][:, None],
        cost[rows, choice][:, None] - cost,
    )
