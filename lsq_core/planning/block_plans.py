"""Options that act together within a block: every plan of a block, and the best of all blocks.

The quadratic problem of [C] is block-diagonal. So a block's plans are enumerated, 5⁷ = 78,125 for
seven matrices of five options, those kept that no other beats in bytes and loss, and a dynamic
program over the blocks puts them together for every budget at once (method §7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from lsq_core.planning.knapsack import lower_hull

#: Units that are enumerated together; of a block with more, groups of at most so many are.
MOST_UNITS = 8
#: Plans kept of a block, and of the blocks put together so far: where there are more, one of each
#: of so many equal ranges of bytes.
_BLOCK_PLANS = 256
_STATES = 1024


@dataclass(frozen=True, eq=False)
class Front:
    """Plans of a block that no other beats, by size: ``choice`` (f, units), ``size``, ``loss``."""

    choice: np.ndarray
    size: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True, eq=False)
class Combined:
    """Plans of all blocks, by size: ``picks`` (s, blocks) are rows of the fronts."""

    picks: np.ndarray
    size: np.ndarray
    loss: np.ndarray
    #: What no plan of at most this size can lose less than, (s,).
    lower_bound: np.ndarray


def predicted_loss(matrix: np.ndarray, choice: np.ndarray, options: int) -> np.ndarray:
    """½·δᵀMδ of plans (k, units), for M (units·options, units·options); (k,)."""
    choice = np.atleast_2d(choice)
    places = choice + np.arange(choice.shape[1]) * options
    return 0.5 * matrix[places[:, :, None], places[:, None, :]].sum(axis=(1, 2))


def clipped(matrix: np.ndarray) -> np.ndarray:
    """The nearest matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, 0)) @ vectors.T


def diagonal_only(matrix: np.ndarray) -> np.ndarray:
    """Without what units do to one another."""
    return np.diag(np.diag(matrix))


def block_front(matrix: np.ndarray, size: np.ndarray, allowed: np.ndarray) -> Front:
    """Enumerate a block's plans and keep those that no smaller one equals or beats.

    ``matrix`` is M (u·r, u·r); ``size`` and ``allowed`` are (u, r), bytes and whether a unit may
    have an option.
    """
    units, options = size.shape
    loss, total = np.zeros((options,) * units), np.zeros((options,) * units)

    def along(values: np.ndarray, *axes: int) -> np.ndarray:
        shape = np.ones(units, dtype=int)
        shape[list(axes)] = options
        return values.reshape(shape)

    tiles = matrix.reshape(units, options, units, options)
    for u in range(units):
        own = np.diag(tiles[u, :, u, :]) / 2
        loss += along(np.where(allowed[u], own, np.inf), u)
        total += along(size[u], u)
    for u, v in combinations(range(units), 2):
        loss += along(tiles[u, :, v, :], u, v)
    loss, total = loss.ravel(), total.ravel()
    usable = np.flatnonzero(np.isfinite(loss))
    kept = usable[_front(total[usable], loss[usable], _BLOCK_PLANS)]
    choice = np.stack(np.unravel_index(kept, (options,) * units), axis=1)
    return Front(choice, total[kept], loss[kept])


def _front(size: np.ndarray, loss: np.ndarray, most: int) -> np.ndarray:
    """Which plans to keep, by size: none beaten by a smaller one, and of near ones the best.

    Of the plans in one range of bytes the one is kept that lies lowest under the line through the
    ends of the front, which is nearest to what a Lagrangian would pick.
    """
    order = np.lexsort((loss, size))
    best = np.minimum.accumulate(loss[order])
    kept = order[np.r_[True, best[1:] < best[:-1]]]
    if len(kept) <= most:
        return kept
    s, value = size[kept], loss[kept]
    range_of = np.minimum(((s - s[0]) / (s[-1] - s[0]) * most).astype(int), most - 1)
    slope = np.gradient(value, s)
    # Within a range the front is all but straight: its slope there tells which plan lies lowest.
    start = np.searchsorted(range_of, range_of)
    under = value - value[start] - slope[start] * (s - s[start])
    by_range = np.lexsort((under, range_of))
    first = np.r_[True, np.diff(range_of[by_range]) > 0]
    return kept[np.unique(np.r_[0, by_range[first], len(kept) - 1])]


def combine(fronts: Sequence[Front]) -> Combined:
    """Put blocks together: for every total size the least loss found, and its bound."""
    size, loss = np.zeros(1), np.zeros(1)
    trace: list[tuple[np.ndarray, np.ndarray]] = []
    for front in fronts:
        sizes = (size[:, None] + front.size).ravel()
        losses = (loss[:, None] + front.loss).ravel()
        kept = _front(sizes, losses, _STATES)
        trace.append((kept // len(front.size), kept % len(front.size)))
        size, loss = sizes[kept], losses[kept]
    picks = np.empty((len(size), len(fronts)), dtype=np.int64)
    state = np.arange(len(size))
    for block in reversed(range(len(fronts))):
        came_from, pick = trace[block]
        picks[:, block] = pick[state]
        state = came_from[state]
    return Combined(picks, size, loss, lower_bounds(fronts, size))


def lower_bounds(fronts: Sequence[Front], budgets: np.ndarray) -> np.ndarray:
    """The Lagrangian bound at budgets (k,): steps of the fronts' hulls, in part where they end."""
    start = sum(front.loss[0] for front in fronts), sum(front.size[0] for front in fronts)
    steps = []
    for front in fronts:
        hull = lower_hull(front.size, front.loss, np.arange(len(front.size)))
        for here, there in pairwise(hull):
            more = front.size[there] - front.size[here]
            saved = front.loss[here] - front.loss[there]
            steps.append((saved / more, more, saved))
    steps.sort(key=lambda step: -step[0])
    table = np.array(steps, dtype=float).reshape(-1, 3)
    sizes = start[1] + np.r_[0.0, np.cumsum(table[:, 1])]
    losses = start[0] - np.r_[0.0, np.cumsum(table[:, 2])]
    return np.interp(budgets, sizes, losses)
