"""The knapsack on the expected KL divergence of every configuration (ours)."""

from __future__ import annotations

import numpy as np

from lsq_core.planning.knapsack import Knapsack
from lsq_core.planning.methods.sensi_knapsack import fill_unreached_experts
from lsq_core.planning.problem import Problem


class KlAware(Knapsack):
    """Least summed KL to full precision, estimated from gradients at each configuration."""

    name = "kl-aware"
    title = "KL-aware"
    meaning = "The least KL divergence of the predictions, expected from gradients."
    color, symbol = "#B8336A", "star-diamond"
    cost_unit = "expected KL"
    metrics = ("expected_kl",)

    def cost(self, problem: Problem) -> np.ndarray:
        """Return the expected KL in nats per token, each matrix quantized alone."""
        return fill_unreached_experts(problem.by_config["expected_kl"], problem.matrices)
