"""How far each configuration of a matrix is expected to move the model's predictions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lsq_core.bits import EXTENDED_LADDER, QuantConfig
from lsq_core.model.info import Matrix
from lsq_core.profiling.metrics.base import Metric, Score

if TYPE_CHECKING:
    from torch import Tensor

    from lsq_core.profiling.backward import GradientContext

_CHANGES = "weight changes"


class ExpectedKl(Metric):
    """KL to full precision, nats per token, to second order: ``½·E[⟨g, Ŵ_c − W⟩²]`` per token.

    ``g`` is the gradient of a sequence's loss under labels drawn from the model's own predictions.
    Its second moment is the Fisher information (:mod:`lsq_core.profiling.backward`), used here in
    full rather than as a diagonal. One forward and one backward walk give the estimate at every
    configuration, whereas :class:`~lsq_core.profiling.metrics.loss_impact.LossImpact` reruns half
    the model for each matrix.

    On SmolLM2-135M (WikiText-2, 4,096 tokens) the sum over all matrices at 2.51 bits is 7.26,
    compared with 7.27 for the loss impact. For 27 plans whose perplexity is 1.07 to 3 times that of
    full precision, the measured KL is 0.59 to 1.20 times the plan's sum. Beyond 1 nat the
    second-order estimate falls short.

    The score of an expert that no token reached is NaN.
    """

    name = "expected_kl"
    title = "Expected KL divergence"
    label = short = "expected KL"
    axis = "KL (nats per token)"
    meaning = (
        "How far the model's predictions are expected to move when one matrix alone is quantized, "
        "from gradients."
    )
    log_scale = True
    default = False
    needs_calibration = True
    needs_gradients = True
    configs = EXTENDED_LADDER
    by_config = True
    #: Enough for :func:`lsq_core.profiling.backward.cut_sequences`, however short the blocks are.
    sequences = 32

    def score_at_config(
        self, context: GradientContext, config: QuantConfig, quantized: dict[Matrix, Tensor]
    ) -> Iterator[Score]:
        """Store the weight changes; :meth:`score_block` computes the scores."""
        changes = context.cache.setdefault(_CHANGES, {})
        for matrix, weight in quantized.items():
            original = context.weight(matrix)
            change = (weight - original.float()).to(original.dtype)
            changes.setdefault(matrix, {})[config] = change.flatten()
        return iter(())

    def score_block(self, context: GradientContext) -> Iterator[Score]:
        """Yield one score for each matrix and configuration."""
        samples = len(context.hidden) * len(context.gradients[0])
        per_token = 0.5 * len(context.hidden) / (context.tokens * samples)
        for matrix, configs, products in self.products(context):
            unreached = matrix.expert is not None and not bool(products.any())
            sums = products.square().sum(dim=(0, 1)) * per_token
            values = [math.nan] * len(configs) if unreached else sums.tolist()
            for config, value in zip(configs, values, strict=True):
                yield Score(matrix, self.name, config, value)

    def products(
        self, context: GradientContext
    ) -> Iterator[tuple[Matrix, tuple[QuantConfig, ...], Tensor]]:
        """Yield each matrix's ``⟨g, Ŵ_c − W⟩``, float64 (sequences, draws, configurations)."""
        import torch

        changes = {
            matrix: (tuple(by_config), torch.stack(list(by_config.values())))
            for matrix, by_config in context.cache.pop(_CHANGES, {}).items()
        }
        products = context.change_products({m: change for m, (_, change) in changes.items()})
        for matrix, (configs, _) in changes.items():
            yield matrix, configs, products[matrix]
