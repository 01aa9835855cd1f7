"""Second-order expansion of the KL divergence from full precision around a quantized model.

At the weights of a plan, ``KL(p ‖ q)`` changes by ``⟨g, Δ⟩ + ½·E⟨h, Δ⟩²`` when a matrix changes
by ``Δ``. Here ``g`` is the gradient of the divergence, and ``h`` the gradient of the loss on labels
drawn from the quantized model's predictions ``q``; the second moment of ``h`` is the curvature
(Gauss–Newton; see :mod:`lsq_core.profiling.backward`). At full precision ``g`` is zero, which
leaves :class:`lsq_core.profiling.metrics.expected_kl.ExpectedKl`. At a plan, ``g`` includes the
effect of all other quantized matrices, which a sum of independent costs misses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lsq_core.bits import QuantConfig
from lsq_core.model.info import Matrix
from lsq_core.model.loading import LoadedModel
from lsq_core.profiling.backward import (
    ForwardPass,
    GradientContext,
    SampledLabels,
    iter_gradients,
    run_forward,
)
from lsq_core.profiling.context import BlockContext
from lsq_core.progress import Progress, no_progress
from lsq_core.quantization.base import MatrixQuantizer
from lsq_core.quantization.cache import PackedMatrixCache
from lsq_core.quantized.convert import quantize_matrix
from lsq_core.settings import GridSettings

#: Labels drawn for each position; each draw costs as much as the gradient of the divergence. With
#: a single draw the curvature is so noisy that exchanges are chosen by chance.
DRAWS = 2


@dataclass(frozen=True, eq=False)
class Expansion:
    """Estimated change of the divergence for each configuration of each matrix, in nats per token.

    ``change`` and its standard ``error``, estimated across calibration sequences, are (n, options)
    in the order of the model's matrices and of the options. They are 0 at the plan's own
    configuration, and NaN where a matrix can't get an option or, as for experts that no token
    reached, no estimate exists. ``kl`` is the divergence of the plan itself on the same tokens.
    """

    change: np.ndarray
    error: np.ndarray
    kl: float


@dataclass(frozen=True, eq=False)
class Expander:
    """Expands the divergence around any plan of a model, always on the same sequences.

    Parameters
    ----------
    full
        The forward pass at full precision.
    options
        The configurations, from few bits to many.
    allowed
        Whether a matrix can get an option, bool (n, options) in the order of the model's matrices.
    cache
        Cache of quantized matrices, reused across expansions.
    """

    full: ForwardPass
    options: Sequence[QuantConfig]
    allowed: np.ndarray
    quantizer: MatrixQuantizer
    grid: GridSettings
    cache: PackedMatrixCache

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        sequences: Tensor,
        options: Sequence[QuantConfig],
        allowed: np.ndarray,
        quantizer: MatrixQuantizer,
        grid: GridSettings,
        cache: PackedMatrixCache,
    ) -> Expander:
        """Run sequences, int64 (n, tokens), at full precision and keep only the final states."""
        with torch.no_grad():
            full = run_forward(loaded, sequences)
        full.inputs[:] = full.inputs[-1:]
        return cls(full, options, allowed, quantizer, grid, cache)

    @torch.no_grad()
    def expand(
        self, choice: Mapping[Matrix, QuantConfig], progress: Progress = no_progress
    ) -> Expansion:
        """Return the expansion around a choice; ``progress`` counts forward and backward blocks.

        Raises
        ------
        NotSequential
            If the model's blocks can't be run one by one.
        LsqError
            If a weight is not finite.
        """
        loaded = self.full.loaded
        layers, done = len(loaded.blocks), 0

        def quantized(context: BlockContext) -> dict[Matrix, Tensor]:
            nonlocal done
            progress(done, 2 * layers, f"quantized layer {context.layer + 1} of {layers}")
            done += 1
            return {m: self._quantized(context, m, choice[m]) for m in context.matrices}

        forward = run_forward(loaded, self.full.sequences, quantized)
        losses = _DivergenceAndLabels(self.full)
        rows: dict[Matrix, tuple[np.ndarray, np.ndarray]] = {}
        for context in iter_gradients(forward, losses):
            progress(done, 2 * layers, f"gradients of layer {context.layer + 1} of {layers}")
            done += 1
            rows |= self._expand_block(context, choice)
        progress(2 * layers, 2 * layers, "expanded")
        tokens = self.full.sequences.numel()
        change, error = zip(*(rows[m] for m in loaded.info.matrices), strict=True)
        kl = losses.divergence / tokens
        return Expansion(np.stack(change) / tokens, np.stack(error) / tokens, kl)

    def _quantized(self, context: BlockContext, matrix: Matrix, config: QuantConfig) -> Tensor:
        stored = quantize_matrix(
            context.weight(matrix), matrix, config, self.quantizer, self.grid, self.cache
        )
        return stored.dequantize()

    def _expand_block(
        self, context: GradientContext, choice: Mapping[Matrix, QuantConfig]
    ) -> dict[Matrix, tuple[np.ndarray, np.ndarray]]:
        """Return the change of the summed divergence and its standard error, by option."""
        present = {m: self._quantized(context, m, choice[m]) for m in context.matrices}
        changes = {m: self._changes(context, m, weight) for m, weight in present.items()}
        with context.replaced_weights(present):
            products = context.change_products(changes)
        return {m: self._rows(m, choice[m], products[m].numpy()) for m in present}

    @cached_property
    def _allowed_options(self) -> dict[Matrix, list[int]]:
        """The indices of the options allowed for each matrix."""
        matrices = self.full.loaded.info.matrices
        return {
            m: np.flatnonzero(row).tolist() for m, row in zip(matrices, self.allowed, strict=True)
        }

    def _changes(self, context: GradientContext, matrix: Matrix, present: Tensor) -> Tensor:
        """Return the weight changes (allowed options, weights) relative to the present weights."""
        dtype = context.weight(matrix).dtype
        others = (
            self._quantized(context, matrix, self.options[k]) for k in self._allowed_options[matrix]
        )
        return torch.stack([(other - present).to(dtype).flatten() for other in others])

    def _rows(
        self, matrix: Matrix, present: QuantConfig, products: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the change (options,) summed over all sequences, and its standard error.

        ``products`` is (sequences, losses, allowed options). An expert that no token reached has
        only zeros there and gets NaN except at its present configuration. With a single sequence,
        the magnitude of the change serves as its error.
        """
        rows = np.full((2, len(self.options)), np.nan)
        if matrix.expert is None or products.any():
            by_sequence = products[:, 0] + 0.5 * np.square(products[:, 1:]).mean(axis=1)
            spread = by_sequence.std(axis=0, ddof=1) if len(by_sequence) > 1 else by_sequence[0]
            error = np.abs(spread) * np.sqrt(len(by_sequence))
            rows[:, self._allowed_options[matrix]] = by_sequence.sum(axis=0), error
        rows[:, list(self.options).index(present)] = 0.0
        return rows[0], rows[1]


class _DivergenceAndLabels:
    """Losses of a sequence: its KL divergence from full precision, then those of sampled labels."""

    def __init__(self, full: ForwardPass) -> None:
        self.full, self.labels = full, SampledLabels(DRAWS)
        #: The divergence summed over all positions so far.
        self.divergence = 0.0

    def __call__(self, number: int, log_probs: Tensor) -> list[Tensor]:
        """Return the losses; see :data:`lsq_core.profiling.backward.Losses`."""
        with torch.no_grad():
            target = self.full.log_probs(number, self.full.inputs[-1][number])
        divergence = (target.exp() * (target - log_probs)).sum()
        self.divergence += float(divergence.detach())
        return [divergence, *self.labels(number, log_probs)]
