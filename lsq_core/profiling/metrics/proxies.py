"""Fast stand-ins for the exact scores, for looking rather than for planning (method §8).

Both weigh the squared error of every single weight and leave out how errors act together:
the diagonal of the Gram matrix for a module's own output, the diagonal of the Fisher information
for the model's loss. Either costs the same however many configurations there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsq_core.bits import LADDER, QuantConfig
from lsq_core.model.architecture import locate_parameter, matrix_view, parameter_name
from lsq_core.model.info import Matrix
from lsq_core.profiling.context import BlockContext
from lsq_core.profiling.metrics.base import Metric, Score


class GramDiagonal(Metric):
    """``Σ_ij H_jj·ΔW_ij²/(T·d_out)``: module sensitivity if no two inputs were correlated.

    ``H_jj`` is the squared sum of input j over T tokens. NaN for an expert that none reached.
    """

    name = "gram_diagonal"
    needs_calibration = True
    configs = LADDER

    def score_at_config(
        self, context: BlockContext, config: QuantConfig, quantized: dict[Matrix, Tensor]
    ) -> Iterator[Score]:
        """One score for each matrix."""
        for matrix, weight in quantized.items():
            squares, tokens = context.second_moments[matrix]
            by_input = (context.weight(matrix).float() - weight).square_().sum(0)
            value = float(by_input.double() @ squares.double()) if tokens else math.nan
            yield Score(matrix, self.name, config, value / max(tokens * matrix.out_features, 1))


class DiagonalFisher(Metric):
    """``Σ_ij E[g_ij²]·ΔW_ij²``, ``g`` the gradient of a sequence's mean next-token loss.

    One forward and one backward pass for each calibration sequence by itself, since the squared
    mean of gradients is no Fisher information. NaN for an expert that no token reached.
    """

    name = "fisher_diagonal"
    needs_calibration = True
    needs_full_model = True
    configs = LADDER

    def __init__(self) -> None:
        self.squares: dict[str, Tensor] = {}

    def score_at_config(
        self, context: BlockContext, config: QuantConfig, quantized: dict[Matrix, Tensor]
    ) -> Iterator[Score]:
        """One score for each matrix; the first asks for the gradients of all of them."""
        model = context.loaded.model
        if not self.squares:
            names = dict.fromkeys(map(parameter_name, context.loaded.info.matrices))
            self.squares = mean_squared_gradients(model, names, context.ids)
        for matrix, weight in quantized.items():
            holder, _ = locate_parameter(model, matrix)
            squares = matrix_view(self.squares[parameter_name(matrix)], holder, matrix)
            change = (context.weight(matrix).float() - weight).square_().mul_(squares)
            value = float(change.sum(1).double().sum())
            unreached = matrix.expert is not None and not bool(squares.any())
            yield Score(matrix, self.name, config, math.nan if unreached else value)


def mean_squared_gradients(
    model: nn.Module, names: Iterable[str], ids: Tensor
) -> dict[str, Tensor]:
    """``E[g²]`` of these parameters over sequences (n, tokens), float32 in each one's shape.

    Squares are added up as each gradient is made, so that no two gradients are kept. The model
    is left as it was.
    """
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
