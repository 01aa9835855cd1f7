"""The knapsack on the measured rise of the loss (ours after [E]; method §5)."""

from __future__ import annotations

import numpy as np

from lsq_core.errors import InputError
from lsq_core.planning.knapsack import Knapsack
from lsq_core.planning.methods.sensi_knapsack import fill_unreached_experts
from lsq_core.planning.problem import Problem


class LossAware(Knapsack):
    """Least summed KL to full precision, each matrix's growing with its squared weight error."""

    name = "loss-aware"
    title = "Loss-aware"
    metrics = ("weight_error", "loss_impact")

    def cost(self, problem: Problem) -> np.ndarray:
        """``α · t²(c)`` in nats a token: the loss impact times the squared weight error.

        Raises
        ------
        InputError
            When the profile has no loss impact yet.
        """
        if "loss_impact" not in problem.scores:
            raise InputError(
                "Loss-aware reads loss_impact, which this profile does not have yet; add it with "
                "profile --metric loss_impact."
            )
        impact = fill_unreached_experts(problem.scores["loss_impact"][:, None], problem.matrices)
        return impact * problem.by_config["weight_error"] ** 2
