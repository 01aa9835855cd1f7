"""Every budget's plan at once: starting points, and the moves from each in order.

A budget is answered by a look-up: the dearest start that fits, then its moves as far as they fit.
Uniform is twelve starts without moves; a boost with a fixed base is one start with its moves; a
boost with an automatic base is twelve of those.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from lsq_core.plan.problem import TOLERANCE


@dataclass(frozen=True)
class Move:
    """One change of a matrix: to which stop, the nominal bytes of the plan after it, its worth."""

    matrix: int
    stop: int
    bytes_after: float
    worth: float


@dataclass(frozen=True, eq=False)
class Segment:
    """A complete plan (n,) of stops and the moves from it, in the order they are taken."""

    start: np.ndarray
    start_bytes: float
    moves: tuple[Move, ...] = ()

    def at(self, budget: float) -> tuple[np.ndarray, tuple[Move, ...]]:
        """The choice within a budget, and the moves that were taken."""
        limit = budget * (1 + TOLERANCE)
        taken = self.moves[: bisect_right([m.bytes_after for m in self.moves], limit)]
        choice = self.start.copy()
        for move in taken:
            choice[move.matrix] = move.stop
        return choice, taken


@dataclass(frozen=True, eq=False)
class Frontier:
    """Segments in the order of their starts' bytes."""

    segments: tuple[Segment, ...]

    @property
    def smallest(self) -> float:
        """Nominal bytes of the smallest plan."""
        return self.segments[0].start_bytes

    def segment_for(self, budget: float) -> Segment:
        """The dearest segment whose start is within a budget in nominal bytes.

        Raises
        ------
        ValueError
            When the budget is below the smallest plan.
        """
        starts = [s.start_bytes for s in self.segments]
        index = bisect_right(starts, budget * (1 + TOLERANCE)) - 1
        if index < 0:
            raise ValueError("the budget is below the smallest plan")
        return self.segments[index]

    def at(self, budget: float) -> np.ndarray:
        """The choice of stops (n,) within a budget in nominal bytes."""
        return self.segment_for(budget).at(budget)[0]


def moves_from(
    start: np.ndarray, raised: list[tuple[int, int, float]], nominal: np.ndarray
) -> tuple[Move, ...]:
    """Moves ``(matrix, stop, worth)`` in order, with the bytes of the plan after each.

    ``nominal`` is (n, 12). Moves that change nothing are left out.
    """
    total = float(nominal[np.arange(len(start)), start].sum())
    moves = []
    for matrix, stop, worth in raised:
        if stop == start[matrix]:
            continue
        total += float(nominal[matrix, stop] - nominal[matrix, start[matrix]])
        moves.append(Move(matrix, stop, total, worth))
    return tuple(moves)
