"""The interface of a metric: it scores the matrices of a block, once or at each configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lsq_core.bits import QuantConfig
from lsq_core.model.info import Matrix, ModelInfo

if TYPE_CHECKING:
    from torch import Tensor

    from lsq_core.profiling.context import BlockContext


@dataclass(frozen=True)
class Score:
    """One score of a matrix; ``config`` is None for a score that depends on no configuration.

    ``part`` names the part of the block whose matrices were quantized together, if any. ``value``
    may be a tensor of one number, which is read when the block is done: a GPU need not be waited
    for at each score.
    """

    matrix: Matrix
    metric: str
    config: QuantConfig | None
    value: float | Tensor
    part: str = ""


class Metric:
    """A metric: class attributes that describe it, and methods that measure it.

    The attributes are read without importing torch, so a metric's file imports torch inside the
    functions that compute. A subclass overrides one or more of the ``score_*`` methods.
    """

    #: Identifier in profiles, in the database and on the command line.
    name: str
    #: Heading of charts and tables.
    title: str
    #: Name within a sentence, in lower case.
    label: str
    #: Name in a column or control that already says what kind of metric it is.
    short: str
    #: Axis title, with the unit.
    axis: str
    #: One sentence on what it measures.
    meaning: str
    #: Whether charts draw it on a logarithmic axis.
    log_scale: bool = False

    #: Whether every profile has it; otherwise it is measured on request.
    default: bool = True
    #: The metric that it approximates, if it is a fast proxy. Planners read no proxy.
    proxy_of: str = ""
    #: Whether Algorithm 1 runs over it.
    detects_outliers: bool = False
    #: Whether matrices of one part of a block share a score.
    shared_by_part: bool = False

    #: Whether it needs calibration text (hidden states and Gram matrices in the context).
    needs_calibration: bool
    #: Whether it runs more than the block it scores, so that all weights have to be loaded.
    needs_full_model: bool = False
    #: Whether layers may be measured apart from one another, on several devices: it needs no walk
    #: through the blocks, or one that is little beside its scores.
    splits_by_layer: bool = False
    #: Whether it is measured on the way back through the blocks: its context is a
    #: :class:`lsq_core.profiling.backward.GradientContext`.
    needs_gradients: bool = False
    #: The configurations it is measured at, those of them that the profile's ladder has; empty if
    #: it needs no quantized weights.
    configs: Sequence[QuantConfig] = ()
    #: Whether there is one score for each of ``configs``, rather than one for the matrix.
    by_config: bool = False
    #: Number of calibration blocks it reads, from the first on; None for all.
    sequences: int | None = None
    #: What of its definition has changed between versions, in words, stored with the scores: those
    #: stored with other words are not used (:func:`lsq_core.profiling.profile.current_scores`).
    definition: str = ""

    def effort(self, layer: int, layers: int) -> int:
        """Return the relative cost of one score in a layer, from which time left is estimated."""
        return 1

    @classmethod
    def cost_note(cls, info: ModelInfo, block_tokens: int) -> str:
        """Return a sentence on what measuring it takes where that is much, otherwise nothing."""
        return ""

    def prepare(self, context: BlockContext) -> None:
        """Look at the first block of a walk over text, whether or not it is scored."""

    def score_unquantized(self, context: BlockContext) -> Iterator[Score]:
        """Yield the scores that depend on no configuration; none unless overridden."""
        return iter(())

    def score_at_configs(
        self,
        context: BlockContext,
        configs: Sequence[QuantConfig],
        quantized: dict[Matrix, Tensor],
    ) -> Iterator[Score]:
        """Yield the scores at several configurations of one group size.

        ``quantized`` holds the dequantized weights, float32 (configs, out, in), by matrix. Unless
        overridden, each of ``self.configs`` is scored by itself.
        """
        for number, config in enumerate(configs):
            if config in self.configs:
                own = {matrix: weights[number] for matrix, weights in quantized.items()}
                yield from self.score_at_config(context, config, own)

    def score_at_config(
        self, context: BlockContext, config: QuantConfig, quantized: dict[Matrix, Tensor]
    ) -> Iterator[Score]:
        """Yield the scores at one of ``configs``; none unless overridden.

        ``quantized`` holds the dequantized weights, float32 (out, in), by matrix.
        """
        return iter(())

    def score_block(self, context: BlockContext) -> Iterator[Score]:
        """Yield the scores that need all configurations of a block; none unless overridden."""
        return iter(())
