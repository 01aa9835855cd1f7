"""What a metric is: it scores the matrices of one block, once or at each configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lsq_core.bits import QuantConfig
from lsq_core.model.info import Matrix

if TYPE_CHECKING:
    from torch import Tensor

    from lsq_core.profiling.context import BlockContext


@dataclass(frozen=True)
class Score:
    """One figure: of a matrix, by a metric, at a configuration or (None) at none.

    ``part`` names what was quantized together with the matrix, where it was not alone.
    """

    matrix: Matrix
    metric: str
    config: QuantConfig | None
    value: float
    part: str = ""


class Metric:
    """One file a metric, one entry in ``METRICS``; it overrides what it can."""

    name: str
    #: Whether it needs calibration text (hidden states and Gram matrices in the context).
    needs_calibration: bool
    #: Whether it runs more than the block it scores, so that all weights have to be loaded.
    needs_full_model: bool = False
    #: The configurations it is measured at; none for one that needs no quantized weights.
    configs: Sequence[QuantConfig] = ()
    #: How many calibration blocks it reads, the first of them; None for all.
    sequences: int | None = None

    def effort(self, layer: int, layers: int) -> int:
        """What a score in one layer costs beside the others', so that time left can be told."""
        return 1

    def score_unquantized(self, context: BlockContext) -> Iterator[Score]:
        """Scores that depend on no configuration; none unless overridden."""
        return iter(())

    def score_at_config(
        self, context: BlockContext, config: QuantConfig, quantized: dict[Matrix, Tensor]
    ) -> Iterator[Score]:
        """Scores at one of ``configs``; ``quantized`` holds what the weights become, float32.

        None unless overridden.
        """
        return iter(())
