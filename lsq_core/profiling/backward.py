"""A walk over the blocks from the last to the first, with gradients of given losses.

The default loss of a sequence is the sum of ``−log p(y)`` over its positions, with each ``y`` drawn
from the model's own prediction ``p``. Its gradients have mean zero and, as draws are independent,
their covariance is the Fisher information summed over the positions: the curvature of the KL
divergence from the model's predictions. (Labels from the text itself would give the "empirical
Fisher", which is not that curvature: Kunstner et al., arXiv 1905.12558.)

Hidden states between blocks are stored. Blocks are rerun one at a time, and the gradients of a
block's inputs are passed to the block before it, so weights can be streamed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lsq_core.model.architecture import first_tensor, locate_parameter, matrix_view, parameter_name
from lsq_core.model.info import Matrix
from lsq_core.model.loading import LoadedModel
from lsq_core.model.walk import Call, OutputForm, detect_output_forms, record_calls, run_from_block
from lsq_core.profiling.context import BlockContext
from lsq_core.units import MIB

#: Tokens per sequence. Each sequence gives one gradient sample, so short ones give more samples.
SEQUENCE_TOKENS = 128
#: Maximum number of sequences (4,096 tokens in total).
MAX_SEQUENCES = 32
#: Number of labels drawn for each position of a sequence; each draw gives one gradient sample. With
#: 128 samples the standard error of an expected square is an eighth of it.
DRAWS = 4
_SEED = 0
#: Bytes of a matrix's gradients to stack before multiplying them by its changes: the changes, many
#: times as large as a gradient, are then read once for several sequences.
_STACKED_BYTES = 64 * MIB

#: Maps a sequence's number and its log-probabilities (tokens, vocabulary) to scalar losses, equally
#: many for each sequence.
Losses = Callable[[int, Tensor], Sequence[Tensor]]
#: Maps a block to replacement weights (out, in) of its matrices.
Replacements = Callable[[BlockContext], Mapping[Matrix, Tensor]]


@dataclass(eq=False)
class GradientContext(BlockContext):
    """A block with its inputs, one sequence per batch, and the gradients of its outputs."""

    #: Gradients (losses, 1, tokens, width) of the block's output for each sequence;
    #: :meth:`weight_gradients` replaces them by those of the block's input.
    gradients: list[Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """The number of positions that the losses cover."""
        return self.ids.numel()

    def weight_gradients(self) -> Iterator[dict[Matrix, Tensor]]:
        """Yield the gradients (losses, out, in) of the block's matrices, one sequence at a time.

        Matrices without a gradient, such as an expert that no token reached, are left out.
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

    def change_products(self, changes: Mapping[Matrix, Tensor]) -> dict[Matrix, Tensor]:
        """Return ``⟨g, Δ⟩``, float64 (sequences, losses, changes) on the CPU, for each matrix.

        ``changes`` are (changes, weights). Products are 0 for sequences in which a matrix has no
        gradient.
        """
        losses = len(self.gradients[0])
        products = {
            matrix: torch.zeros(len(self.hidden), losses, len(change), dtype=torch.double)
            for matrix, change in changes.items()
        }
        waiting: dict[Matrix, list[tuple[int, Tensor]]] = {matrix: [] for matrix in changes}

        def multiply(matrix: Matrix) -> None:
            numbers, gradients = zip(*waiting[matrix], strict=True)
            found = torch.cat(gradients) @ changes[matrix].T
            products[matrix][list(numbers)] = found.double().cpu().unflatten(0, (-1, losses))
            waiting[matrix].clear()

        for number, by_matrix in enumerate(self.weight_gradients()):
            for matrix, gradient in by_matrix.items():
                waiting[matrix].append((number, gradient.flatten(1)))
                if len(waiting[matrix]) * gradient.nbytes >= _STACKED_BYTES:
                    multiply(matrix)
        for matrix, stacked in waiting.items():
            if stacked:
                multiply(matrix)
        return products

    def _sequence_gradients(
        self, number: int, parameters: list[Tensor]
    ) -> list[tuple[Tensor | None, ...]]:
        """Return the parameters' gradients by loss; update ``gradients`` to those of the input."""
        call, gradients = self.calls[number], self.gradients[number]
        with torch.enable_grad():
            hidden = self.hidden[number].detach().clone().requires_grad_(True)
            output = first_tensor(self.block(hidden, *call.args, **call.kwargs))
            found = [
                torch.autograd.grad(
                    output, [hidden, *parameters], gradient, retain_graph=True, allow_unused=True
                )
                for gradient in gradients
            ]
        self.gradients[number] = torch.stack([of_input for of_input, *_ in found])
        return [tuple(of_parameters) for _, *of_parameters in found]

    def _parameter(self, matrix: Matrix) -> Tensor:
        holder, name = locate_parameter(self.loaded.model, matrix)
        return getattr(holder, name)

    def _view(self, gradient: Tensor, matrix: Matrix) -> Tensor:
        holder, _ = locate_parameter(self.loaded.model, matrix)
        return matrix_view(gradient, holder, matrix)


def cut_sequences(ids: Tensor, part: int = 0) -> Tensor:
    """Cut calibration blocks (n, tokens) into sequences, int64 (at most 32, at most 128).

    ``part`` selects which consecutive 32 sequences to return; after the last sequence, counting
    continues with the first.
    """
    length = min(SEQUENCE_TOKENS, ids.shape[1])
    pieces = [piece for piece in ids.split(length, dim=1) if piece.shape[1] == length]
    sequences = torch.stack(pieces, dim=1).flatten(0, 1)
    return sequences.roll(-part * MAX_SEQUENCES, dims=0)[:MAX_SEQUENCES].clone()


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """A forward pass of sequences through the blocks, one sequence per batch.

    ``inputs`` are the hidden states of each sequence before each block and after the last one.
    """

    loaded: LoadedModel
    sequences: Tensor
    forms: list[OutputForm]
    calls: list[list[Call]]
    inputs: list[list[Tensor]]

    def context(self, layer: int) -> BlockContext:
        """Return a block with its inputs."""
        matrices = tuple(m for m in self.loaded.info.matrices if m.layer == layer)
        name, block = self.loaded.block_name(layer), self.loaded.blocks[layer]
        inputs, calls = self.inputs[layer], self.calls[layer]
        return BlockContext(
            self.loaded, layer, name, block, matrices, self.sequences, inputs, calls
        )

    def log_probs(self, number: int, states: Tensor) -> Tensor:
        """Return a sequence's log-probabilities, float32 (tokens, vocabulary), from final states.

        The LM head must be in memory.
        """
        ids = self.sequences[number : number + 1]
        logits = run_from_block(self.loaded, len(self.loaded.blocks), states, ids, self.forms)
        return logits[0].float().log_softmax(-1)


def run_forward(
    loaded: LoadedModel, sequences: Tensor, replacements: Replacements | None = None
) -> ForwardPass:
    """Run sequences, int64 (n, tokens), through all blocks, with any replacement weights.

    Raises
    ------
    NotSequential
        If the blocks cannot be run one by one.
    """
    forms = detect_output_forms(loaded, sequences)
    calls, hidden = record_calls(loaded, sequences.split(1), forms)
    forward = ForwardPass(loaded, sequences, forms, calls, [hidden])
    for layer in range(len(loaded.blocks)):
        with loaded.materialize(loaded.block_name(layer)):
            context = forward.context(layer)
            replaced = replacements(context) if replacements else {}
            with context.replaced_weights(dict(replaced)):
                forward.inputs.append(list(context.run()))
    return forward


def iter_blocks_backward(loaded: LoadedModel, ids: Tensor) -> Iterator[GradientContext]:
    """Yield each block that has matrices, the last one first, with gradients of the default losses.

    ``ids`` are calibration blocks, int64 (n, tokens). Otherwise as :func:`iter_gradients`.
    """
    sequences = cut_sequences(ids)
    yield from iter_gradients(run_forward(loaded, sequences), SampledLabels())


def iter_gradients(forward: ForwardPass, losses: Losses) -> Iterator[GradientContext]:
    """Yield each block that has matrices, the last one first.

    The consumer must exhaust :meth:`GradientContext.weight_gradients` of each block, with the
    weights that the block had in the forward pass: it computes the gradients for the block before
    it. Block inputs are freed along the way. Tensors created in inference mode have no gradients.
    """
    loaded = forward.loaded
    gradients = _final_gradients(forward, losses)
    for layer in reversed(range(len(loaded.blocks))):
        own = forward.context(layer)
        context = GradientContext(
            own.loaded,
            own.layer,
            own.prefix,
            own.block,
            own.matrices,
            own.ids,
            forward.inputs.pop(),
            own.calls,
            gradients=gradients,
        )
        with loaded.materialize(context.prefix):
            if context.matrices:
                yield context
            else:
                deque(context.weight_gradients(), maxlen=0)  # computes the gradients of its input


def _final_gradients(forward: ForwardPass, losses: Losses) -> list[Tensor]:
    """Return each sequence's gradients (losses, 1, tokens, width) of the last block's output."""
    gradients = []
    with forward.loaded.materialize_head(), torch.enable_grad():
        for number, states in enumerate(forward.inputs.pop()):
            hidden = states.detach().clone().requires_grad_(True)
            log_probs = forward.log_probs(number, hidden)
            found = [
                torch.autograd.grad(loss, hidden, retain_graph=True)[0]
                for loss in losses(number, log_probs)
            ]
            gradients.append(torch.stack(found))
    return gradients


class SampledLabels:
    """Losses ``−log p(y)``, summed over a sequence, for labels drawn from the predictions ``p``."""

    def __init__(self, draws: int = DRAWS) -> None:
        self.draws = draws
        self._generator = torch.Generator().manual_seed(_SEED)

    def __call__(self, number: int, log_probs: Tensor) -> list[Tensor]:
        """Return one loss per draw; see :data:`Losses`."""
        # Drawn on the CPU, so that a seed gives the same labels on every machine.
        probs = log_probs.detach().exp().cpu()
        labels = torch.multinomial(probs, self.draws, replacement=True, generator=self._generator)
        return [
            -log_probs.gather(-1, drawn[:, None]).sum() for drawn in labels.to(log_probs.device).T
        ]
