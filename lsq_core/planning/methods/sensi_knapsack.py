"""The knapsack on measured output error (ours; method §5)."""

from __future__ import annotations

import numpy as np

from lsq_core.model.info import Matrix
from lsq_core.planning.knapsack import Knapsack
from lsq_core.planning.problem import Problem


class SensiKnapsack(Knapsack):
    """Least squared change of the modules' own outputs, as measured at every configuration."""

    name = "sensi-knapsack"
    title = "Sensitivity knapsack"
    metrics = ("sensitivity_module",)

    def cost(self, problem: Problem) -> np.ndarray:
        """``s(i, c) · d_out``: the mean squared output change, summed over the outputs."""
        scores = fill_unreached_experts(problem.by_config["sensitivity_module"], problem.matrices)
        outputs = np.array([m.out_features for m in problem.matrices])
        return scores * outputs[:, None]


def fill_unreached_experts(scores: np.ndarray, matrices: tuple[Matrix, ...]) -> np.ndarray:
    """Scores (n, k) in which an expert that no calibration token reached has one as well.

    It is counted like the least sensitive of its layer and type that one did reach.
    """
    scores = scores.copy()
    unreached = np.isnan(scores).all(axis=1)
    for i in np.flatnonzero(unreached):
        matrix = matrices[i]
        peers = [
            j
            for j, m in enumerate(matrices)
            if (m.layer, m.type) == (matrix.layer, matrix.type) and not unreached[j]
        ]
        if peers:
            scores[i] = scores[peers].min(axis=0)
    return scores
