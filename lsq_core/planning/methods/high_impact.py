"""High-impact parameter ratios ([C]; method §7): two bit widths per matrix, mixed by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from lsq_core.bits import PAPER, Config, MixedRows, mixed_rows
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
from lsq_core.planning.methods.base import check_ladder
from lsq_core.planning.problem import Impact, Interactions, Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.planning.ties import merge_groups


class HighImpact:
    """Planner that chooses each matrix's share of rows with more bits.

    A request's ``low_bits``, ``high_bits`` and ``group_size`` define the options, and ``loss`` the
    loss that interactions are measured on. ``ratios`` is ``uniform`` (one ratio for all matrices),
    ``diagonal`` (each matrix separately, from the diagonal of M) or ``full`` (all matrices of a
    block jointly). ``clip`` removes the negative eigenvalues of each block's M.
    """

    name = "high-impact"
    title = "High-impact rows"
    meaning = "More bits for the rows of each matrix that change the loss most."
    summary = (
        "Within each matrix, the rows with the largest gradients get more bits. Their share is "
        "chosen jointly for all matrices of a block, from measured interactions."
    )
    source = "Pham et al., High-Impact Parameter Ratio Optimization (arXiv 2511.17801)"
    use = "Two to three bits, with learned rounding (--hybrid)."
    limits = (
        "A block of seven matrices is quantized 560 times before the first plan, and "
        "perplexity cannot be predicted."
    )
    color, symbol = "#5B7F2B", "bowtie"
    metrics: tuple[str, ...] = ()
    fields = ("low_bits", "high_bits", "group_size", "loss", "ratios", "clip")
    has_base = False
    reads_rows = True
    reads_refinement = False
    ladders = (PAPER,)
    cost_unit = "predicted change of the output"

    def options(self, request: PlanRequest) -> tuple[Config, ...]:
        """Return the mixed-row options, one per ratio; only the paper's ladder is supported."""
        check_ladder(self, request)
        return mixed_rows(request.low_bits, request.high_bits, request.group_size)

    def frontier(self, problem: Problem, request: PlanRequest, bases: list[int]) -> Frontier:
        """Return complete plans by size; ``bases`` is not used.

        Raises
        ------
        InputError
            If row scores or interactions are missing, or some matrix has no allowed option.
        """
        impact = require_impact(problem, request)
        problem.check_options()
        if request.ratios == "uniform":
            return _uniform_frontier(problem, impact, request)
        parts = [part for block in impact.blocks for part in _split_large_block(block, problem)]
        tied = [_merge_tied_units(part, problem, request) for part in parts]
        fronts = [_block_front(part, problem) for part in tied]
        combined = combine(fronts)
        choices = np.empty((len(combined.size), len(problem.matrices)), dtype=np.int64)
        for picks, front, part in zip(combined.picks.T, fronts, tied, strict=True):
            for column, members in zip(front.choice[picks].T, part.units, strict=True):
                choices[:, list(members)] = column[:, None]
        notes = _truncation_notes(problem, request)
        return _frontier_of_plans(problem, choices, combined.loss, combined.lower_bound, notes)


def require_impact(problem: Problem, request: PlanRequest) -> Impact:
    """Return the row measurements if they are sufficient for a request.

    Raises
    ------
    InputError
        If row scores or interactions are missing.
    """
    impact = problem.impact
    if impact is None:
        raise InputError(
            "High-impact rows need row scores and interactions, which have not been measured yet; "
            "make a plan or a run on the command line, or use the Plan page, to measure them."
        )
    if request.ratios != "uniform" and any(block.matrix is None for block in impact.blocks):
        raise InputError(
            f"Interactions of b{request.low_bits}h{request.high_bits}g{request.group_size} have "
            f"not been measured by the {request.loss} loss yet; choose uniform ratios, or measure "
            "them."
        )
    return impact


def _uniform_frontier(problem: Problem, impact: Impact, request: PlanRequest) -> Frontier:
    """Return plans with one ratio for all matrices, clipped to the range of their pins."""
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
    """Return the losses (k,) that a block's M predicts for the model's plans (k, n)."""
    own = choices[:, [members[0] for members in block.units]]
    return predicted_loss(effective_matrix(block, request), own, len(problem.options))


def effective_matrix(block: Interactions, request: PlanRequest) -> np.ndarray:
    """Return a block's M for a request: in full or its diagonal only, clipped if requested."""
    matrix = diagonal_only(block.matrix) if request.ratios == "diagonal" else block.matrix
    return clip_negative_eigenvalues(matrix) if request.clip else matrix


def _split_large_block(block: Interactions, problem: Problem) -> list[Interactions]:
    """Split a block with too many units into groups in the order of computation.

    Interactions between units of different groups are ignored; tied units stay together.
    """
    tied, options = _tied_units(block, problem), len(problem.options)
    if len(tied) <= MAX_UNITS:
        return [block]
    parts = []
    for part in np.array_split(np.arange(len(tied)), -(-len(tied) // MAX_UNITS)):
        group = np.array([u for k in part for u in tied[k]])
        indices = (group[:, None] * options + np.arange(options)).ravel()
        units = tuple(block.units[u] for u in group)
        parts.append(Interactions(block.layer, units, block.matrix[np.ix_(indices, indices)]))
    return parts


def _tied_units(block: Interactions, problem: Problem) -> tuple[tuple[int, ...], ...]:
    """Return tuples of a block's units that share a ratio; most have a single unit."""
    unit_of = {i: u for u, members in enumerate(block.units) for i in members}
    tied = [{unit_of[i] for i in group if i in unit_of} for group in problem.groups]
    return merge_groups([*filter(None, tied), *([u] for u in range(len(block.units)))])


def _merge_tied_units(block: Interactions, problem: Problem, request: PlanRequest) -> Interactions:
    """Return a block with its effective M, in which units that share a ratio are merged.

    For δ = Sδ', with δ' one-hot per merged unit, the loss ½·δᵀMδ is ½·δ'ᵀ(SᵀMS)δ'.
    """
    tied, options = _tied_units(block, problem), len(problem.options)
    share = np.zeros((len(block.units), len(tied)))
    for k, units in enumerate(tied):
        share[list(units), k] = 1
    shared = np.kron(share, np.eye(options))
    matrix = effective_matrix(block, request)
    if len(tied) < len(block.units):
        matrix = shared.T @ matrix @ shared
    members = tuple(tuple(i for u in units for i in block.units[u]) for units in tied)
    return Interactions(block.layer, members, matrix)


def _truncation_notes(problem: Problem, request: PlanRequest) -> tuple[str, ...]:
    """Return a note if some block has too many units for joint enumeration."""
    most = max(len(_tied_units(block, problem)) for block in problem.impact.blocks)
    if request.ratios != "full" or most <= MAX_UNITS:
        return ()
    return (
        f"Blocks here have {most} module types, too many to enumerate together: interactions are "
        f"limited to groups of at most {MAX_UNITS}, in the order of the computation.",
    )


def _block_front(block: Interactions, problem: Problem) -> ParetoFront:
    size = np.stack([problem.bytes[list(members)].sum(axis=0) for members in block.units])
    allowed = np.stack([problem.allowed[list(members)].all(axis=0) for members in block.units])
    if not allowed.any(axis=1).all():
        raise InputError(
            f"The pins of layer {block.layer} give experts of one module type different ratios, "
            "but these experts share a ratio; pin them to the same one."
        )
    return block_front(block.matrix, size, allowed)


def _frontier_of_plans(
    problem: Problem,
    choices: np.ndarray,
    losses: np.ndarray,
    bounds: np.ndarray,
    notes: tuple[str, ...] = (),
) -> Frontier:
    """Return the frontier of complete plans (s, n), which are already sorted by size."""
    segments = tuple(Segment(choice, problem.nominal(choice)) for choice in choices)
    return Frontier(segments, problem.bytes, losses=losses, lower_bounds=bounds, notes=notes)


def high_rows(problem: Problem, choice: np.ndarray) -> dict[str, tuple[int, ...]]:
    """Return the high-impact rows of each matrix, its highest-scoring ones, at a choice (n,).

    Row indices are sorted. The rows at a smaller ratio are a subset of those at a larger ratio.
    """
    rows = {}
    for i, (matrix, option) in enumerate(zip(problem.matrices, choice, strict=True)):
        config = problem.options[option]
        if isinstance(config, MixedRows):
            count = config.high_rows(matrix.out_features)
            rows[matrix.name] = tuple(top_rows(problem.impact.row_scores[i], count).tolist())
    return rows


def top_rows(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the sorted rows with the highest scores (out,); ties go to the earlier row."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def group_into_units(matrices: Sequence[Matrix]) -> dict[str, tuple[int, ...]]:
    """Return a block's units, the matrices that share a ratio, as indices by module type.

    A unit is a single matrix, or all experts of a module type, which are too many for a ratio each.
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
    """Build the planner's input from row scores by module and, where measured, M by layer."""
    blocks = []
    for layer in dict.fromkeys(matrix.layer for matrix in matrices):
        own = [i for i, matrix in enumerate(matrices) if matrix.layer == layer]
        units = group_into_units([matrices[i] for i in own]).values()
        members = tuple(tuple(own[k] for k in unit) for unit in units)
        blocks.append(Interactions(layer, members, interactions.get(layer)))
    return Impact(tuple(row_scores[matrix.name] for matrix in matrices), tuple(blocks))
