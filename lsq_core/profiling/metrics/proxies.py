"""Fast proxies of the exact scores, for exploration rather than planning (method §8).

Both sum the squared errors of individual weights and ignore interactions between them. The factors
are the diagonal of the Gram matrix for a module's own output, and the diagonal of the Fisher
information for the model's loss. The cost hardly depends on the number of configurations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from lsq_core.bits import EXTENDED_LADDER, QuantConfig
from lsq_core.model.info import Matrix
from lsq_core.profiling.metrics.base import Metric, Score

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lsq_core.profiling.context import BlockContext


class GramDiagonal(Metric):
    """``Σ_ij H_jj·ΔW_ij²/(T·d_out)``: module sensitivity if the inputs were uncorrelated.

    ``H_jj`` is the sum of squares of input j over T tokens. NaN for an expert that no token
    reached.
    """

    name = "gram_diagonal"
    title = "Gram diagonal (proxy)"
    label = short = "Gram diagonal"
    axis = "mean squared output change"
    meaning = "Sensitivity by module if a module's inputs were uncorrelated."
    log_scale = True
    default = False
    proxy_of = "sensitivity_module"
    needs_calibration = True
    configs = EXTENDED_LADDER
    by_config = True

    def score_at_config(
        self, context: BlockContext, config: QuantConfig, quantized: dict[Matrix, Tensor]
    ) -> Iterator[Score]:
        """Yield one score for each matrix."""
        for matrix, weight in quantized.items():
            squares, tokens = context.second_moments[matrix]
            by_input = (context.weight(matrix).float() - weight).square_().sum(0)
            value = by_input.double() @ squares.double() if tokens else math.nan
            yield Score(matrix, self.name, config, value / max(tokens * matrix.out_features, 1))


class DiagonalFisher(Metric):
    """``Σ_ij E[g_ij²]·ΔW_ij²``, where ``g`` is the gradient of a sequence's mean next-token loss.

    Takes one forward and one backward pass per calibration sequence, since the square of a mean
    gradient is not the Fisher information. NaN for an expert that no token reached.
    """

    name = "fisher_diagonal"
    title = "Diagonal Fisher (proxy)"
    label = short = "diagonal Fisher"
    axis = "Σ E[g²]·ΔW²"
    meaning = "Squared weight error, with each weight scaled by its squared loss gradient."
    log_scale = True
    default = False
    proxy_of = "sensitivity_module"
    needs_calibration = True
    needs_full_model = True
    configs = EXTENDED_LADDER
    by_config = True

    def __init__(self) -> None:
        self.squares: dict[str, Tensor] = {}

    def score_at_config(
        self, context: BlockContext, config: QuantConfig, quantized: dict[Matrix, Tensor]
    ) -> Iterator[Score]:
        """Yield one score for each matrix; the first call computes all gradients."""
        from lsq_core.model.architecture import locate_parameter, matrix_view, parameter_name

        model = context.loaded.model
        if not self.squares:
            names = dict.fromkeys(map(parameter_name, context.loaded.info.matrices))
            self.squares = mean_squared_gradients(model, names, context.ids)
        for matrix, weight in quantized.items():
            holder, _ = locate_parameter(model, matrix)
            squares = matrix_view(self.squares[parameter_name(matrix)], holder, matrix)
            change = (context.weight(matrix).float() - weight).square_().mul_(squares)
            value = change.sum(1).double().sum()
            if matrix.expert is not None:
                value = value.where(squares.any(), math.nan)
            yield Score(matrix, self.name, config, value)


def mean_squared_gradients(
    model: nn.Module, names: Iterable[str], ids: Tensor
) -> dict[str, Tensor]:
    """Return ``E[g²]`` of parameters over sequences (n, tokens), float32 in the parameter's shape.

    Each gradient is squared, added and freed as soon as it is computed, so only one is in memory at
    a time. The model is not changed.
    """
    import torch
    from torch.nn import functional as F

    parameters = {name: model.get_parameter(name) for name in names}
    with torch.inference_mode(False), torch.enable_grad():
        sums = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}

        def add(name: str, parameter: Tensor) -> None:
            gradient = parameter.grad.float()
            sums[name].addcmul_(gradient, gradient, value=1 / len(ids))
            parameter.grad = None

        handles = []
        try:
            for name, parameter in parameters.items():
                parameter.requires_grad_(True)
                handles.append(
                    parameter.register_post_accumulate_grad_hook(lambda p, n=name: add(n, p))
                )
            for sequence in ids.clone():
                logits = model(sequence[None], use_cache=False).logits[0, :-1]
                F.cross_entropy(logits.float(), sequence[1:]).backward()
        finally:
            for handle in handles:
                handle.remove()
            for parameter in parameters.values():
                parameter.requires_grad_(False)
    return sums
