"""Metrics of how hard a matrix is to quantize.

A new metric is one file beside these and one entry in ``METRICS``.
"""

from __future__ import annotations

from dataclasses import dataclass

from lsq_core.bits import QuantConfig

#: Where each metric is measured: the module that holds it, in the order of measuring.
METRICS = {
    "kurtosis": "lsq_core.profiling.metrics.kurtosis:Kurtosis",
    "weight_error": "lsq_core.profiling.metrics.weight_error:WeightError",
    "sensitivity": "lsq_core.profiling.metrics.sensitivity:PartSensitivity",
    "sensitivity_module": "lsq_core.profiling.metrics.sensitivity:ModuleSensitivity",
    "loss_impact": "lsq_core.profiling.metrics.loss_impact:LossImpact",
    "gram_diagonal": "lsq_core.profiling.metrics.proxies:GramDiagonal",
    "fisher_diagonal": "lsq_core.profiling.metrics.proxies:DiagonalFisher",
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
        "KL (nats per token) per ‖W − Ŵ‖²",
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
