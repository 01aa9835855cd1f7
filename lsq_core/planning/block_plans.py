"""Options that interact within a block: the Pareto front of each block, and their combination.

The quadratic problem of [C] is block-diagonal. So all plans of a block are enumerated, 5⁷ = 78,125
for seven matrices of five options, reduced to the Pareto front of bytes and loss, and combined by
a dynamic program over the blocks for every budget at once (method §7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from lsq_core.planning.hull import lower_hull

#: Most units that are enumerated together; a block with more is split into groups.
MAX_UNITS = 8
#: Most plans on the front of a block, and of the blocks combined so far; a larger front is reduced
#: to one plan in each of this number of equal ranges of bytes.
_MAX_BLOCK_PLANS = 256
_MAX_STATES = 1024


@dataclass(frozen=True, eq=False)
class ParetoFront:
    """Pareto-optimal plans of a block by size: ``choice`` (f, units), ``size``, ``loss``."""

    choice: np.ndarray
    size: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True, eq=False)
class CombinedFront:
    """Plans of all blocks, by size: ``picks`` (s, blocks) are rows of the fronts."""

    picks: np.ndarray
    size: np.ndarray
    loss: np.ndarray
    #: A lower bound on the loss of all plans of at most this size, (s,).
    lower_bound: np.ndarray


def predicted_loss(matrix: np.ndarray, choice: np.ndarray, options: int) -> np.ndarray:
    """Return ½·δᵀMδ, (k,), of plans (k, units) for M (units·options, units·options)."""
    choice = np.atleast_2d(choice)
    indices = choice + np.arange(choice.shape[1]) * options
    return 0.5 * matrix[indices[:, :, None], indices[:, None, :]].sum(axis=(1, 2))


def clip_negative_eigenvalues(matrix: np.ndarray) -> np.ndarray:
    """Return the nearest matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, 0)) @ vectors.T


def diagonal_only(matrix: np.ndarray) -> np.ndarray:
    """Return the matrix without interactions between units."""
    return np.diag(np.diag(matrix))


def block_front(matrix: np.ndarray, size: np.ndarray, allowed: np.ndarray) -> ParetoFront:
    """Enumerate a block's plans and return the Pareto-optimal ones.

    ``matrix`` is M (u·r, u·r); ``size`` and ``allowed`` are (u, r), bytes and whether a unit may
    have an option.
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
    """Return the Pareto-optimal plans by size, at most about ``max_plans``.

    In each range of bytes the plan is selected that lies lowest against the front's slope there,
    close to the choice of a Lagrangian relaxation.
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
    """Combine blocks: for every total size the least loss found, and its bound."""
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
    """Return the Lagrangian bound at budgets (k,): steps of the fronts' hulls, the last in part."""
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
