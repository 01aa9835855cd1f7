"""A method's plans for every budget: starting points, and an ordered list of moves from each.

The plan for a budget is looked up: take the largest start that fits, then its moves in order until
one does not fit, and for the knapsack methods fill the rest of the budget deterministically.
Uniform has one start for each base, without moves. A boost has one start with moves for a fixed
base, and one for each usable base otherwise. A knapsack has one start with the moves of its convex
hull. High-impact ratios, which are chosen jointly, are a sequence of complete plans.

Nominal bytes are multiples of 2⁻⁷, so their float64 sums are exact and the browser, taking the same
steps, finds the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from lsq_core.planning.greedy import (
    MoveSteps,
    fill_budget,
    repair_budget,
    take_fitting_moves,
    total,
    undo_moves,
)
from lsq_core.planning.problem import TOLERANCE


@dataclass(frozen=True)
class Move:
    """A change of one matrix to option ``stop``, and the nominal bytes of the plan after it.

    If matrices are tied, ``matrix`` is the index of an item. ``priority`` is the score that ranks
    the move (a z-score, a standard score, or a rank from a random draw) or the cost that it saves.
    """

    matrix: int
    stop: int
    bytes_after: float
    priority: float


@dataclass(frozen=True, eq=False)
class Segment:
    """A complete choice (n,) and the moves from it, in the order they are taken."""

    start: np.ndarray
    start_bytes: float
    moves: tuple[Move, ...] = ()

    @cached_property
    def _move_arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return (
            np.array([m.matrix for m in self.moves], dtype=np.int64),
            np.array([m.stop for m in self.moves], dtype=np.int64),
            np.array([m.bytes_after for m in self.moves]),
        )

    @cached_property
    def steps(self) -> MoveSteps:
        """The moves in the form used by the greedy search."""
        current, left = self.start.tolist(), []
        for move in self.moves:
            left.append(current[move.matrix])
            current[move.matrix] = move.stop
        matrices, stops, after = self._move_arrays
        size = np.diff(after, prepend=self.start_bytes)
        return MoveSteps(matrices.tolist(), left, stops.tolist(), size.tolist())

    def price(self, taken: int) -> float:
        """Return the cost saved per byte by the first move not taken, 0 if all are taken."""
        if taken == len(self.moves):
            return 0.0
        return self.moves[taken].priority / self.steps.size[taken]

    def bytes_after(self, count: int) -> float:
        """Return the nominal bytes of the plan after ``count`` moves."""
        return self.moves[count - 1].bytes_after if count else self.start_bytes

    def count_within(self, budget: float) -> int:
        """Return the number of moves that fit, in order, before the first that does not."""
        return int(np.searchsorted(self._move_arrays[2], budget * (1 + TOLERANCE), side="right"))

    def after(self, count: int) -> np.ndarray:
        """Return the choice (n,) after ``count`` moves."""
        matrices, stops, _ = self._move_arrays
        choice = self.start.copy()
        choice[matrices[:count]] = stops[:count]  # the last of a matrix's moves wins
        return choice


@dataclass(frozen=True, eq=False)
class FrontierPoint:
    """A frontier's plan for a budget.

    ``segment`` is over items; ``choice`` is over matrices or items, depending on the method that
    returned it. ``objective`` and ``lower_bound`` are in the unit of the method's cost, None if it
    has none; no plan within the budget costs less than ``lower_bound``.
    """

    choice: np.ndarray
    segment: Segment
    taken: int
    objective: float | None = None
    lower_bound: float | None = None


@dataclass(frozen=True, eq=False)
class Frontier:
    """Segments sorted by the bytes of their starts, and the tables used to fill a budget.

    Segments and tables have one row for each item, which is a matrix or a group of tied matrices.
    ``nominal`` and ``cost`` are (n, options). ``cost`` is None for methods that leave the rest of a
    budget unspent, and infinite for configurations that may not be chosen. If the cost is not a sum
    over matrices, every segment is a complete plan without moves, ``losses`` (segments,) holds the
    plans' costs, and ``lower_bounds`` (segments,) bounds the cost of any plan of at most that size.
    """

    segments: tuple[Segment, ...]
    nominal: np.ndarray
    cost: np.ndarray | None = field(default=None)
    losses: np.ndarray | None = None
    lower_bounds: np.ndarray | None = None
    #: Notes that apply to every plan of the frontier.
    notes: tuple[str, ...] = ()
    #: The item of each matrix, int64 (n,); None if every matrix is its own item.
    items: np.ndarray | None = None

    def expand(self, choice: np.ndarray) -> np.ndarray:
        """Expand a choice over items, (…, items), to one over matrices, (…, n)."""
        return choice if self.items is None else choice[..., self.items]

    def matrices_of(self, item: int) -> np.ndarray:
        """Return the matrices of an item."""
        return np.array([item]) if self.items is None else np.flatnonzero(self.items == item)

    @property
    def smallest(self) -> float:
        """Nominal bytes of the smallest plan."""
        return self.segments[0].start_bytes

    def can_reach(self, budget: float) -> bool:
        """Return whether any plan is within a budget in nominal bytes."""
        return self.smallest <= budget * (1 + TOLERANCE)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.array([s.start_bytes for s in self.segments])

    def at(self, budget: float) -> FrontierPoint:
        """Return the plan for a budget in nominal bytes, with a choice over matrices, (n,).

        An infinite budget takes every move.

        Raises
        ------
        ValueError
            If the budget is below the smallest plan.
        """
        point = self.at_items(budget)
        return point if self.items is None else replace(point, choice=point.choice[self.items])

    def at_items(self, budget: float) -> FrontierPoint:
        """Return the same plan as :meth:`at`, with a choice over items."""
        limit = budget * (1 + TOLERANCE)
        if not self.can_reach(budget):
            raise ValueError("the budget is below the smallest plan")
        index = int(np.searchsorted(self._starts, limit, side="right")) - 1
        segment = self.segments[index]
        taken = segment.count_within(budget)
        choice = segment.after(taken)
        if self.losses is not None:
            loss, least = float(self.losses[index]), float(self.lower_bounds[index])
            return FrontierPoint(choice, segment, taken, loss, least)
        if self.cost is None:
            return FrontierPoint(choice, segment, taken)
        bound = self._lower_bound(segment, taken, choice, budget)
        if np.isfinite(budget):
            choice = self._spend_budget(segment, taken, limit)
        return FrontierPoint(choice, segment, taken, self.objective(choice), bound)

    def _spend_budget(self, segment: Segment, taken: int, limit: float) -> np.ndarray:
        """Return the better of two fills: from below the budget, or one move over and repaired."""
        steps, tables = segment.steps, (self.nominal, self.cost, limit)
        room = limit - segment.bytes_after(taken)
        best = fill_budget(take_fitting_moves(steps, taken, segment.after(taken), room), *tables)
        if taken == len(segment.moves):
            return best
        room = limit - segment.bytes_after(taken + 1)
        back = undo_moves(steps, taken + 1, segment.after(taken + 1), room)
        back = repair_budget(back, *tables)
        if back is None:
            return best
        back = fill_budget(back, *tables)
        return back if self.objective(back) < self.objective(best) else best

    def objective(self, choice: np.ndarray) -> float:
        """Return the total cost of a choice over items."""
        return total(self.cost, choice)

    def _lower_bound(
        self, segment: Segment, taken: int, choice: np.ndarray, budget: float
    ) -> float:
        """Return the Lagrangian bound: spend the rest of the budget at the next move's price.

        Moves are ordered by price, so this is the optimum of the relaxed problem in which a move
        may be taken partially, less a margin for rounding errors.
        """
        bound = self.objective(choice)
        if taken < len(segment.moves):
            left = max(budget - segment.bytes_after(taken), 0.0)
            bound -= segment.price(taken) * left
        return bound - 1e-12 * abs(bound)


def build_moves(
    start: np.ndarray, requested_moves: list[tuple[int, int, float]], nominal: np.ndarray
) -> tuple[Move, ...]:
    """Build moves from ordered ``(matrix, stop, priority)`` tuples, with the bytes after each.

    ``nominal`` is (n, options). Moves that change nothing are omitted.
    """
    current = start.copy()
    total = float(nominal[np.arange(len(start)), start].sum())
    moves = []
    for matrix, stop, priority in requested_moves:
        if stop == current[matrix]:
            continue
        total += float(nominal[matrix, stop] - nominal[matrix, current[matrix]])
        current[matrix] = stop
        moves.append(Move(int(matrix), int(stop), total, float(priority)))
    return tuple(moves)
