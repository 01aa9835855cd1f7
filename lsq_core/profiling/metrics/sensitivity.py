"""Activation sensitivity ([A] Eq. 10): how far an output moves when weights are quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from lsq_core.bits import EXTENDED_LADDER, QuantConfig
from lsq_core.model.info import Matrix
from lsq_core.profiling.metrics.base import Metric, Score
from lsq_core.profiling.metrics.weight_error import squared_distances

if TYPE_CHECKING:
    from torch import Tensor

    from lsq_core.profiling.context import BlockContext
    from lsq_core.profiling.parts import Part


def module_sensitivity(difference: Tensor, gram: Tensor, tokens: int) -> Tensor:
    """Return ``tr(ΔW·H·ΔWᵀ)/(T·d_out)``, the exact mean squared output change of a linear module.

    ``difference`` is (…, out, in), ``gram`` is ``XᵀX`` (in, in) over ``tokens`` tokens. The result
    is float64 (…,), NaN if no token reached the module (an expert that was never routed to).
    """
    import torch

    if tokens == 0:
        return difference.new_full(difference.shape[:-2], torch.nan, dtype=torch.float64)
    rows = torch.linalg.vecdot(difference @ gram, difference)
    return rows.sum(-1, dtype=torch.float64) / (tokens * difference.shape[-2])


def _output_changes(context: BlockContext, matrix: Matrix, weights: Tensor) -> Tensor:
    """Return the sensitivity of a module to weights (configs, out, in), float64 (configs,).

    Cached in the context for the next metric that needs it.
    """
    known = context.cache.get("output changes", (None, None))
    if known[0] is not weights:
        difference = context.weight(matrix).float() - weights
        known = weights, module_sensitivity(difference, *context.observations.grams[matrix])
        context.cache["output changes"] = known
    return known[1]


class ModuleSensitivity(Metric):
    """Eq. 10 for each linear module alone, from one Gram matrix for all configurations."""

    name = "sensitivity_module"
    title = "Activation sensitivity by module"
    label, short = "sensitivity by module", "by module"
    axis = "mean squared output change"
    meaning = "How far one linear module's own output moves when its weights are quantized."
    log_scale = True
    detects_outliers = True
    needs_calibration = True
    configs = EXTENDED_LADDER
    by_config = True

    def score_at_configs(
        self,
        context: BlockContext,
        configs: Sequence[QuantConfig],
        quantized: dict[Matrix, Tensor],
    ) -> Iterator[Score]:
        """Yield one score for each matrix and configuration."""
        for matrix, weights in quantized.items():
            changes = _output_changes(context, matrix, weights)
            for config, value in zip(configs, changes, strict=True):
                yield Score(matrix, self.name, config, value)


class PartSensitivity(Metric):
    """Eq. 10 for the authors' parts: matrices quantized together, scored at a common output."""

    name = "sensitivity"
    title = "Activation sensitivity by part"
    label, short = "sensitivity by part", "by part"
    axis = "mean squared output change"
    meaning = "How far the output of an attention or MLP part moves when its weights are quantized."
    log_scale = True
    detects_outliers = True
    shared_by_part = True
    needs_calibration = True
    configs = EXTENDED_LADDER
    by_config = True

    def score_at_configs(
        self,
        context: BlockContext,
        configs: Sequence[QuantConfig],
        quantized: dict[Matrix, Tensor],
    ) -> Iterator[Score]:
        """Yield the score of each part, once for each of its matrices."""
        for part in context.parts:
            if any(m not in quantized for m in part.matrices):
                continue  # the group size does not divide one of the matrices
            values = _part_scores(context, part, {m: quantized[m] for m in part.matrices})
            for config, value in zip(configs, values, strict=True):
                for matrix in part.matrices:
                    yield Score(matrix, self.name, config, value, part.name)


def _part_scores(
    context: BlockContext, part: Part, quantized: dict[Matrix, Tensor]
) -> Iterable[float | Tensor]:
    """Return a score for each configuration of the weights (configs, out, in)."""
    if part.linear:
        ((matrix, weights),) = quantized.items()
        return _output_changes(context, matrix, weights)
    by_config = (
        dict(zip(quantized, own, strict=True)) for own in zip(*quantized.values(), strict=True)
    )
    return [_replay_score(context, part, own) for own in by_config]


def _replay_score(
    context: BlockContext, part: Part, quantized: dict[Matrix, Tensor]
) -> float | Tensor:
    replay = context.observations.replays[part.comparison]
    total, count = 0.0, 0
    with context.replaced_weights(quantized):
        for before, after in zip(replay.outputs, replay.run(), strict=True):
            total += squared_distances(after[None], before)[0]
            count += before.numel()
    return total / count if count else float("nan")  # no token reached the part
