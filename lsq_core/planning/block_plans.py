"""Pareto fronts for blocks whose options interact, and their combination across blocks.

The quadratic problem of [C] is block-diagonal, so all plans of a block can be enumerated: 5⁷ =
78,125 for seven matrices with five options each. They are reduced to the Pareto front of bytes and
loss, and a dynamic program over the blocks combines the fronts for all budgets at once (method §7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from lsq_core.planning.hull import lower_hull

#: Maximum number of units enumerated together; a block with more is split into groups.
MAX_UNITS = 8
#: Maximum number of plans on the front of a block, and of the blocks combined so far. A larger
#: front is divided into this many equal ranges of bytes and reduced to one plan in each.
_MAX_BLOCK_PLANS = 256
_MAX_STATES = 1024


@dataclass(frozen=True, eq=False)
class ParetoFront:
    """Pareto-optimal plans of a block, by size: ``choice`` (f, units), ``size``, ``loss``."""

    choice: np.ndarray
    size: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True, eq=False)
class CombinedFront:
    """Plans for all blocks, sorted by size; ``picks`` (s, blocks) indexes rows of their fronts."""

    picks: np.ndarray
    size: np.ndarray
    loss: np.ndarray
    #: A lower bound on the loss of any plan of at most this size, (s,).
    lower_bound: np.ndarray


def predicted_loss(matrix: np.ndarray, choice: np.ndarray, options: int) -> np.ndarray:
    """Return ½·δᵀMδ (k,) for plans (k, units), with M (units·options, units·options)."""
    choice = np.atleast_2d(choice)
    indices = choice + np.arange(choice.shape[1]) * options
    return 0.5 * matrix[indices[:, :, None], indices[:, None, :]].sum(axis=(1, 2))


def clip_negative_eigenvalues(matrix: np.ndarray) -> np.ndarray:
    """Return the nearest positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, 0)) @ vectors.T


def diagonal_only(matrix: np.ndarray) -> np.ndarray:
    """Return the matrix without interactions between units."""
    return np.diag(np.diag(matrix))


def block_front(matrix: np.ndarray, size: np.ndarray, allowed: np.ndarray) -> ParetoFront:
    """Enumerate a block's plans and return the Pareto-optimal ones.

    ``matrix`` is M (u·r, u·r). ``size`` and ``allowed``, both (u, r), are the bytes of each unit's
    options and whether the unit may have them.
    """
    units, options = size.shape
    loss, total = np.zeros((options,) * units), np.zeros((options,) * units)

    def broadcast_along(values: np.ndarray, *axes: int) -> np.ndarray:
        shape = np.ones(units, dtype=int)
        shape[list(axes)] = options
        return values.reshape(shape)

    tiles = matrix.reshape(units, options, units, options)
    for u in range(units):
        own = np.diag(tiles[u, :, u, :]) / 2
        loss += broadcast_along(np.where(allowed[u], own, np.inf), u)
        total += broadcast_along(size[u], u)
    for u, v in combinations(range(units), 2):
        loss += broadcast_along(tiles[u, :, v, :], u, v)
    loss, total = loss.ravel(), total.ravel()
    usable = np.flatnonzero(np.isfinite(loss))
    selected = usable[_pareto_indices(total[usable], loss[usable], _MAX_BLOCK_PLANS)]
    choice = np.stack(np.unravel_index(selected, (options,) * units), axis=1)
    return ParetoFront(choice, total[selected], loss[selected])


def _pareto_indices(size: np.ndarray, loss: np.ndarray, max_plans: int) -> np.ndarray:
    """Return the indices of the Pareto-optimal plans, sorted by size, at most about ``max_plans``.

    If there are more, the plan that lies lowest relative to the front's slope is selected in each
    range of bytes, which is close to the choice of a Lagrangian relaxation.
    """
    order = np.lexsort((loss, size))
    best = np.minimum.accumulate(loss[order])
    selected = order[np.r_[True, best[1:] < best[:-1]]]
    if len(selected) <= max_plans:
        return selected
    s, value = size[selected], loss[selected]
    bucket = np.minimum(((s - s[0]) / (s[-1] - s[0]) * max_plans).astype(int), max_plans - 1)
    slope = np.gradient(value, s)
    # Within a range the front is almost straight, so its slope identifies the lowest plan.
    start = np.searchsorted(bucket, bucket)
    excess = value - value[start] - slope[start] * (s - s[start])
    by_range = np.lexsort((excess, bucket))
    first = np.r_[True, np.diff(bucket[by_range]) > 0]
    return selected[np.unique(np.r_[0, by_range[first], len(selected) - 1])]


def combine(fronts: Sequence[ParetoFront]) -> CombinedFront:
    """Combine blocks into plans with the least loss found at each total size, and their bounds."""
    size, loss = np.zeros(1), np.zeros(1)
    trace: list[tuple[np.ndarray, np.ndarray]] = []
    for front in fronts:
        sizes = (size[:, None] + front.size).ravel()
        losses = (loss[:, None] + front.loss).ravel()
        selected = _pareto_indices(sizes, losses, _MAX_STATES)
        trace.append((selected // len(front.size), selected % len(front.size)))
        size, loss = sizes[selected], losses[selected]
    picks = np.empty((len(size), len(fronts)), dtype=np.int64)
    state = np.arange(len(size))
    for block in reversed(range(len(fronts))):
        parent, pick = trace[block]
        picks[:, block] = pick[state]
        state = parent[state]
    return CombinedFront(picks, size, loss, lower_bounds(fronts, size))


def lower_bounds(fronts: Sequence[ParetoFront], budgets: np.ndarray) -> np.ndarray:
    """Return the Lagrangian bound at budgets (k,): the fronts' hull steps, the last one partial."""
    start = sum(front.loss[0] for front in fronts), sum(front.size[0] for front in fronts)
    steps = []
    for front in fronts:
        hull = lower_hull(front.size, front.loss, np.arange(len(front.size)))
        for smaller, larger in pairwise(hull):
            more = front.size[larger] - front.size[smaller]
            saved = front.loss[smaller] - front.loss[larger]
            steps.append((saved / more, more, saved))
    steps.sort(key=lambda step: -step[0])
    table = np.array(steps, dtype=float).reshape(-1, 3)
    sizes = start[1] + np.r_[0.0, np.cumsum(table[:, 1])]
    losses = start[0] - np.r_[0.0, np.cumsum(table[:, 2])]
    return np.interp(budgets, sizes, losses)
