"""How much weight error in one matrix harms a model's predictions (α of method §5, after [E])."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lsq_core.bits import QuantConfig
from lsq_core.model.info import Matrix, ModelInfo
from lsq_core.profiling.metrics.base import Metric, Score
from lsq_core.profiling.metrics.weight_error import squared_distances

if TYPE_CHECKING:
    from torch import Tensor

    from lsq_core.profiling.context import BlockContext
    from lsq_core.profiling.kl import PredictionKl

#: The only configuration it is measured at: groups of 32 divide every matrix that can be planned,
#: and plans break down at two bits first. One is enough because KL is nearly linear in the squared
#: error: on the demo model the impact at 2.51 and 4.51 bits is, in the median, 1.01 and 1.00 times
#: that at 3.25.
LOSS_PROBE = QuantConfig(2, 32)
#: Tokens read from the start of each calibration block. Accuracy depends on the number of tokens,
#: not on the length of their context, so short sequences are the cheapest.
SEQUENCE_TOKENS = 128
#: Replaces a squared weight error of 0, for which the KL is 0 too.
_TINY = sys.float_info.min


class LossImpact(Metric):
    """KL to full precision per squared weight error, each matrix quantized alone.

    ``KL(full ‖ quantized)`` is in nats, the mean over the first 128 tokens of the first eight
    calibration blocks; the weight error is ``‖W − Ŵ‖_F`` at ``LOSS_PROBE``. With the relative
    error ``t² = ‖W − Ŵ‖²/‖W‖²`` the impact is ``α/‖W‖²``, so ``impact · weight_error²`` is method
    §5's ``α · t²``. Each matrix reruns the model from its own block on, about (matrices / 2) passes
    over those tokens in total; a large LM head costs little (:mod:`lsq_core.profiling.kl`).

    The score of an expert that no token reached, and that therefore changed no prediction, is NaN.
    """

    name = "loss_impact"
    title = "Loss impact"
    label = short = "loss impact"
    axis = "KL (nats per token) per ‖W − Ŵ‖²"
    meaning = (
        "How far the model's predictions move for each unit of squared weight error in one "
        "matrix, with everything else at full precision."
    )
    default = False
    needs_calibration = True
    splits_by_layer = True
    needs_full_model = True
    configs = (LOSS_PROBE,)
    #: 1,024 tokens. On SmolLM2, halving them changes a matrix's impact by 5 % in the median, and
    #: the perplexity of a plan at 3.2 bits, where errors interact, by a tenth.
    sequences = 8
    definition = (
        f"the first {SEQUENCE_TOKENS} tokens of each of {sequences} calibration blocks; of a large "
        "vocabulary 64 tokens drawn at each position"
    )

    _reference: PredictionKl

    def effort(self, layer: int, layers: int) -> int:
        """Return the number of blocks to rerun, plus one for the LM head."""
        return layers - layer + 1

    @classmethod
    def cost_note(cls, info: ModelInfo, block_tokens: int) -> str:
        """Return a sentence with the number of model passes and the maximum number of tokens."""
        passes = sum(info.layers - matrix.layer for matrix in info.matrices) / info.layers
        tokens = cls.sequences * min(block_tokens, SEQUENCE_TOKENS)
        return (
            f"The {cls.label} runs the model again from each of {len(info.matrices):,} matrices "
            f"on: {passes:,.0f} passes over at most {tokens:,} tokens."
        )

    def prepare(self, context: BlockContext) -> None:
        """Compute the full-precision predictions."""
        from lsq_core.profiling.kl import make_prediction_kl

        self._reference = make_prediction_kl(context, self.sequences, SEQUENCE_TOKENS)

    def score_at_config(
        self, context: BlockContext, config: QuantConfig, quantized: dict[Matrix, Tensor]
    ) -> Iterator[Score]:
        """Yield one score for each matrix."""
        hidden = self._reference.batched(context.hidden)
        # Rounding alone can make it nonzero: batches differ from those of full precision.
        experts = any(matrix.expert is not None for matrix in quantized)
        unchanged = self._reference.divergence(context.layer, hidden) if experts else None
        for matrix, weight in quantized.items():
            error = squared_distances(weight[None], context.weight(matrix))[0]
            with context.replaced_weights({matrix: weight}):
                divergence = self._reference.divergence(context.layer, hidden)
            value = divergence / error.clamp_min(_TINY)
            if matrix.expert is not None:
                value = value.where(divergence != unchanged, math.nan)
            yield Score(matrix, self.name, None, value)
