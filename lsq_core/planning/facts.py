"""Scores and z-scores that explain why a planner gave a matrix its bits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lsq_core.planning.detection import THRESHOLD
from lsq_core.planning.methods.boost import detect_by_type
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest


def facts(
    problem: Problem, request: PlanRequest, titles: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Return all scores, and Algorithm 1's z-scores of kurtosis and the request's metric.

    Z-scores are included only for metrics that the problem has. ``titles`` maps metrics to display
    names. Arrays are (n,) in the order of the matrices, with NaN for missing values; the first
    layer has no z-score because no layer precedes it.
    """
    found = {titles[metric]: values for metric, values in problem.scores.items()}
    for metric in ("kurtosis", request.metric):
        if metric in problem.scores and len(problem.matrices):
            found[f"z of {titles[metric].lower()} (flagged above {THRESHOLD:g})"] = z_scores(
                problem, metric
            )
    return found


def layer_means(problem: Problem, metric: str) -> np.ndarray:
    """Return each layer's mean score, (layers,), layers ascending; NaN if it has no scores."""
    layers = np.array([m.layer for m in problem.matrices])
    scores = problem.scores[metric]
    known = np.isfinite(scores)
    means = [
        scores[known & (layers == layer)].mean() if (known & (layers == layer)).any() else np.nan
        for layer in np.unique(layers)
    ]
    return np.array(means)


def z_scores(problem: Problem, metric: str) -> np.ndarray:
    """Return Algorithm 1's z-score for each matrix, (n,): how unusual the step to its layer is."""
    found = detect_by_type(problem, metric, top_m=0)
    z = np.full(len(problem.matrices), np.nan)
    for i, matrix in enumerate(problem.matrices):
        layers, detection = found[matrix.type]
        position = layers.index(matrix.layer)
        if 0 < position <= len(detection.z):
            z[i] = detection.z[position - 1]
    return z
