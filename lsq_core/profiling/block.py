"""A decoder block with its matrices and the calibration inputs that reach it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from lsq_core.model.architecture import first_tensor, get_weight
from lsq_core.model.info import Matrix
from lsq_core.model.loading import LoadedModel
from lsq_core.model.walk import Call

#: Number of token sequences that run through a block at once.
BATCH = 8


@dataclass(eq=False)
class Block:
    """A decoder block with its matrices and the calibration inputs that reach it."""

    loaded: LoadedModel
    layer: int
    prefix: str
    block: nn.Module
    matrices: tuple[Matrix, ...]
    #: Calibration tokens, int64 (sequences, tokens); ``hidden`` holds their states in batches.
    ids: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def weight(self, matrix: Matrix) -> Tensor:
        """Return the full-precision weight (out, in), a view."""
        return get_weight(self.loaded.model, matrix)

    def name_in_block(self, matrix: Matrix) -> str:
        """Return the name, relative to the block, of the module that holds a matrix."""
        name = matrix.name.removeprefix(f"{self.prefix}.")
        return name if matrix.expert is None else name.rsplit(".", 2)[0]

    def run(self) -> Iterator[Tensor]:
        """Yield the block's output for each calibration batch."""
        for hidden, call in zip(self.hidden, self.calls, strict=True):
            yield first_tensor(self.block(hidden, *call.args, **call.kwargs))
