"""Knapsack on the expected KL divergence of every configuration (ours)."""

from __future__ import annotations

import numpy as np

from lsq_core.planning.methods.knapsack import Knapsack
from lsq_core.planning.methods.sensi_knapsack import fill_unreached_experts
from lsq_core.planning.problem import Problem


class KlAware(Knapsack):
    """Knapsack on the KL divergence, estimated from gradients at each configuration."""

    name = "kl-aware"
    title = "KL-aware"
    meaning = "The least KL divergence of the predictions, expected from gradients."
    summary = (
        "Minimizes the KL divergence of the predictions from full precision within the budget, as "
        "estimated from gradients for each configuration of each matrix."
    )
    source = "our own, by the Fisher information (second order)"
    use = (
        "Budgets near 3.2 bits, and above 4: on SmolLM2 (4,096 tokens of WikiText-2) perplexity "
        "45.3 at 3.2 bits and 19.2 at 4.2, against 49.2 and 19.4 for loss-aware."
    )
    limits = (
        "The second-order estimate is too low beyond a divergence of 1 nat, and errors are "
        "assumed to add up. At 3.6 bits loss-aware is as good (25.2 against 25.1)."
    )
    color, symbol = "#B8336A", "star-diamond"
    cost_unit = "expected KL"
    metrics = ("expected_kl",)

    def cost(self, problem: Problem) -> np.ndarray:
        """Return the expected KL in nats per token if only that matrix is quantized."""
        return fill_unreached_experts(problem.by_config["expected_kl"], problem.matrices)
