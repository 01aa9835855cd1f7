"""The KL divergence to full precision near a quantized model, to second order.

With the weights of a plan, ``KL(p ‖ q)`` changes by ``⟨g, Δ⟩ + ½·E⟨h, Δ⟩²`` when a matrix changes
by ``Δ``: ``g`` is the gradient of the divergence itself, ``h`` that of the loss of labels drawn
from the quantized model's predictions ``q``, whose second moment is the curvature (Gauss–Newton;
see :mod:`lsq_core.profiling.backward`). About full precision ``g`` is zero, and this is
:class:`lsq_core.profiling.metrics.expected_kl.ExpectedKl`; about a plan ``g`` holds what every
other quantized matrix does to this one, which a sum of independent costs can't see.
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

#: Labels drawn for each position; each costs as much as the gradient of the divergence. With one
#: alone the curvature is so uncertain that exchanges which chance favours are chosen.
DRAWS = 2


@dataclass(frozen=True, eq=False)
class Expansion:
    """The change of the divergence with each configuration of each matrix, in nats per token.

    ``change`` and its standard ``error``, from one calibration sequence to another, are
    (n, options) in the orders of the model's matrices and of the options: 0 at the plan's own
    configuration, NaN where a matrix can't get an option or nothing is known, as of experts that no
    token reached. ``kl`` is the divergence of the plan itself, on the same tokens.
    """

    change: np.ndarray
    error: np.ndarray
    kl: float


@dataclass(frozen=True, eq=False)
class Expander:
    """Expands the divergence about any plan of a model, on the same sequences.

    Parameters
    ----------
    full
        Full precision's way through the blocks.
    options
        The configurations, from few bits to many.
    allowed
        Which of them each matrix can get, bool (n, options) in the order of the model's matrices.
    cache
        Quantized matrices, kept from one expansion to the next as far as it has room.
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
        """Run full precision on sequences, int64 (n, tokens); its final states alone are kept."""
        with torch.no_grad():
            full = run_forward(loaded, sequences)
        full.inputs[:] = full.inputs[-1:]
        return cls(full, options, allowed, quantizer, grid, cache)

    @torch.no_grad()
    def expand(
        self, choice: Mapping[Matrix, QuantConfig], progress: Progress = no_progress
    ) -> Expansion:
        """Return the expansion about a choice; ``progress`` counts the blocks of both ways.

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
        """Return the change of the summed divergence, and its standard error, by option."""
        present = {m: self._quantized(context, m, choice[m]) for m in context.matrices}
        changes = {m: self._changes(context, m, weight) for m, weight in present.items()}
        with context.replaced_weights(present):
            products = context.change_products(changes)
        return {m: self._rows(m, choice[m], products[m].numpy()) for m in present}

    @cached_property
    def _allowed_options(self) -> dict[Matrix, list[int]]:
        """The indices of the options that each matrix can get."""
        matrices = self.full.loaded.info.matrices
        return {
            m: np.flatnonzero(row).tolist() for m, row in zip(matrices, self.allowed, strict=True)
        }

    def _changes(self, context: GradientContext, matrix: Matrix, present: Tensor) -> Tensor:
        """Return the changes (allowed options, weights) from the present weights."""
        dtype = context.weight(matrix).dtype
        others = (
            self._quantized(context, matrix, self.options[k]) for k in self._allowed_options[matrix]
        )
        return torch.stack([(other - present).to(dtype).flatten() for other in others])

    def _rows(
        self, matrix: Matrix, present: QuantConfig, products: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the change (options,) over all sequences and its standard error.

        ``products`` are (sequences, losses, allowed options). An expert that no token reached has
        none but zeros, and NaN here.
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
    """A sequence's KL divergence from full precision, then the losses of drawn labels."""

    def __init__(self, full: ForwardPass) -> None:
        self.full, self.labels = full, SampledLabels(DRAWS)
        #: The sum over all positions so far.
        self.divergence = 0.0

    def __call__(self, number: int, log_probs: Tensor) -> list[Tensor]:
        """See :data:`lsq_core.profiling.backward.Losses`."""
        with torch.no_grad():
            target = self.full.log_probs(number, self.full.inputs[-1][number])
        divergence = (target.exp() * (target - log_probs)).sum()
        self.divergence += float(divergence.detach())
        return [divergence, *self.labels(number, log_probs)]
