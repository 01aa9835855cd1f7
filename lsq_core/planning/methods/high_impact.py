"""High-impact parameter ratios ([C]; method §7): rows at two widths, a ratio for each matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from lsq_core.bits import Config, MixedRows, mixed_rows
from lsq_core.errors import InputError
from lsq_core.model.info import Matrix
from lsq_core.planning.block_plans import (
    MAX_UNITS,
    ParetoFront,
    block_front,
    clip_negative_eigenvalues,
    combine,
    diagonal_only,
    predicted_loss,
)
from lsq_core.planning.frontier import Frontier, Segment
from lsq_core.planning.problem import Impact, Interactions, Problem
from lsq_core.planning.request import PlanRequest


class HighImpact:
    """The ratio of rows at more bits, chosen for all matrices of a block together.

    A request's ``low_bits``, ``high_bits`` and ``group_size`` say what there is to choose from,
    ``loss`` which interactions are read. By ``ratios``, one ratio holds for all matrices
    (``uniform``), each is chosen for itself (``diagonal``, that of M), or all of a block together
    (``full``). ``clip`` takes the negative eigenvalues out of each block's M.
    """

    name = "high-impact"
    title = "High-impact rows"
    metrics: tuple[str, ...] = ()
    has_base = False
    reads_rows = True

    def options(self, request: PlanRequest) -> tuple[Config, ...]:
        """Mixed rows at each ratio."""
        return mixed_rows(request.low_bits, request.high_bits, request.group_size)

    def frontier(self, problem: Problem, request: PlanRequest, bases: list[int]) -> Frontier:
        """Complete plans one after another; bases don't matter.

        Raises
        ------
        InputError
            When row scores or interactions are missing, or a group doesn't fit into some row.
        """
        impact = require_impact(problem, request)
        problem.check_options()
        if request.ratios == "uniform":
            return _uniform_frontier(problem, impact, request)
        groups = [part for block in impact.blocks for part in _split_large_block(block, problem)]
        fronts = [_block_front(part, problem, request) for part in groups]
        combined = combine(fronts)
        choices = np.empty((len(combined.size), len(problem.matrices)), dtype=np.int64)
        for picks, front, part in zip(combined.picks.T, fronts, groups, strict=True):
            for column, members in zip(front.choice[picks].T, part.units, strict=True):
                choices[:, list(members)] = column[:, None]
        notes = _truncation_notes(problem, request)
        return _frontier_of_plans(problem, choices, combined.loss, combined.lower_bound, notes)


def require_impact(problem: Problem, request: PlanRequest) -> Impact:
    """What is known of the rows, where it is enough for a request.

    Raises
    ------
    InputError
        When it isn't.
    """
    impact = problem.impact
    if impact is None:
        raise InputError(
            "High-impact rows need row scores and interactions, which were not measured yet; a "
            "plan or a run on the command line, or the Plan page, measures them."
        )
    if request.ratios != "uniform" and any(block.matrix is None for block in impact.blocks):
        raise InputError(
            f"There are no interactions by the {request.loss} loss of "
            f"b{request.low_bits}h{request.high_bits}g{request.group_size} yet; choose uniform "
            "ratios, or measure them."
        )
    return impact


def _uniform_frontier(problem: Problem, impact: Impact, request: PlanRequest) -> Frontier:
    """One ratio for all; a pinned matrix gets the nearest that its pin allows."""
    stops = range(len(problem.options))
    choices = np.stack([np.clip(stop, problem.low, problem.high) for stop in stops])
    if any(block.matrix is None for block in impact.blocks):
        sizes = [problem.nominal(choice) for choice in choices]
        segments = map(partial(Segment, moves=()), choices, sizes)
        return Frontier(tuple(segments), problem.bytes)
    losses = sum(predict_block_losses(block, problem, request, choices) for block in impact.blocks)
    return _frontier_of_plans(problem, choices, losses, losses)


def predict_block_losses(
    block: Interactions, problem: Problem, request: PlanRequest, choices: np.ndarray
) -> np.ndarray:
    """The loss that a block adds by its M, for plans (k, n) of the model; (k,)."""
    own = choices[:, [members[0] for members in block.units]]
    return predicted_loss(effective_matrix(block, request), own, len(problem.options))


def effective_matrix(block: Interactions, request: PlanRequest) -> np.ndarray:
    """A block's M as a request reads it: whole or its diagonal, clipped or raw."""
    matrix = diagonal_only(block.matrix) if request.ratios == "diagonal" else block.matrix
    return clip_negative_eigenvalues(matrix) if request.clip else matrix


def _split_large_block(block: Interactions, problem: Problem) -> list[Interactions]:
    """A block, or where it has too many units groups of them in the order of the computation.

    What units of different groups do to one another is left out then.
    """
    count, options = len(block.units), len(problem.options)
    if count <= MAX_UNITS:
        return [block]
    parts = []
    for group in np.array_split(np.arange(count), -(-count // MAX_UNITS)):
        indices = (group[:, None] * options + np.arange(options)).ravel()
        units = tuple(block.units[u] for u in group)
        parts.append(Interactions(block.layer, units, block.matrix[np.ix_(indices, indices)]))
    return parts


def _truncation_notes(problem: Problem, request: PlanRequest) -> tuple[str, ...]:
    """A plain word where blocks have too many units to be enumerated."""
    most = max(len(block.units) for block in problem.impact.blocks)
    if request.ratios != "full" or most <= MAX_UNITS:
        return ()
    return (
        f"Blocks here have {most} module types, too many to try together: interactions are kept "
        f"within groups of at most {MAX_UNITS}, in the order of the computation.",
    )


def _block_front(block: Interactions, problem: Problem, request: PlanRequest) -> ParetoFront:
    size = np.stack([problem.bytes[list(members)].sum(axis=0) for members in block.units])
    allowed = np.stack([problem.allowed[list(members)].all(axis=0) for members in block.units])
    if not allowed.any(axis=1).all():
        raise InputError(
            f"The pins of layer {block.layer} give experts of one module type different ratios, "
            "which share theirs; pin them alike."
        )
    return block_front(effective_matrix(block, request), size, allowed)


def _frontier_of_plans(
    problem: Problem,
    choices: np.ndarray,
    losses: np.ndarray,
    bounds: np.ndarray,
    notes: tuple[str, ...] = (),
) -> Frontier:
    """Plans (s, n) by size as a frontier."""
    segments = tuple(Segment(choice, problem.nominal(choice)) for choice in choices)
    return Frontier(segments, problem.bytes, losses=losses, lower_bounds=bounds, notes=notes)


def high_rows(problem: Problem, choice: np.ndarray) -> dict[str, tuple[int, ...]]:
    """The high-impact rows of each matrix at a choice (n,): its highest scores, sorted.

    The rows of a smaller ratio are among those of a larger one.
    """
    rows = {}
    for i, (matrix, option) in enumerate(zip(problem.matrices, choice, strict=True)):
        config = problem.options[option]
        if isinstance(config, MixedRows):
            count = config.high_rows(matrix.out_features)
            rows[matrix.name] = tuple(top_rows(problem.impact.row_scores[i], count).tolist())
    return rows


def top_rows(scores: np.ndarray, count: int) -> np.ndarray:
    """The rows with the highest of (out,) scores, sorted; of equal ones the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def group_into_units(matrices: Sequence[Matrix]) -> dict[str, tuple[int, ...]]:
    """What shares a ratio in one block: the matrices of a module type, as indices.

    That is a single one, or the experts of a layer, of which there are too many to choose for
    each.
    """
    units: dict[str, list[int]] = {}
    for i, matrix in enumerate(matrices):
        units.setdefault(matrix.type, []).append(i)
    return {kind: tuple(members) for kind, members in units.items()}


def build_impact(
    matrices: Sequence[Matrix],
    row_scores: Mapping[str, np.ndarray],
    interactions: Mapping[int, np.ndarray],
) -> Impact:
    """What planning needs, from row scores by module and each layer's M; layers may lack theirs."""
    blocks = []
    for layer in dict.fromkeys(matrix.layer for matrix in matrices):
        own = [i for i, matrix in enumerate(matrices) if matrix.layer == layer]
        units = group_into_units([matrices[i] for i in own]).values()
        members = tuple(tuple(own[k] for k in unit) for unit in units)
        blocks.append(Interactions(layer, members, interactions.get(layer)))
    return Impact(tuple(row_scores[matrix.name] for matrix in matrices), tuple(blocks))
