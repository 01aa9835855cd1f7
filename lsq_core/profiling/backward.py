"""A walk over the blocks from the last to the first, with the gradients of a sampled loss.

The loss of a sequence is the sum of ``−log p(y)`` over its positions, each ``y`` drawn from the
model's own prediction ``p``. Its gradients have mean zero and, as draws are independent, their
covariance is the Fisher information summed over the positions, the curvature of the KL divergence
from the model's predictions. (Labels of the text itself would give the "empirical Fisher", which is
not that curvature: Kunstner et al., arXiv 1905.12558.)

Hidden states between blocks are stored, one block is run again at a time, and its inputs'
gradients go on to the block before it, so that weights may be streamed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lsq_core.model.architecture import first_tensor, locate_parameter, matrix_view, parameter_name
from lsq_core.model.info import Matrix
from lsq_core.model.loading import LoadedModel
from lsq_core.model.walk import OutputForm, detect_output_forms, record_calls, run_from_block
from lsq_core.profiling.context import BlockContext

#: Tokens of a sequence, whose gradient is one sample: short, so that there are many.
SEQUENCE_TOKENS = 128
#: Most sequences that are read: 4,096 tokens in all.
MAX_SEQUENCES = 32
#: Labels drawn for each position of a sequence, each a sample. With 128 samples the standard error
#: of an expected square is an eighth of it.
DRAWS = 4
_SEED = 0


@dataclass(eq=False)
class GradientContext(BlockContext):
    """A block with its inputs, one sequence a batch, and the gradients of its outputs."""

    #: By sequence, the gradients (draws, 1, tokens, width) of the block's output; replaced by
    #: those of its input when :meth:`weight_gradients` has run.
    gradients: list[Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """The number of positions whose predictions the losses are of."""
        return self.ids.numel()

    def weight_gradients(self) -> Iterator[dict[Matrix, Tensor]]:
        """Yield the gradients (draws, out, in) of the block's matrices, a sequence at a time.

        A matrix without one, as an expert that no token reached, is missing.
        """
        parameters = {parameter_name(m): self._parameter(m) for m in self.matrices}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        try:
            for number in range(len(self.hidden)):
                found = self._sequence_gradients(number, list(parameters.values()))
                by_name = dict(zip(parameters, zip(*found, strict=True), strict=True))
                yield {
                    matrix: torch.stack([self._view(g, matrix) for g in by_name[name]])
                    for matrix in self.matrices
                    if (name := parameter_name(matrix)) and by_name[name][0] is not None
                }
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)

    def _sequence_gradients(
        self, number: int, parameters: list[Tensor]
    ) -> list[tuple[Tensor | None, ...]]:
        """Return each draw's gradients of the parameters; the input's replace the output's."""
        call, draws = self.calls[number], self.gradients[number]
        with torch.enable_grad():
            hidden = self.hidden[number].detach().clone().requires_grad_(True)
            output = first_tensor(self.block(hidden, *call.args, **call.kwargs))
            found = [
                torch.autograd.grad(
                    output, [hidden, *parameters], draw, retain_graph=True, allow_unused=True
                )
                for draw in draws
            ]
        self.gradients[number] = torch.stack([of_input for of_input, *_ in found])
        return [tuple(of_parameters) for _, *of_parameters in found]

    def _parameter(self, matrix: Matrix) -> Tensor:
        holder, name = locate_parameter(self.loaded.model, matrix)
        return getattr(holder, name)

    def _view(self, gradient: Tensor, matrix: Matrix) -> Tensor:
        holder, _ = locate_parameter(self.loaded.model, matrix)
        return matrix_view(gradient, holder, matrix)


def cut_sequences(ids: Tensor) -> Tensor:
    """Cut calibration blocks (n, tokens) into sequences, int64 (at most 32, at most 128)."""
    length = min(SEQUENCE_TOKENS, ids.shape[1])
    pieces = [piece for piece in ids.split(length, dim=1) if piece.shape[1] == length]
    return torch.stack(pieces, dim=1).flatten(0, 1)[:MAX_SEQUENCES].clone()


def iter_blocks_backward(loaded: LoadedModel, ids: Tensor) -> Iterator[GradientContext]:
    """Yield each block with matrices, the last one first; the consumer of each has to run
    :meth:`GradientContext.weight_gradients`, which computes the gradients for the one before it.

    ``ids`` are calibration blocks, int64 (n, tokens). Gradients need tensors that were not made in
    inference mode.

    Raises
    ------
    NotSequential
        If the blocks can't be run one by one.
    """
    sequences = cut_sequences(ids)
    forms = detect_output_forms(loaded, sequences)
    calls, hidden = record_calls(loaded, sequences.split(1), forms)
    inputs = [hidden]
    for layer, block in enumerate(loaded.blocks):
        with loaded.materialize(loaded.block_name(layer)):
            inputs.append(
                [
                    first_tensor(block(states, *call.args, **call.kwargs))
                    for states, call in zip(inputs[-1], calls[layer], strict=True)
                ]
            )
    gradients = _sampled_gradients(loaded, sequences, inputs.pop(), forms)
    for layer in reversed(range(len(loaded.blocks))):
        name, matrices = loaded.block_name(layer), _matrices_of(loaded, layer)
        context = GradientContext(
            loaded,
            layer,
            name,
            loaded.blocks[layer],
            matrices,
            sequences,
            inputs.pop(),
            calls[layer],
            gradients=gradients,
        )
        with loaded.materialize(name):
            if matrices:
                yield context
            else:
                deque(context.weight_gradients(), maxlen=0)  # for the gradients of its input


def _matrices_of(loaded: LoadedModel, layer: int) -> tuple[Matrix, ...]:
    return tuple(m for m in loaded.info.matrices if m.layer == layer)


def _sampled_gradients(
    loaded: LoadedModel, sequences: Tensor, last: list[Tensor], forms: list[OutputForm]
) -> list[Tensor]:
    """Return, by sequence, the gradients (draws, 1, tokens, width) of the last block's output."""
    generator = torch.Generator().manual_seed(_SEED)
    gradients = []
    with loaded.materialize_head(), torch.enable_grad():
        for ids, states in zip(sequences.split(1), last, strict=True):
            hidden = states.detach().clone().requires_grad_(True)
            logits = run_from_block(loaded, len(loaded.blocks), hidden, ids, forms)
            log_probs = logits[0].float().log_softmax(-1)
            # Drawn on the CPU, where a seed gives the same labels on every machine.
            probs = log_probs.detach().exp().cpu()
            labels = torch.multinomial(probs, DRAWS, replacement=True, generator=generator)
            found = []
            for drawn in labels.to(ids.device).T:
                loss = -log_probs.gather(-1, drawn[:, None]).sum()
                found += torch.autograd.grad(loss, hidden, retain_graph=True)
            gradients.append(torch.stack(found))
    return gradients
