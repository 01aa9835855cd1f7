"""Why a matrix has its bits: the figures that its planner read, for a person to see."""

from __future__ import annotations

import numpy as np

from lsq_core.planning.detection import THRESHOLD
from lsq_core.planning.methods.boost import detect_by_type
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.metrics import TITLES


def facts(problem: Problem, request: PlanRequest) -> dict[str, np.ndarray]:
    """Each score that the problem holds, and Algorithm 1's z of what the method reads.

    Arrays are (n,) in the order of the matrices, NaN where there is none: a first layer has no
    difference to a layer before it.
    """
    found = {TITLES[metric].title: values for metric, values in problem.scores.items()}
    for metric in ("kurtosis", request.metric):
        if metric in problem.scores and len(problem.matrices):
            found[f"z of {TITLES[metric].title.lower()} (flagged above {THRESHOLD:g})"] = z_scores(
                problem, metric
            )
    return found


def z_scores(problem: Problem, metric: str) -> np.ndarray:
    """Algorithm 1's z for each matrix (n,): how unusual the step to its layer is."""
    found = detect_by_type(problem, metric, top_m=0)
    z = np.full(len(problem.matrices), np.nan)
    for i, matrix in enumerate(problem.matrices):
        layers, detection = found[matrix.type]
        place = layers.index(matrix.layer)
        if 0 < place <= len(detection.z):
            z[i] = detection.z[place - 1]
    return z
