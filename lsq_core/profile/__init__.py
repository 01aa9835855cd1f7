"""How hard each matrix is to quantize: metrics, and the profile that holds them.

A new metric is one file beside these and one entry in ``METRICS``. Importing this package does
not import torch; measuring does (:mod:`lsq_core.profile.measure`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lsq_core.config import LADDER, METADATA_FORMATS, QuantConfig
from lsq_core.errors import InputError, LsqError
from lsq_core.model import Matrix
from lsq_core.quantize import MATRIX_WISE, about

if TYPE_CHECKING:
    import pandas as pd

#: Where each metric is measured: the module that holds it, in the order of measuring.
METRICS = {
    "kurtosis": "lsq_core.profile.kurtosis:Kurtosis",
    "weight_error": "lsq_core.profile.weight_error:WeightError",
    "sensitivity": "lsq_core.profile.sensitivity:PartSensitivity",
    "sensitivity_module": "lsq_core.profile.sensitivity:ModuleSensitivity",
    "loss_impact": "lsq_core.profile.loss_impact:LossImpact",
    "gram_diagonal": "lsq_core.profile.proxies:GramDiagonal",
    "fisher_diagonal": "lsq_core.profile.proxies:DiagonalFisher",
}
#: Fast stand-ins for an exact score: which one. They are for looking at; no method reads them.
PROXIES = {"gram_diagonal": "sensitivity_module", "fisher_diagonal": "sensitivity_module"}
#: What a profile holds from the start; the others are dear, and added when a method needs them.
DEFAULT_METRICS = tuple(name for name in METRICS if name not in {"loss_impact", *PROXIES})
#: What the weights alone tell, without any text: cheap, and measured first.
WEIGHT_METRICS = ("kurtosis", "weight_error")
#: The one configuration that loss impact is measured at; a quantizer without it has none.
LOSS_PROBE = QuantConfig(2, 32)


@dataclass(frozen=True)
class MetricTitle:
    """How a metric is written on a page: its name, its axis, and what it means in a sentence."""

    title: str
    axis: str
    meaning: str


TITLES = {
    "kurtosis": MetricTitle(
        "Weight kurtosis",
        "kurtosis (normal = 3)",
        "How heavy the tails of a matrix's weights are; a normal distribution has 3.",
    ),
    "weight_error": MetricTitle(
        "Weight error",
        "‖W − Ŵ‖ (Frobenius)",
        "How far the weights move when they are quantized.",
    ),
    "sensitivity": MetricTitle(
        "Activation sensitivity by part",
        "mean squared output change",
        "How far the output of an attention or MLP part moves when its weights are quantized.",
    ),
    "sensitivity_module": MetricTitle(
        "Activation sensitivity by module",
        "mean squared output change",
        "How far one linear module's own output moves when its weights are quantized.",
    ),
    "loss_impact": MetricTitle(
        "Loss impact",
        "KL (nats a token) per ‖W − Ŵ‖²",
        "How far the model's predictions move for each unit of squared weight error in one "
        "matrix, all else at full precision.",
    ),
    "gram_diagonal": MetricTitle(
        "Gram diagonal (proxy)",
        "mean squared output change",
        "What sensitivity by module would be if no two inputs of a module were correlated.",
    ),
    "fisher_diagonal": MetricTitle(
        "Diagonal Fisher (proxy)",
        "Σ E[g²]·ΔW²",
        "The squared weight error, each weight by the square of the loss's gradient to it.",
    ),
}


@dataclass(frozen=True)
class ProfileSettings:
    """What the figures of a profile depend on, besides the model.

    ``calibration`` names a corpus; of it ``samples`` texts, shuffled with ``seed``, are cut to
    blocks of ``block_tokens`` (method §2).
    """

    quantizer: str = "hqq"
    axis: int = 1
    metadata: str = "8bit"
    calibration: str = "stdlib"
    samples: int = 128
    block_tokens: int = 512
    seed: int = 42

    def __post_init__(self) -> None:
        if about(self.quantizer).calibrated:
            raise InputError(
                f"A profile quantizes one matrix at a time, which {about(self.quantizer).title} "
                f"cannot; choose one of {', '.join(MATRIX_WISE)}."
            )
        if self.axis not in (0, 1):
            raise InputError(f"The grouping axis is 0 or 1, not {self.axis}.")
        if self.metadata not in METADATA_FORMATS:
            raise InputError(f"'{self.metadata}' is not a metadata format; choose 8bit or fp16.")

    def key(
        self,
        fingerprint: str,
        corpus_identity: str,
        tokenizer: str = "",
        code: str = "",
        made_with: Mapping[str, object] | None = None,
    ) -> str:
        """The identity of a profile: the same key means the same figures.

        ``tokenizer`` and ``code`` are hashes (:class:`lsq_core.identity.ModelIdentity`), and
        ``made_with`` is of :func:`lsq_core.provenance.profile_dependencies`. A published profile
        has none of these, and neither had one from before they were part of the key.
        """
        content = asdict(self) | {"model": fingerprint, "corpus": corpus_identity}
        content |= {"made_with": dict(made_with)} if made_with else {}
        content |= {k: v for k, v in (("tokenizer", tokenizer), ("code", code)) if v}
        del content["calibration"]  # two names of one text are one corpus
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Profile:
    """Every score of one model under one :class:`ProfileSettings`.

    ``values`` has a row for each figure: ``module, layer, type, metric, config, part, value``;
    ``config`` is '' where a metric has none.
    """

    id: str
    fingerprint: str
    settings: ProfileSettings
    matrices: tuple[Matrix, ...]
    values: pd.DataFrame
    provenance: dict = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics it holds; others can be added (:meth:`Store.keep_profile`)."""
        return tuple(self.values["metric"].unique())

    def scores(self, metric: str, config: QuantConfig | None = None) -> np.ndarray:
        """One score for each matrix (n,), NaN where there is none.

        Raises
        ------
        LsqError
            When the profile has no such metric.
        """
        config_name = config.name if config else ""
        rows = self.values[
            (self.values["metric"] == metric) & (self.values["config"] == config_name)
        ]
        if rows.empty:
            raise LsqError(f"The profile has no {metric} {config_name}; profile the model again.")
        by_name = dict(zip(rows["module"], rows["value"], strict=True))
        return np.array([by_name.get(m.name, np.nan) for m in self.matrices], dtype=float)

    def by_config(self, metric: str, ladder: Sequence[QuantConfig] = LADDER) -> np.ndarray:
        """Scores of a metric at every stop, (n, stops); NaN where a stop cannot be."""
        return np.stack([self.scores(metric, config) for config in ladder], axis=1)


def missing_metrics(found: Profile | None, wanted: Sequence[str] = ()) -> list[str]:
    """The usual metrics and those ``wanted`` that a profile hasn't, in the order of measuring.

    A profile lacks some while it is being measured, and where that was cut short.
    """
    held = found.metrics if found else ()
    return [m for m in METRICS if m in {*DEFAULT_METRICS, *wanted} and m not in held]
