"""The result of evaluating a model on a corpus."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from lsq_core.evaluation.divergence import Divergence

#: Ratio to full precision's perplexity from which a model is considered unusable, so that
#: improvements over it or by it are not reported.
UNUSABLE_RATIO = 3.0


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One model measured on one corpus by one protocol.

    ``nll`` is the summed negative log-likelihood (nats) of each window, ``counts`` its number of
    predicted tokens. ``kl`` (nats per token) and ``top1`` (share) compare with the reference model
    on the same windows and are None without one. ``seconds`` is the wall-clock time of the work
    this model needs (decoding, every block, the head). Work shared with models evaluated at the
    same time counts in full for each, so several models' times may exceed the total.
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
    #: Peak GPU memory of a batch in bytes above that allocated before: logits, attention and a
    #: block's decoded weights. None on a CPU, where it can't be measured per model.
    working_bytes: int | None = None
    #: Seconds by stage, if the evaluation is part of a run (:class:`lsq_core.progress.Clock`).
    times: dict[str, float] = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)
    #: The part of ``seconds`` spent in an earlier evaluation whose hidden states were reused.
    reused_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return int(self.counts.sum())

    @property
    def perplexity(self) -> float:
        """``exp`` of the summed negative log-likelihood over the predicted tokens."""
        mean = self.nll.sum() / self.counts.sum()
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens divided by ``seconds``."""
        return self.tokens / self.seconds


#: The evaluations of a model and of the reference, if there is one.
EvaluationPair = tuple[Evaluation, Evaluation | None]
