"""The result of evaluating a model on a corpus."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from lsq_core.evaluation.divergence import Divergence

#: From so many times full precision's perplexity on a model is of no use, and gains over it or by
#: it are not spoken of.
UNUSABLE_RATIO = 3.0


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One model measured on one corpus by one protocol.

    ``nll`` is the summed negative log-likelihood (nats) of each window, ``counts`` its predicted
    tokens. ``kl`` (nats per token) and ``top1`` (share) compare with the reference model on the
    same windows and are None without a reference. ``seconds`` is the wall-clock time of what this
    model needs (decoding, every block, the head): work that it shared with models evaluated beside
    it counts in full for each of them, so the times of several may add up to more than the whole.
    """

    protocol: str
    nll: np.ndarray
    counts: np.ndarray
    seconds: float
    kl: float | None = None
    top1: float | None = None
    #: The distribution of ``kl`` over tokens; None without a reference.
    divergence: Divergence | None = None
    corpus: str = ""
    corpus_sha256: str = ""
    corpus_source: str = ""
    truncated: bool = False
    #: Peak GPU memory of a batch in bytes above that allocated before it: logits, attention and
    #: a block's decoded weights; None on a CPU, where it cannot be measured for one model.
    working_bytes: int | None = None
    #: Seconds by stage, if the evaluation is part of a run (:class:`lsq_core.progress.Clock`).
    times: dict[str, float] = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)
    #: Of ``seconds``, those of an earlier evaluation whose final hidden states served here.
    reused_seconds: float = 0.0

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


#: The evaluation of a model, and that of the reference if there is one.
EvaluationPair = tuple[Evaluation, Evaluation | None]
