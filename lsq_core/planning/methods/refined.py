"""Plans refined by measurement (ours; :mod:`lsq_core.refinement`)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lsq_core.bits import PAPER
from lsq_core.errors import InputError
from lsq_core.planning.frontier import Frontier
from lsq_core.planning.methods.base import Planner
from lsq_core.planning.methods.knapsack import Knapsack
from lsq_core.planning.problem import Problem, Refinement
from lsq_core.planning.request import PlanRequest


class Refined(Knapsack):
    """Another method's plan, improved by exchanges that lower the measured KL divergence.

    Exchanges keep the plan's size and are proposed from gradients at the plan. The frontier uses
    the cost of the last accepted step: at the budget of the search it yields that step's plan, and
    at nearby budgets plans that were not measured.
    """

    name = "refined"
    title = "Refined"
    meaning = "Another method's plan, improved by exchanges that lower the measured KL divergence."
    summary = (
        "Starts from another method's plan. Gradients at that plan's quantized weights propose "
        "exchanges of the same size, and those that lower the measured KL divergence are kept, "
        "until none does."
    )
    source = "our own: Gauss–Newton steps around the quantized model, accepted by measurement"
    use = (
        "Few bits, where errors interact: on SmolLM2 at 3.25 bits one round lowered the KL "
        "divergence of loss-aware's plan from 0.79 to 0.69 on unseen text."
    )
    limits = (
        "It takes minutes per budget and selects on the calibration text, so evaluate it on "
        "another text."
    )
    color, symbol = "#7A3E9D", "star-triangle-up"
    cost_unit = "expected KL and its margin"
    fields = ("exact", "start")
    ladders = (PAPER,)
    reads_refinement = True

    def cost(self, problem: Problem) -> np.ndarray:
        """Return the last accepted step's cost in nats per token.

        Raises
        ------
        InputError
            If no plan has been refined yet.
        """
        return require_refinement(problem).cost

    def frontier(self, problem: Problem, request: PlanRequest, bases: list[int]) -> Frontier:
        """Return the plans for every budget; ``bases`` is not used."""
        found = super().frontier(problem, request, bases)
        return replace(found, notes=(*found.notes, _note(require_refinement(problem), request)))


def is_refinable(planner: Planner) -> bool:
    """Return whether a method's plans can be refined: it must be a knapsack, other than Refined."""
    return isinstance(planner, Knapsack) and not planner.reads_refinement


def check_refinable(planner: Planner) -> None:
    """Raise :class:`InputError` if a method's plans can't be refined."""
    if not is_refinable(planner):
        raise InputError(
            f"A plan by {planner.title} can't be refined: only those of knapsack methods can, such "
            "as kl-aware, loss-aware and mxq."
        )


def require_refinement(problem: Problem) -> Refinement:
    """Return the result of a search.

    Raises
    ------
    InputError
        If the problem has none.
    """
    if problem.refinement is None:
        raise InputError(
            "No plan has been refined yet; run 'lsq refine', or use the Plan page, to search for "
            "one within a budget."
        )
    return problem.refinement


def _note(found: Refinement, request: PlanRequest) -> str:
    steps = "1 step" if found.steps == 1 else f"{found.steps} steps"
    return (
        f"At {found.bits_per_param:.4g} bits, refining the plan by {request.refined_from} took "
        f"the KL divergence on the calibration text from {found.kl_start:.4g} to {found.kl:.4g} "
        f"in {steps}. Plans at other budgets, and exact ones, were not measured."
    )
