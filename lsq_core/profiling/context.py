"""One decoder block and its calibration inputs, as the metrics see it.

Blocks are visited in order. What a block is called with besides the hidden states (masks,
positions) is recorded once; the hidden states flow from the full-precision block before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
    """What one pass of a block over the calibration inputs shows."""

    #: ``H = XᵀX`` (in, in) in float32 and the number of tokens, by matrix. Modules that read the
    #: same input share one; an expert that no token reached has 0 tokens.
    grams: dict[Matrix, tuple[Tensor, int]]
    #: By :attr:`Part.place`, for parts that aren't linear.
    replays: dict[tuple[str, str], Replay]
    #: The hidden states that leave the block, a tensor a batch.
    following: list[Tensor]


@dataclass(eq=False)
class BlockContext(Block):
    """A decoder block with what its metrics read, each measured once."""

    @cached_property
    def observations(self) -> BlockObservations:
        """Gram matrices, what is replayed and what the next block gets, of one pass."""
        collector = GramCollector(self)
        replays = {
            part.place: Replay(*map(self.block.get_submodule, part.place))
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
        """The diagonal (in,) of each Gram matrix, and the number of tokens; no Gram is needed."""
        if "observed" in self.__dict__:
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
        """Matrices that are quantized together: those of a part, or each alone without inputs."""
        return [part.matrices for part in self.parts] if self.hidden else list(zip(self.matrices))

    @contextmanager
    def replaced_weights(self, weights: dict[Matrix, Tensor]) -> Iterator[None]:
        """Put other weights in for a while; the original ones are put back, never read again."""
        with ExitStack() as stack:
            for matrix, weight in weights.items():
                stack.callback(self._replace(matrix, weight))
            yield

    def _replace(self, matrix: Matrix, weight: Tensor) -> Callable[[], None]:
        """Put one weight in; returns what puts the original one back."""
        holder, name = locate_parameter(self.loaded.model, matrix)
        before = getattr(holder, name)
        if matrix.expert is None:
            after = (weight.T if is_transposed(holder) else weight).to(before.dtype)
            setattr(holder, name, nn.Parameter(after, requires_grad=False))
            return lambda: setattr(holder, name, before)
        place = self.weight(matrix)
        original = place.clone()
        place.copy_(weight)
        return lambda: place.copy_(original)

    def advance(self) -> None:
        """Make the hidden states those that leave the block, for the block after it."""
        seen = self.__dict__.pop("observed", None)
        for batch, output in enumerate(seen.following if seen else self.run()):
            self.hidden[batch] = output
