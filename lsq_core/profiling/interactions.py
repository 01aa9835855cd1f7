"""Effect of high-impact ratios on a loss, individually and in pairs (M of [C]; method §7).

Each matrix of a block is rounded to nearest at each ratio, with more bits for its high-impact rows
and everything else at full precision; then each pair of matrices at each pair of ratios. Seven
matrices and five ratios take 1 + 35 + 525 evaluations of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import torch
from torch import Tensor

from lsq_core.bits import MixedRows
from lsq_core.model.info import Matrix
from lsq_core.model.loading import LoadedModel
from lsq_core.model.walk import detect_output_forms, run_from_block
from lsq_core.planning.methods.high_impact import group_into_units, top_rows
from lsq_core.profiling.context import BlockContext
from lsq_core.profiling.measure import iter_blocks
from lsq_core.progress import Progress, no_progress
from lsq_core.quantization.registry import get_quantizer
from lsq_core.quantization.rows import quantize_config

#: Number of calibration tokens for each loss. The block's own output is cheap; the model's output
#: takes all later blocks and the LM head, 560 times for each block of a Llama.
LOSS_TOKENS = {"block": 1024, "model": 256}
#: Maximum number of logits computed at once, which limits how many changed models run together.
_MAX_BATCH_LOGITS = 2**24

#: Weights that replace the full-precision ones.
WeightChange = dict[Matrix, Tensor]


@dataclass(frozen=True, eq=False)
class BlockInteractions:
    """The units of one block (module types that share a ratio), and the measured M (u·r, u·r)."""

    layer: int
    units: tuple[str, ...]
    matrix: np.ndarray


@torch.inference_mode()
def measure_interactions(
    loaded: LoadedModel,
    ids: Tensor,
    row_scores: dict[str, np.ndarray],
    options: Sequence[MixedRows],
    loss: str,
    *,
    axis: int = 1,
    metadata: str = "8bit",
    known: Sequence[int] = (),
    progress: Progress = no_progress,
) -> Iterator[BlockInteractions]:
    """Yield M of each block in turn, except for ``known`` layers.

    ``loss`` is ``block``, the squared change of the block's own output over its energy, or
    ``model``, the mean squared change of the model's logits. ``ids`` are int64 (sequences,
    tokens), from :func:`limit_tokens`. Differences are computed in float32 and summed in float64;
    outputs of a 16-bit model are rounded to its dtype.
    """
    by_layer: dict[int, list[Matrix]] = {}
    for matrix in loaded.info.matrices:
        by_layer.setdefault(matrix.layer, []).append(matrix)
    counts = {
        k: _count_evaluations(len(group_into_units(own)), len(options))
        for k, own in by_layer.items()
    }
    total = sum(counts.values())
    done = sum(counts[k] for k in known)
    for context in iter_blocks(loaded, ids):
        if context.layer in known:
            continue
        losses = _LOSSES[loss](context)
        changed = _quantized_units(context, row_scores, options, axis, metadata)
        layer = f"layer {context.layer + 1} of {loaded.info.layers}"

        def report(more: int, before: int = done, layer: str = layer) -> None:
            progress(before + more, total, f"{layer}, interactions by the {loss} loss")

        matrix = _interactions(changed, len(options), losses.compute, report)
        done += counts[context.layer]
        yield BlockInteractions(context.layer, tuple(changed), matrix)


def limit_tokens(ids: Tensor, loss: str) -> Tensor:
    """Return the first calibration tokens (sequences, tokens), up to ``LOSS_TOKENS[loss]``."""
    wanted = LOSS_TOKENS[loss]
    return ids[: max(1, wanted // ids.shape[1]), :wanted]


def _count_evaluations(units: int, options: int) -> int:
    return 1 + units * options + units * (units - 1) // 2 * options**2


def _quantized_units(
    context: BlockContext,
    row_scores: dict[str, np.ndarray],
    options: Sequence[MixedRows],
    axis: int,
    metadata: str,
) -> dict[str, list[WeightChange]]:
    """Return the quantized weights of each unit at each option."""
    quantizer = get_quantizer("rtn")

    def rounded(matrix: Matrix, option: MixedRows) -> Tensor:
        weight = context.weight(matrix)
        rows = top_rows(row_scores[matrix.name], option.high_rows(matrix.out_features))
        packed = quantize_config(
            weight,
            option,
            quantizer,
            rows=torch.from_numpy(rows),
            axis=axis,
            metadata=metadata,
            name=matrix.name,
        )
        return packed.dequantize(weight.dtype)

    return {
        kind: [{context.matrices[i]: rounded(context.matrices[i], o) for i in own} for o in options]
        for kind, own in group_into_units(context.matrices).items()
    }


def _interactions(
    changed: dict[str, list[WeightChange]],
    options: int,
    losses: Callable[[list[WeightChange], Callable[[int], None]], list[float]],
    report: Callable[[int], None],
) -> np.ndarray:
    """Return M from the losses of no change, of each change alone, and of each pair in a block.

    The diagonal is 2·(L(Δ) − L(0)). Entries for different units are L(Δ1+Δ2) + L(0) − L(Δ1) −
    L(Δ2); those for two options of the same unit, which exclude each other, are 0.
    """
    unit_options = list(product(range(len(changed)), range(options)))
    changes = list(changed.values())
    pairs = [(a, b) for a, b in combinations(unit_options, 2) if a[0] != b[0]]
    all_changes = [{}, *(changes[u][m] for u, m in unit_options)]
    all_changes += [changes[u][m] | changes[v][n] for (u, m), (v, n) in pairs]
    found = losses(all_changes, report)
    baseline_loss, alone = found[0], dict(zip(unit_options, found[1:], strict=False))
    matrix = np.zeros((len(unit_options), len(unit_options)))
    for k, unit_option in enumerate(unit_options):
        matrix[k, k] = 2 * (alone[unit_option] - baseline_loss)
    for (a, b), both in zip(pairs, found[1 + len(unit_options) :], strict=True):
        i, j = unit_options.index(a), unit_options.index(b)
        matrix[i, j] = matrix[j, i] = both + baseline_loss - alone[a] - alone[b]
    return matrix


class _BlockLoss:
    """‖Y′ − Y‖²/‖Y‖² of the block's output over all calibration tokens."""

    def __init__(self, context: BlockContext) -> None:
        self.context = context
        self.expected = [output.clone() for output in context.run()]
        self.energy = sum(float(output.double().square().sum()) for output in self.expected)

    def compute(self, changes: list[WeightChange], report: Callable[[int], None]) -> list[float]:
        """Return the loss of each change."""
        found = []
        for done, change in enumerate(changes):
            report(done)
            with self.context.replaced_weights(change):
                squares = sum(
                    float((after.float() - before.float()).double().square().sum())
                    for before, after in zip(self.expected, self.context.run(), strict=True)
                )
            found.append(squares / self.energy)
        return found


class _ModelLoss:
    """Mean squared change of the model's logits; several changed models run together."""

    def __init__(self, context: BlockContext) -> None:
        self.context, self.loaded = context, context.loaded
        self.ids = context.ids
        vocabulary = self.loaded.model.config.get_text_config().vocab_size
        self.batch_size = max(1, _MAX_BATCH_LOGITS // (self.ids.numel() * vocabulary))
        self.forms = detect_output_forms(self.loaded, self.ids)
        self.expected = self._logits(torch.cat(list(context.run())))

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits (models, sequences, tokens, vocabulary) for the block's outputs."""
        ids = self.ids.repeat(len(hidden) // len(self.ids), 1)
        logits = run_from_block(self.loaded, self.context.layer + 1, hidden, ids, self.forms)
        return logits.float().view(-1, *self.ids.shape, logits.shape[-1])

    def compute(self, changes: list[WeightChange], report: Callable[[int], None]) -> list[float]:
        """Return the loss of each change."""
        found: list[float] = []
        for start in range(0, len(changes), self.batch_size):
            report(start)
            hidden = []
            for change in changes[start : start + self.batch_size]:
                with self.context.replaced_weights(change):
                    hidden += list(self.context.run())
            error = self._logits(torch.cat(hidden)).sub_(self.expected).square_()
            found += error.mean(-1, dtype=torch.float64).mean((1, 2)).tolist()
        return found


_LOSSES = {"block": _BlockLoss, "model": _ModelLoss}
