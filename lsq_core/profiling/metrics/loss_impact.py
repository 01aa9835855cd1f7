"""How much a model's predictions suffer from error in one matrix (α of method §5, after [E])."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lsq_core.bits import QuantConfig
from lsq_core.model.info import Matrix
from lsq_core.profiling.metrics.base import Metric, Score
from lsq_core.profiling.metrics.weight_error import squared_norm

if TYPE_CHECKING:
    from torch import Tensor

    from lsq_core.profiling.context import BlockContext

#: The one configuration it is measured at: groups of 32 fill every matrix that can be planned,
#: and a budget fails at two bits first. One suffices, as KL is close to linear in the squared
#: error: on the demo model the impact at 2.51 and 4.51 bits is 1.01 and 1.00 times that at 3.25 in
#: the median.
LOSS_PROBE = QuantConfig(2, 32)
#: Most logits computed at once (a count); it limits how many sequences form a batch.
_MAX_BATCH_LOGITS = 2**25
#: Replaces a squared weight error of 0, which changes no prediction either.
_TINY = sys.float_info.min


class LossImpact(Metric):
    """KL to full precision per squared weight error, each matrix quantized alone.

    ``KL(full ‖ quantized)`` is in nats, the mean over the tokens of the first calibration blocks;
    the weight error is ``‖W − Ŵ‖_F`` at the probe. With the relative error
    ``t² = ‖W − Ŵ‖²/‖W‖²`` it is ``α/‖W‖²``, so that ``impact · weight_error²`` is method §5's
    ``α · t²``. For each matrix the blocks from its own on are run again, so that it costs about
    (matrices / 2) passes of the model over those tokens.

    The score of an expert that no token reached, so that it changed no prediction, is NaN.
    """

    name = "loss_impact"
    title = "Loss impact"
    label = short = "loss impact"
    axis = "KL (nats per token) per ‖W − Ŵ‖²"
    meaning = (
        "How far the model's predictions move for each unit of squared weight error in one "
        "matrix, all else at full precision."
    )
    default = False
    needs_calibration = True
    needs_full_model = True
    configs = (LOSS_PROBE,)
    #: 4,096 tokens; two disjoint halves of them rank the demo model's matrices alike (Spearman
    #: 0.99).
    sequences = 8

    def effort(self, layer: int, layers: int) -> int:
        """Return the number of blocks that are run again, plus one for the LM head."""
        return layers - layer + 1

    def score_at_config(
        self, context: BlockContext, config: QuantConfig, quantized: dict[Matrix, Tensor]
    ) -> Iterator[Score]:
        """Yield one score for each matrix."""
        tail = _model_tail(context, self.sequences)
        for matrix, weight in quantized.items():
            error = squared_norm(context.weight(matrix).float() - weight)
            with context.replaced_weights({matrix: weight}):
                divergence = tail.divergence()
            unreached = divergence == 0 and matrix.expert is not None
            value = math.nan if unreached else divergence / max(error, _TINY)
            yield Score(matrix, self.name, None, value)


def _model_tail(context: BlockContext, sequences: int) -> _ModelTail:
    """Return the rest of the model, cached in the context of the block at which it begins."""
    if LossImpact.name not in context.cache:
        context.cache[LossImpact.name] = _ModelTail(context, sequences)
    return context.cache[LossImpact.name]


class _ModelTail:
    """Runs the model from one block on and compares its predictions with the original ones."""

    def __init__(self, context: BlockContext, sequences: int) -> None:
        import torch

        from lsq_core.model.walk import detect_output_forms
        from lsq_core.profiling.block import BATCH

        self.loaded, self.layer = context.loaded, context.layer
        ids = context.ids[:sequences]
        hidden = torch.cat(context.hidden[: -(-len(ids) // BATCH)])[: len(ids)]
        vocabulary = self.loaded.model.config.get_text_config().vocab_size
        rows = max(1, min(BATCH, _MAX_BATCH_LOGITS // (ids.shape[1] * vocabulary)))
        self.tokens = ids.numel()
        #: Tokens and the hidden states that enter the block, a batch of sequences each.
        self.batches = list(zip(ids.split(rows), hidden.split(rows), strict=True))
        self.forms = detect_output_forms(self.loaded, ids)
        #: Hidden states that leave the last block; logits take far more memory and are recomputed.
        self.last: list[Tensor] = []
        handle = self.loaded.blocks[-1].register_forward_hook(
            lambda module, args, output: self.last.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        try:
            for ids, hidden in self.batches:
                self._log_probabilities(self.layer, ids, hidden)
        finally:
            handle.remove()

    def divergence(self) -> float:
        """Return the mean KL (nats per token) from the original to the present predictions."""
        total, end = 0.0, len(self.loaded.blocks)
        for (ids, hidden), last in zip(self.batches, self.last, strict=True):
            expected = self._log_probabilities(end, ids, last)
            total += kl_sum(expected, self._log_probabilities(self.layer, ids, hidden))
        return total / self.tokens

    def _log_probabilities(self, layer: int, ids: Tensor, hidden: Tensor) -> Tensor:
        from lsq_core.model.walk import run_from_block

        logits = run_from_block(self.loaded, layer, hidden, ids, self.forms)
        return logits.float().log_softmax(-1)


def kl_sum(expected: Tensor, found: Tensor) -> float:
    """Return ``Σ KL(p ‖ q)`` in nats over all tokens, from log-probabilities (…, vocabulary).

    Computed as ``Σ p·(e^d − 1 − d)`` with ``d = log q − log p``, which has no negative term; in
    ``Σ −p·d`` the first order cancels and rounding error hides a small divergence.
    """
    import torch

    change = found - expected
    terms = expected.exp() * (torch.expm1(change) - change)
    return float(terms.sum(-1).double().sum())
