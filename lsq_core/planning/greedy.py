"""Spending a knapsack's budget well where the hull's moves end.

Moves are taken by price, so the last one that fits leaves a rest of the budget. Two ways out are
tried: skip what doesn't fit and take later moves (:func:`take_fitting_moves`), or take the move
that doesn't fit and give earlier ones back (:func:`undo_moves`). What is left then goes to single
changes off the hull (:func:`fill_budget`).

Every step is the first or the best there is, ties going to the first matrix and then the lowest
stop, and every sum runs from first to last, so that the browser, taking the same steps in the same
order, finds the same plan to the last bit. Tables are (n, 12) nominal bytes and costs; a choice is
(n,) stops, and none given is changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MoveSteps:
    """The moves of a segment in order: the matrix, the stops left and reached, the bytes added."""

    matrix: list[int]
    left: list[int]
    reached: list[int]
    size: list[float]


def take_fitting_moves(steps: MoveSteps, taken: int, choice: np.ndarray, room: float) -> np.ndarray:
    """Go on after the moves taken: each that fits, none of a matrix that missed one."""
    choice, missed = choice.copy(), set()
    for k in range(taken, len(steps.matrix)):
        matrix, size = steps.matrix[k], steps.size[k]
        if matrix in missed:
            continue
        if size <= room:
            choice[matrix] = steps.reached[k]
            room -= size
        else:
            missed.add(matrix)
    return choice


def undo_moves(steps: MoveSteps, taken: int, choice: np.ndarray, room: float) -> np.ndarray:
    """Undo moves before the last one taken, latest first, while the room is negative.

    Only moves that are no larger than what is missing are undone, and of a matrix none before one
    that was kept; the last move stays. The choice may still be over the budget in the end.
    """
    choice, locked = choice.copy(), {steps.matrix[taken - 1]}
    for k in range(taken - 2, -1, -1):
        if room >= 0:
            break
        matrix, size = steps.matrix[k], steps.size[k]
        if matrix in locked:
            continue
        if size <= -room:
            choice[matrix] = steps.left[k]
            room += size
        else:
            locked.add(matrix)
    return choice


def fill_budget(
    choice: np.ndarray, nominal: np.ndarray, cost: np.ndarray, limit: float
) -> np.ndarray:
    """Spend what is left: again and again the change that saves most cost and fits."""
    choice = choice.copy()
    left = limit - total(nominal, choice)
    more, saved = _changes(nominal, cost, choice)
    while True:
        gain = np.where((more > 0) & (more <= left), saved, 0.0)
        row, stop = divmod(int(gain.argmax()), gain.shape[1])
        if gain[row, stop] <= 0:
            return choice
        left -= more[row, stop]
        choice[row] = stop
        more[row] = nominal[row] - nominal[row, stop]
        saved[row] = cost[row, stop] - cost[row]


def repair_budget(
    choice: np.ndarray, nominal: np.ndarray, cost: np.ndarray, limit: float
) -> np.ndarray | None:
    """A choice over the budget after the cheapest single change that brings it within, or None."""
    over = total(nominal, choice) - limit
    if over <= 0:
        return choice
    more, saved = _changes(nominal, cost, choice)
    lost = np.where(-more >= over, -saved, np.inf)
    row, stop = divmod(int(lost.argmin()), lost.shape[1])
    if not np.isfinite(lost[row, stop]):
        return None
    repaired = choice.copy()
    repaired[row] = stop
    return repaired


def total(table: np.ndarray, choice: np.ndarray) -> float:
    """The sum of a table's entries at a choice, added from first to last."""
    return float(np.add.accumulate(table[np.arange(len(choice)), choice])[-1])


def _changes(
    nominal: np.ndarray, cost: np.ndarray, choice: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For every matrix and stop the bytes more and the cost saved against the choice."""
    rows = np.arange(len(choice))
    return (
        nominal - nominal[rows, choice][:, None],
        cost[rows, choice][:, None] - cost,
    )
