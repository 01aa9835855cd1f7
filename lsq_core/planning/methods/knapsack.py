"""Base class of methods that minimise a sum of per-matrix costs (method §5)."""

from __future__ import annotations

import numpy as np

from lsq_core.planning.frontier import Frontier
from lsq_core.planning.hull import hull_frontier
from lsq_core.planning.methods.base import LadderPlanner
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest


class Knapsack(LadderPlanner):
    """A method that minimises a cost; subclasses define it for each matrix and configuration."""

    has_base = False
    fields = ("exact",)
    cost_unit = "cost"

    def cost(self, problem: Problem) -> np.ndarray:
        """Return the cost (n, options) of each matrix at each configuration; NaN if unavailable."""
        raise NotImplementedError

    def frontier(self, problem: Problem, request: PlanRequest, bases: list[int]) -> Frontier:
        """Return the plans for every budget; ``bases`` is not used."""
        return hull_frontier(self.cost(problem), problem)
