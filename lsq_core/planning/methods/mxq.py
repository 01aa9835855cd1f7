"""MXQ [B] and its variants: knapsacks on costs that are cheap to measure."""

from __future__ import annotations

import numpy as np

from lsq_core.planning.methods.boost import flagged_layers
from lsq_core.planning.methods.knapsack import Knapsack
from lsq_core.planning.problem import Problem


class Mxq(Knapsack):
    """Knapsack on the Frobenius error of the weights."""

    name = "mxq"
    title = "MXQ"
    meaning = "The least summed Frobenius error of the weights."
    summary = (
        "Chooses a configuration for each matrix so that the summed Frobenius error of the "
        "weights is minimal within the budget. It needs only the weights, no calibration text."
    )
    source = "Zhang et al., A Mixed Quantization Approach (ICAART 2025)"
    use = (
        "Any budget, without calibration: on SmolLM2 (4,096 tokens of WikiText-2) perplexity "
        "38.1 at 3.6 bits, against 53.1 for uniform 3.51."
    )
    limits = (
        "Errors count equally in all layers. Where predictions depend on a few layers, "
        "loss-aware does better at the same size (25.2)."
    )
    color, symbol = "#7A5BB5", "triangle-up"
    cost_unit = "weight error"
    metrics = ("weight_error",)

    def cost(self, problem: Problem) -> np.ndarray:
        """Return ``‖W − Ŵ_c‖_F``."""
        return problem.by_config["weight_error"]


class KurtScaled(Knapsack):
    """MXQ with errors weighted by up to a factor of two where the weights have heavy tails."""

    name = "kurt-scaled"
    title = "Kurtosis-scaled MXQ"
    meaning = "MXQ with errors weighted up to twice as much where the weights have heavy tails."
    summary = (
        "MXQ with errors weighted up to twice as much where the weights have heavy tails. It needs "
        "only the weights."
    )
    source = "the authors' lm-quant-toolkit"
    use = "Comparing with MXQ, where a few layers have heavy tails."
    limits = (
        "The factor is fixed by hand: kurtosis scaled to 0–1 within each module type, "
        "whatever its range."
    )
    color, symbol = "#A58BD6", "triangle-down"
    cost_unit = "scaled weight error"
    metrics = ("weight_error", "kurtosis")

    def cost(self, problem: Problem) -> np.ndarray:
        """Return ``‖W − Ŵ_c‖_F · (1 + k)``; ``k`` is the kurtosis scaled to 0–1 per module type."""
        kurtosis = problem.scores["kurtosis"]
        types = np.array([m.type for m in problem.matrices])
        scaled = np.zeros(len(types))
        for kind in dict.fromkeys(types):
            own = kurtosis[types == kind]
            spread = own.max() - own.min()
            scaled[types == kind] = (own - own.min()) / spread if spread > 0 else 0.0
        return problem.by_config["weight_error"] * (1 + scaled)[:, None]


class _Penalised(Knapsack):
    """The toolkit's MILP with fixed penalties, doubled for layers that Algorithm 1 flags."""

    #: The metric that Algorithm 1 is applied to.
    metric: str
    cost_unit = "penalty"

    def cost(self, problem: Problem) -> np.ndarray:
        """Return ``100 · penalty(b1) · f / bpp(c) · p/P``.

        The penalty is 4 for 2 bits, 2 for 3 bits and 1 for more; for 1 bit, which the toolkit
        doesn't have, it is 8. ``f`` is 2 for flagged layers, else 1; ``p/P`` is the matrix's share
        of all weights.
        """
        flagged = flagged_layers(problem, self.metric, 0)
        doubled = np.array([2.0 if m.layer in flagged[m.type] else 1.0 for m in problem.matrices])
        options = problem.options
        penalty = np.array(
            [{1: 8.0, 2: 4.0, 3: 2.0}.get(c.bits, 1.0) / c.nominal_bits for c in options]
        )
        share = problem.numel / problem.total
        return 100 * (doubled * share)[:, None] * penalty


class SensiMilp(_Penalised):
    """MILP with fixed penalties, doubled for layers flagged by sensitivity."""

    name = "sensi-milp"
    title = "Sensitivity MILP"
    meaning = "The least sum of fixed penalties on low bits, doubled in layers of high sensitivity."
    summary = (
        "Each bit width has a fixed penalty, doubled in layers that Algorithm 1 flags by "
        "sensitivity; their sum is minimal within the budget. The size of errors is ignored."
    )
    source = "the authors' lm-quant-toolkit"
    use = "Comparing with the toolkit's published plans."
    limits = (
        "Layers that are not flagged are treated alike, so the solver chooses among them "
        "arbitrarily."
    )
    color, symbol = "#C0812B", "star"
    metric = "sensitivity"
    metrics = ("sensitivity",)


class KurtMilp(_Penalised):
    """MILP with fixed penalties, doubled for layers flagged by kurtosis."""

    name = "kurt-milp"
    title = "Kurtosis MILP"
    meaning = "The least sum of fixed penalties on low bits, doubled in layers of high kurtosis."
    summary = (
        "Each bit width has a fixed penalty, doubled in layers that Algorithm 1 flags by "
        "kurtosis; their sum is minimal within the budget. The size of errors is ignored."
    )
    source = "the authors' lm-quant-toolkit"
    use = "Comparing with the toolkit's published plans."
    limits = (
        "Layers that are not flagged are treated alike, so the solver chooses among them "
        "arbitrarily."
    )
    color, symbol = "#8C6D31", "hexagon"
    metric = "kurtosis"
    metrics = ("kurtosis",)
