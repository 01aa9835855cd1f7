"""The same stop for every matrix."""

from __future__ import annotations

import numpy as np

from lsq_core.config import LADDER
from lsq_core.plan.frontier import Frontier, Segment
from lsq_core.plan.problem import PlanRequest, Problem


class Uniform:
    """Plain quantization, what a model is compared against."""

    name = "uniform"
    title = "Uniform"
    metrics: tuple[str, ...] = ()
    has_base = True

    def frontier(self, problem: Problem, request: PlanRequest, bases: list[int]) -> Frontier:
        """One start for each base, no moves."""
        starts = [np.full(len(problem.matrices), base) for base in bases]
        return Frontier(tuple(Segment(s, problem.nominal(s)) for s in starts))


def usable_bases(problem: Problem) -> list[int]:
    """Ladder indices whose group size fills every matrix, in the order of their bytes."""
    return [stop for stop in range(len(LADDER)) if problem.allowed[:, stop].all()]
