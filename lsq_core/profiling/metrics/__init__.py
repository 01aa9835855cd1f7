"""Metrics of how hard a matrix is to quantize. Importing them does not import torch.

To add a metric, add a file to this package and an entry to ``METRICS``. Its class declares what
pages, the command line and planners need to know about it (:class:`.base.Metric`).
"""

from __future__ import annotations

from collections.abc import Iterable

from lsq_core.errors import choose
from lsq_core.profiling.metrics.base import Metric
from lsq_core.profiling.metrics.expected_kl import ExpectedKl
from lsq_core.profiling.metrics.kurtosis import Kurtosis
from lsq_core.profiling.metrics.loss_impact import LossImpact
from lsq_core.profiling.metrics.proxies import DiagonalFisher, GramDiagonal
from lsq_core.profiling.metrics.sensitivity import ModuleSensitivity, PartSensitivity
from lsq_core.profiling.metrics.weight_error import WeightError

#: All metrics by name, in measuring order.
METRICS: dict[str, type[Metric]] = {
    metric.name: metric
    for metric in (
        Kurtosis,
        WeightError,
        PartSensitivity,
        ModuleSensitivity,
        LossImpact,
        ExpectedKl,
        GramDiagonal,
        DiagonalFisher,
    )
}


def get_metric(name: str) -> type[Metric]:
    """Return the metric with the given name.

    Raises
    ------
    InputError
        If there is no such metric.
    """
    return choose(METRICS, name, "a metric")


def default_metrics() -> tuple[str, ...]:
    """Return the metrics in every profile; methods that need others request them."""
    return tuple(name for name, metric in METRICS.items() if metric.default)


def weight_metrics() -> tuple[str, ...]:
    """Return the default metrics that need no calibration text: cheap, and measured first."""
    return tuple(name for name in default_metrics() if not METRICS[name].needs_calibration)


def proxies() -> dict[str, str]:
    """Return the exact metric that each fast proxy approximates, by proxy."""
    return {name: metric.proxy_of for name, metric in METRICS.items() if metric.proxy_of}


def detection_metrics() -> tuple[str, ...]:
    """Return the metrics in which Algorithm 1 looks for outlier layers, in display order."""
    return in_display_order(name for name, metric in METRICS.items() if metric.detects_outliers)


def in_display_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort metrics in display order: activation metrics first, then in registration order."""
    order = list(METRICS)
    return tuple(sorted(names, key=lambda m: (not METRICS[m].needs_calibration, order.index(m))))
