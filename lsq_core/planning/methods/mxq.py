"""MXQ [B] and its relatives: what a matrix costs at a stop, told from the weights alone."""

from __future__ import annotations

import numpy as np

from lsq_core.planning.knapsack import Knapsack
from lsq_core.planning.methods.boost import flagged_layers
from lsq_core.planning.problem import Problem


class Mxq(Knapsack):
    """Least summed Frobenius error of the weights."""

    name = "mxq"
    title = "MXQ"
    metrics = ("weight_error",)

    def cost(self, problem: Problem) -> np.ndarray:
        """``‖W − Ŵ_c‖_F``."""
        return problem.by_config["weight_error"]


class KurtScaled(Knapsack):
    """MXQ whose errors weigh up to twice as much where the weights have heavy tails."""

    name = "kurt-scaled"
    title = "Kurtosis-scaled MXQ"
    metrics = ("weight_error", "kurtosis")

    def cost(self, problem: Problem) -> np.ndarray:
        """``‖W − Ŵ_c‖_F · (1 + k)``, ``k`` the kurtosis scaled to 0–1 within its module type."""
        kurtosis = problem.scores["kurtosis"]
        types = np.array([m.type for m in problem.matrices])
        scaled = np.zeros(len(types))
        for kind in dict.fromkeys(types):
            own = kurtosis[types == kind]
            spread = own.max() - own.min()
            scaled[types == kind] = (own - own.min()) / spread if spread > 0 else 0.0
        return problem.by_config["weight_error"] * (1 + scaled)[:, None]


class _Penalised(Knapsack):
    """The toolkit's programs of fixed penalties, doubled where Algorithm 1 flags the layer."""

    #: What Algorithm 1 reads.
    metric: str

    def cost(self, problem: Problem) -> np.ndarray:
        """``100 · penalty(b1) · f / bpp(c) · p/P``; penalty 4 for 2 bits, 2 for 3, else 1."""
        flagged = flagged_layers(problem, self.metric, 0)
        doubled = np.array([2.0 if m.layer in flagged[m.type] else 1.0 for m in problem.matrices])
        options = problem.options
        penalty = np.array([{2: 4.0, 3: 2.0}.get(c.bits, 1.0) / c.nominal_bits for c in options])
        share = problem.numel / problem.total
        return 100 * (doubled * share)[:, None] * penalty


class SensiMilp(_Penalised):
    """Fixed penalties, doubled for layers flagged by sensitivity."""

    name = "sensi-milp"
    title = "Sensitivity MILP"
    metric = "sensitivity"
    metrics = ("sensitivity",)


class KurtMilp(_Penalised):
    """Fixed penalties, doubled for layers flagged by kurtosis."""

    name = "kurt-milp"
    title = "Kurtosis MILP"
    metric = "kurtosis"
    metrics = ("kurtosis",)
