"""What evaluating a model on a text gives."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One model measured on one corpus by one protocol.

    ``nll`` is the summed negative log-likelihood (nats) of each window, ``counts`` its predicted
    tokens. ``kl`` (nats a token) and ``top1`` (share) compare with the reference model on the
    same windows and are None where there was none.
    """

    protocol: str
    nll: np.ndarray
    counts: np.ndarray
    seconds: float
    kl: float | None = None
    top1: float | None = None
    corpus: str = ""
    corpus_sha256: str = ""
    corpus_source: str = ""
    truncated: bool = False
    #: Most memory of a GPU that one batch took beyond what was there before it: logits, attention
    #: and the weights it decodes; None on a CPU, where no such figure can be had of one model.
    working_bytes: int | None = None
    #: Seconds of the run by stage, where it was one (:class:`lsq_core.progress.Clock`).
    times: dict[str, float] = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return int(self.counts.sum())

    @property
    def perplexity(self) -> float:
        """``exp`` of the summed negative log-likelihood over the predicted tokens."""
        mean = self.nll.sum() / self.counts.sum()
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens over the time of this model's own forward passes."""
        return self.tokens / self.seconds


#: The evaluation of a model and, where there is a reference, that of the reference.
EvaluationPair = tuple[Evaluation, Evaluation | None]
