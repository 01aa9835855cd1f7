"""How much a model's predictions suffer from error in one matrix (α of method §5, after [E])."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from lsq_core.bits import QuantConfig
from lsq_core.model.info import Matrix, ModelInfo
from lsq_core.profiling.metrics.base import Metric, Score
from lsq_core.profiling.metrics.weight_error import squared_distances

if TYPE_CHECKING:
    from torch import Tensor

    from lsq_core.profiling.context import BlockContext

#: The one configuration it is measured at: groups of 32 fill every matrix that can be planned,
#: and a budget fails at two bits first. One suffices, as KL is close to linear in the squared
#: error: on the demo model the impact at 2.51 and 4.51 bits is 1.01 and 1.00 times that at 3.25 in
#: the median.
LOSS_PROBE = QuantConfig(2, 32)
#: Tokens of a calibration block that are read, from its start: as their number counts, not what
#: stands before them, short sequences are the cheapest.
SEQUENCE_TOKENS = 128
#: Most logits computed at once (a count); it limits how many sequences form a batch.
_MAX_BATCH_LOGITS = 2**25
#: Most log-probabilities of full precision that are kept, 512 MiB of them.
_MAX_KEPT_LOGITS = 2**27
#: Logits compared at once, few enough for a processor's cache.
_CHUNK_LOGITS = 2**19
#: Replaces a squared weight error of 0, which changes no prediction either.
_TINY = sys.float_info.min


class LossImpact(Metric):
    """KL to full precision per squared weight error, each matrix quantized alone.

    ``KL(full ‖ quantized)`` is in nats, the mean over the first 128 tokens of the first eight
    calibration blocks; the weight error is ``‖W − Ŵ‖_F`` at the probe. With the relative error
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
    #: 1,024 tokens. On SmolLM2 half of them move the impact of a matrix by 5 % in the median, and
    #: the perplexity of a plan at 3.2 bits, where errors act on one another, by a tenth.
    sequences = 8
    definition = f"the first {SEQUENCE_TOKENS} tokens of each of {sequences} calibration blocks"

    def __init__(self) -> None:
        self._reference: _Reference | None = None

    def effort(self, layer: int, layers: int) -> int:
        """Return the number of blocks that are run again, plus one for the LM head."""
        return layers - layer + 1

    @classmethod
    def cost_note(cls, info: ModelInfo, block_tokens: int) -> str:
        """Return how often the model is run, and over how many tokens at most."""
        passes = sum(info.layers - matrix.layer for matrix in info.matrices) / info.layers
        tokens = cls.sequences * min(block_tokens, SEQUENCE_TOKENS)
        return (
            f"The {cls.label} runs the model again from each of {len(info.matrices):,} matrices "
            f"on: {passes:,.0f} passes over at most {tokens:,} tokens."
        )

    def score_at_config(
        self, context: BlockContext, config: QuantConfig, quantized: dict[Matrix, Tensor]
    ) -> Iterator[Score]:
        """Yield one score for each matrix."""
        if self._reference is None:
            self._reference = _Reference(context, self.sequences)
        hidden = self._reference.batched(context.hidden)
        for matrix, weight in quantized.items():
            error = squared_distances(weight[None], context.weight(matrix))[0]
            with context.replaced_weights({matrix: weight}):
                divergence = self._reference.divergence(context.layer, hidden)
            value = divergence / error.clamp_min(_TINY)
            if matrix.expert is not None:
                value = value.where(divergence != 0, math.nan)
            yield Score(matrix, self.name, None, value)


class _Reference:
    """Full precision's predictions for a profile's first sequences, computed once.

    Their log-probabilities are kept where they are few enough; otherwise the hidden states that
    leave the last block are, and the LM head runs on them again for each comparison.
    """

    def __init__(self, context: BlockContext, sequences: int) -> None:
        from lsq_core.model.walk import detect_output_forms
        from lsq_core.profiling.block import BATCH

        self.loaded = context.loaded
        ids = context.ids[:sequences, :SEQUENCE_TOKENS]
        vocabulary = self.loaded.model.config.get_text_config().vocab_size
        rows = max(1, min(BATCH, _MAX_BATCH_LOGITS // (ids.shape[1] * vocabulary)))
        self.tokens, self.ids = ids.numel(), ids.split(rows)
        self.forms = detect_output_forms(self.loaded, ids)
        #: Hidden states that leave the last block, a batch each.
        self.last = self._last_states(context)
        self.kept = None
        if self.tokens * vocabulary <= _MAX_KEPT_LOGITS:
            self.kept = [self._expected(batch) for batch in range(len(self.ids))]

    def batched(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Return hidden states, which come in a profile's batches, in those of the sequences."""
        import torch

        count = sum(map(len, self.ids))
        first = torch.cat([*islice(hidden, -(-count // len(hidden[0])))])[:count]
        return list(first[:, : self.ids[0].shape[1]].split(len(self.ids[0])))

    def divergence(self, layer: int, hidden: Sequence[Tensor]) -> Tensor:
        """Return the mean KL (nats per token) from full precision to the present predictions.

        ``hidden`` are the inputs of block ``layer``, as :meth:`batched` gives them.
        """
        total = 0
        for batch, states in enumerate(hidden):
            expected = self._expected(batch) if self.kept is None else self.kept[batch]
            total += _kl_to_logits(expected, self._logits(layer, batch, states))
        return total / self.tokens

    def _last_states(self, context: BlockContext) -> list[Tensor]:
        from lsq_core.model.architecture import first_tensor

        last: list[Tensor] = []
        handle = self.loaded.blocks[-1].register_forward_hook(
            lambda module, args, output: last.append(first_tensor(output))
        )
        try:
            for batch, states in enumerate(self.batched(context.hidden)):
                self._logits(context.layer, batch, states)
        finally:
            handle.remove()
        return last

    def _expected(self, batch: int) -> Tensor:
        logits = self._logits(len(self.loaded.blocks), batch, self.last[batch])
        return logits.float().log_softmax(-1)

    def _logits(self, layer: int, batch: int, hidden: Tensor) -> Tensor:
        from lsq_core.model.walk import run_from_block

        return run_from_block(self.loaded, layer, hidden, self.ids[batch], self.forms)


def _kl_to_logits(expected: Tensor, logits: Tensor) -> Tensor:
    """Return ``Σ KL(p ‖ q)`` from log-probabilities and logits (sequences, tokens, vocabulary)."""
    rows = max(1, _CHUNK_LOGITS // logits.shape[-1])
    pairs = zip(expected.flatten(0, 1).split(rows), logits.flatten(0, 1).split(rows), strict=True)
    return sum(kl_sum(own, other.float().log_softmax(-1)) for own, other in pairs)


def kl_sum(expected: Tensor, found: Tensor) -> Tensor:
    """Return ``Σ KL(p ‖ q)`` in nats over all tokens, from log-probabilities (…, vocabulary).

    Computed as ``Σ p·(e^d − 1 − d)`` with ``d = log q − log p``, which has no negative term; in
    ``Σ −p·d`` the first order cancels and rounding error hides a small divergence.
    """
    import torch

    change = found - expected
    terms = torch.expm1(change).sub_(change).mul_(expected.exp())
    return terms.sum(-1).double().sum()
