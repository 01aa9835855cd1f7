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
    """One score of a matrix; ``config`` is None if it does not depend on a configuration.

    ``part`` names the part of the block whose matrices were quantized together, if any. ``value``
    may be a one-element tensor, which is read when the block is done, so that scores do not wait
    for the GPU one by one.
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
    #: Name in a column or control that already shows what kind of metric it is.
    short: str
    #: Axis title, with the unit.
    axis: str
    #: One sentence on what it measures.
    meaning: str
    #: Whether charts use a logarithmic axis.
    log_scale: bool = False

    #: Whether every profile includes it; otherwise it is measured on request.
    default: bool = True
    #: The metric that it approximates, if it is a fast proxy. Planners do not use proxies.
    proxy_of: str = ""
    #: Whether Algorithm 1 looks for outlier layers in it.
    detects_outliers: bool = False
    #: Whether matrices of one part of a block share a score.
    shared_by_part: bool = False

    #: Whether it needs calibration text (hidden states and Gram matrices in the context).
    needs_calibration: bool
    #: Whether it runs more than the block it scores, so that all weights have to be loaded.
    needs_full_model: bool = False
    #: Whether layers can be measured separately, on several devices: it needs no walk through the
    #: blocks, or the walk is cheap compared with the scores.
    splits_by_layer: bool = False
    #: Whether it is measured on the backward walk through the blocks; its context is then a
    #: :class:`lsq_core.profiling.backward.GradientContext`.
    needs_gradients: bool = False
    #: Configurations at which it is measured, where the profile's ladder has them; empty if it
    #: needs no quantized weights.
    configs: Sequence[QuantConfig] = ()
    #: Whether there is one score for each of ``configs``, rather than one for the matrix.
    by_config: bool = False
    #: Number of calibration blocks it reads, starting with the first; None for all.
    sequences: int | None = None
    #: Text describing what has changed in its definition between versions, stored with the scores.
    #: Scores stored with a different text are not used
    #: (:func:`lsq_core.profiling.profile.current_scores`).
    definition: str = ""

    def effort(self, layer: int, layers: int) -> int:
        """Return the relative cost of one score in a layer, used to estimate the time left."""
        return 1

    @classmethod
    def cost_note(cls, info: ModelInfo, block_tokens: int) -> str:
        """Return a sentence about the cost of measuring it if high, else an empty string."""
        return ""

    def prepare(self, context: BlockContext) -> None:
        """Prepare from the first block of a walk over text, whether or not that block is scored."""

    def score_unquantized(self, context: BlockContext) -> Iterator[Score]:
        """Yield the scores that do not depend on a configuration; none unless overridden."""
        return iter(())

    def score_at_configs(
        self,
        context: BlockContext,
        configs: Sequence[QuantConfig],
        quantized: dict[Matrix, Tensor],
    ) -> Iterator[Score]:
        """Yield the scores at several configurations with the same group size.

        ``quantized`` holds the dequantized weights, float32 (configs, out, in), by matrix. Unless
        overridden, each of ``self.configs`` is scored separately.
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
