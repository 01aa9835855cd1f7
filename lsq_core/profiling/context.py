"""One decoder block and its calibration inputs, as used by the metrics.

Blocks are visited in order. Their arguments other than the hidden states (masks, positions) are
recorded once; the hidden states come from the preceding full-precision block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from lsq_core.model.architecture import is_transposed, locate_parameter
from lsq_core.model.info import Matrix
from lsq_core.profiling.block import Block
from lsq_core.profiling.grams import GramCollector, MomentCollector
from lsq_core.profiling.parts import Part, find_parts
from lsq_core.profiling.replay import Replay


@dataclass(frozen=True, eq=False)
class BlockObservations:
    """Results of one pass of a block over the calibration inputs."""

    #: ``H = XᵀX`` (in, in) in float32 and the number of tokens, by matrix. Modules that read the
    #: same input share one; an expert that no token reached has 0 tokens.
    grams: dict[Matrix, tuple[Tensor, int]]
    #: By :attr:`Part.comparison`, for all parts except those of one linear module.
    replays: dict[tuple[str, str], Replay]
    #: The block's output hidden states, one tensor per batch.
    following: list[Tensor]


@dataclass(eq=False)
class BlockContext(Block):
    """A decoder block and the data that its metrics use, each computed once."""

    #: Results to reuse for other matrices or metrics of the block; freed with the context.
    cache: dict[str, object] = field(default_factory=dict, init=False, repr=False)
    _observations: BlockObservations | None = field(default=None, init=False, repr=False)

    @property
    def observations(self) -> BlockObservations:
        """Gram matrices, replays and the block's outputs, collected in one pass on first use."""
        if self._observations is None:
            self._observations = self._observe()
        return self._observations

    def _observe(self) -> BlockObservations:
        collector = GramCollector(self)
        replays = {
            part.comparison: Replay(*map(self.block.get_submodule, part.comparison))
            for part in self.parts
            if not part.linear
        }
        following = []
        with ExitStack() as stack:
            stack.enter_context(collector.collecting_inputs())
            for replay in replays.values():
                stack.enter_context(replay.recording())
            for output in self.run():
                following.append(output)
                collector.end_batch()
        return BlockObservations(collector.result(), replays, following)

    @cached_property
    def second_moments(self) -> dict[Matrix, tuple[Tensor, int]]:
        """The diagonal (in,) of each Gram matrix and the number of tokens.

        Computed without the Gram matrices unless they have already been collected.
        """
        if self._observations is not None:
            return {m: (gram.diagonal(), n) for m, (gram, n) in self.observations.grams.items()}
        collector = MomentCollector(self)
        with collector.collecting_inputs():
            for _ in self.run():
                collector.end_batch()
        return collector.result()

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The authors' parts of this block, found from its structure (see :func:`find_parts`)."""
        return find_parts(self)

    @cached_property
    def units(self) -> list[tuple[Matrix, ...]]:
        """Matrices to quantize together: those of a part, or each alone if there are no inputs."""
        return [part.matrices for part in self.parts] if self.hidden else list(zip(self.matrices))

    @contextmanager
    def replaced_weights(self, weights: dict[Matrix, Tensor]) -> Iterator[None]:
        """Replace weights within a ``with`` block, then restore the original ones."""
        with ExitStack() as stack:
            for matrix, weight in weights.items():
                stack.callback(self._replace(matrix, weight))
            yield

    def _replace(self, matrix: Matrix, weight: Tensor) -> Callable[[], None]:
        """Replace one weight and return a function that restores the original."""
        holder, name = locate_parameter(self.loaded.model, matrix)
        before = getattr(holder, name)
        if matrix.expert is None:
            after = (weight.T if is_transposed(holder) else weight).to(before.dtype)
            setattr(holder, name, nn.Parameter(after, requires_grad=False))
            return lambda: setattr(holder, name, before)
        view = self.weight(matrix)
        original = view.clone()
        view.copy_(weight)
        return lambda: view.copy_(original)

    def advance(self) -> None:
        """Replace the hidden states with the block's outputs, the inputs of the next block."""
        seen, self._observations = self._observations, None
        for batch, output in enumerate(seen.following if seen else self.run()):
            self.hidden[batch] = output
