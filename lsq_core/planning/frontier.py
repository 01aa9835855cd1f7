"""Every budget's plan at once: starting points, and the moves from each in order.

A budget is answered by a look-up: the dearest start that fits, then its moves as far as they fit,
then, for the knapsack methods, a deterministic fill of what is left. Uniform is twelve starts
without moves; a boost with a fixed base is one start with its moves; a boost with an automatic
base is twelve of those; a knapsack is one start with the moves of its convex hull; high-impact
ratios, which are chosen together, are complete plans one after another.

Nominal bytes are multiples of 2⁻⁷, so their float64 sums are exact and the browser, doing the same
steps, finds the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from lsq_core.bits import Budget
from lsq_core.errors import InputError
from lsq_core.planning.greedy import (
    MoveSteps,
    fill_budget,
    repair_budget,
    take_fitting_moves,
    total,
    undo_moves,
)
from lsq_core.planning.problem import TOLERANCE, Problem


@dataclass(frozen=True)
class Move:
    """One change of a matrix: to which stop, the nominal bytes of the plan after it, its worth.

    The worth is what ranks the move: a z-score, the order of a draw, or the cost it saves.
    """

    matrix: int
    stop: int
    bytes_after: float
    priority: float


@dataclass(frozen=True, eq=False)
class Segment:
    """A complete plan (n,) of stops and the moves from it, in the order they are taken."""

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
        """The moves as the greedy search reads them."""
        current, left = self.start.tolist(), []
        for move in self.moves:
            left.append(current[move.matrix])
            current[move.matrix] = move.stop
        matrices, stops, after = self._move_arrays
        size = np.diff(after, prepend=self.start_bytes)
        return MoveSteps(matrices.tolist(), left, stops.tolist(), size.tolist())

    def price(self, taken: int) -> float:
        """Cost saved per byte by the first move not taken; 0 when all are."""
        if taken == len(self.moves):
            return 0.0
        return self.moves[taken].priority / self.steps.size[taken]

    def bytes_after(self, count: int) -> float:
        """Nominal bytes of the plan after so many moves."""
        return self.moves[count - 1].bytes_after if count else self.start_bytes

    def count_within(self, budget: float) -> int:
        """How many moves fit: they are taken in order, up to the first that does not."""
        return int(np.searchsorted(self._move_arrays[2], budget * (1 + TOLERANCE), side="right"))

    def after(self, count: int) -> np.ndarray:
        """The choice of stops (n,) after so many moves."""
        matrices, stops, _ = self._move_arrays
        choice = self.start.copy()
        choice[matrices[:count]] = stops[:count]  # of several moves of a matrix the last counts
        return choice


@dataclass(frozen=True, eq=False)
class FrontierPoint:
    """What a frontier says to a budget.

    ``objective`` and ``lower_bound`` are in the unit of the method's cost, and None where it has
    none; no plan within the budget costs less than ``lower_bound``.
    """

    choice: np.ndarray
    segment: Segment
    taken: int
    objective: float | None = None
    lower_bound: float | None = None


@dataclass(frozen=True, eq=False)
class Frontier:
    """Segments in the order of their starts' bytes, and what the fill needs.

    ``nominal`` and ``cost`` are (n, 12); ``cost`` is None for methods that leave the rest of a
    budget unspent, and infinite for stops that may not be chosen. Where matrices cost something
    together, so that no table holds it, every segment is a complete plan without moves, and
    ``losses`` (segments,) says what each costs; ``lower_bounds`` what no plan of as many bytes
    costs less than.
    """

    segments: tuple[Segment, ...]
    nominal: np.ndarray
    cost: np.ndarray | None = field(default=None)
    losses: np.ndarray | None = None
    lower_bounds: np.ndarray | None = None
    #: Plain words about every plan of it.
    notes: tuple[str, ...] = ()

    @property
    def smallest(self) -> float:
        """Nominal bytes of the smallest plan."""
        return self.segments[0].start_bytes

    def can_reach(self, budget: float) -> bool:
        """Whether some plan is within a budget in nominal bytes."""
        return self.smallest <= budget * (1 + TOLERANCE)

    def check_reachable(self, budget: Budget, problem: Problem) -> None:
        """Raise :class:`InputError` where no plan is within the budget."""
        if not self.can_reach(budget.nominal_bytes):
            raise InputError(
                f"A budget of {budget.text} does not reach the smallest plan from this base, "
                f"{problem.format_size(self.smallest)}."
            )

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.array([s.start_bytes for s in self.segments])

    def at(self, budget: float) -> FrontierPoint:
        """The plan within a budget in nominal bytes; an infinite one takes every move.

        Raises
        ------
        ValueError
            When the budget is below the smallest plan.
        """
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
        """The better of two ways to end: short of the budget, or over it by a move and back."""
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
        """Total cost of a choice (n,)."""
        return total(self.cost, choice)

    def _lower_bound(
        self, segment: Segment, taken: int, choice: np.ndarray, budget: float
    ) -> float:
        """The Lagrangian bound: the next move at its own price for all that is left.

        Moves are ordered by price, so this is the optimum of the relaxed problem, in which a move
        may be taken in part; a rounding error's width is taken off.
        """
        bound = self.objective(choice)
        if taken < len(segment.moves):
            left = max(budget - segment.bytes_after(taken), 0.0)
            bound -= segment.price(taken) * left
        return bound - 1e-12 * abs(bound)


def build_moves(
    start: np.ndarray, requested_moves: list[tuple[int, int, float]], nominal: np.ndarray
) -> tuple[Move, ...]:
    """Moves ``(matrix, stop, worth)`` in order, with the bytes of the plan after each.

    ``nominal`` is (n, 12). Moves that change nothing are left out.
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
