"""Activation sensitivity ([A] Eq. 10): how far an output moves when weights are quantized."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lsq_core.bits import LADDER, QuantConfig
from lsq_core.model.info import Matrix
from lsq_core.profiling.context import BlockContext
from lsq_core.profiling.metrics.base import Metric, Score
from lsq_core.profiling.metrics.weight_error import squared_norm
from lsq_core.profiling.parts import Part


def module_sensitivity(difference: Tensor, gram: Tensor, tokens: int) -> float:
    """``tr(ΔW·H·ΔWᵀ)/(T·d_out)``: the mean squared output change of one linear module, exactly.

    ``difference`` is (out, in), ``gram`` is ``XᵀX`` (in, in) over ``tokens`` tokens. NaN where no
    token reached the module (an expert that was never chosen).
    """
    if tokens == 0:
        return float("nan")
    rows = torch.linalg.vecdot(difference @ gram, difference)
    return float(rows.double().sum()) / (tokens * difference.shape[0])


class ModuleSensitivity(Metric):
    """Eq. 10 literally: each linear module on its own, from one Gram matrix for all configs."""

    name = "sensitivity_module"
    needs_calibration = True
    configs = LADDER

    def score_at_config(
        self, context: BlockContext, config: QuantConfig, quantized: dict[Matrix, Tensor]
    ) -> Iterator[Score]:
        """One score for each matrix."""
        for matrix, weight in quantized.items():
            difference = context.weight(matrix).float() - weight
            value = module_sensitivity(difference, *context.observations.grams[matrix])
            yield Score(matrix, self.name, config, value)


class PartSensitivity(Metric):
    """The authors' parts: weights quantized together, the output of their block compared."""

    name = "sensitivity"
    needs_calibration = True
    configs = LADDER

    def score_at_config(
        self, context: BlockContext, config: QuantConfig, quantized: dict[Matrix, Tensor]
    ) -> Iterator[Score]:
        """One score a part, shared by its matrices."""
        for part in context.parts:
            if any(m not in quantized for m in part.matrices):
                continue  # a group size that does not divide one of them
            value = _part_score(context, part, {m: quantized[m] for m in part.matrices})
            for matrix in part.matrices:
                yield Score(matrix, self.name, config, value, part.name)


def _part_score(context: BlockContext, part: Part, quantized: dict[Matrix, Tensor]) -> float:
    if part.linear:
        ((matrix, weight),) = quantized.items()
        difference = context.weight(matrix).float() - weight
        return module_sensitivity(difference, *context.observations.grams[matrix])
    replay = context.observations.replays[part.place]
    total, count = 0.0, 0
    with context.replaced_weights(quantized):
        for before, after in zip(replay.outputs, replay.run(), strict=True):
            total += squared_norm(after.float().sub_(before))
            count += before.numel()
    return total / count if count else float("nan")  # no token came through it
