"""What a metric is: it scores the matrices of one block, once or at each configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lsq_core.config import QuantConfig
from lsq_core.model import Matrix

if TYPE_CHECKING:
    from torch import Tensor

    from lsq_core.profile.context import BlockContext


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
    """One file a metric, one entry in ``lsq_core.profile.METRICS``; it overrides what it can."""

    name: str
    #: Whether it needs calibration text (hidden states and Gram matrices in the context).
    needs_text: bool

    def once(self, context: BlockContext) -> Iterator[Score]:
        """Scores that depend on no configuration; none unless overridden."""
        return iter(())

    def at_config(
        self, context: BlockContext, config: QuantConfig, quantized: dict[Matrix, Tensor]
    ) -> Iterator[Score]:
        """Scores at one configuration; ``quantized`` holds what the weights become, float32.

        None unless overridden.
        """
        return iter(())
