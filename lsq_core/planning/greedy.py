"""Greedy search that spends the rest of a knapsack's budget after the hull's moves.

Moves are taken by price, so part of the budget is left after the last one that fits. Two
alternatives are tried: skip moves that don't fit and take later ones (:func:`take_fitting_moves`),
or take the move that doesn't fit and undo earlier ones (:func:`undo_moves`). The rest is then spent
on single changes off the hull (:func:`fill_budget`).

Equal gains are resolved in favour of the first matrix and then the lowest configuration, and every
sum runs from first to last, so the browser, taking the same steps in the same order, finds exactly
the same plan. Tables of nominal bytes and costs are (n, options); a choice is (n,). No argument is
modified.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class MoveSteps:
    """A segment's moves in order: matrix, old option (``left``), new option, and bytes added."""

    matrix: list[int]
    left: list[int]
    reached: list[int]
    size: list[float]

    @cached_property
    def smallest(self) -> float:
        """The fewest bytes that any move adds; with less room, no move is taken or undone."""
        return min(self.size, default=0.0)


def take_fitting_moves(steps: MoveSteps, taken: int, choice: np.ndarray, room: float) -> np.ndarray:
    """Take each later move that fits; once a matrix's move doesn't fit, skip its later ones."""
    choice, missed = choice.copy(), set()
    for k in range(taken, len(steps.matrix)):
        if room < steps.smallest:
            break
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

    Only moves no larger than the deficit are undone. The last move stays, and if a move stays, so
    do the earlier moves of the same matrix. The result may still be over the budget.
    """
    choice, locked = choice.copy(), {steps.matrix[taken - 1]}
    for k in range(taken - 2, -1, -1):
        if room >= 0 or -room < steps.smallest:
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
    """Spend the rest of the budget: repeatedly make the change that fits and saves the most cost.

    Only changes that add bytes are considered.
    """
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
    """Bring a choice within the budget by the cheapest single change; None if there is none."""
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
    """Sum a table's entries at a choice, from first to last."""
    return float(np.add.accumulate(table[np.arange(len(choice)), choice])[-1])


def _changes(
    nominal: np.ndarray, cost: np.ndarray, choice: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes added and the cost saved by each single change, both (n, options)."""
    rows = np.arange(len(choice))
    return (
        nominal - nominal[rows, choice][:, None],
        cost[rows, choice][:, None] - cost,
    )
