"""The same stop for every matrix."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lsq_core.planning.frontier import Frontier, Segment
from lsq_core.planning.methods.base import LadderPlanner
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest


class Uniform(LadderPlanner):
    """Plain quantization, what a model is compared against."""

    name = "uniform"
    title = "Uniform"
    metrics: tuple[str, ...] = ()
    has_base = True

    def frontier(self, problem: Problem, request: PlanRequest, bases: list[int]) -> Frontier:
        """One start for each base, no moves."""
        starts = [uniform_start(problem, base) for base in bases]
        segments = [Segment(start, problem.nominal(start)) for start in starts]
        return Frontier(sort_by_bytes(segments), problem.bytes)


def uniform_start(problem: Problem, base: int) -> np.ndarray:
    """A stop for all matrices (n,); a pinned one gets the nearest that its pin allows."""
    return np.clip(base, problem.low, problem.high)


def sort_by_bytes(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Segments in the order of their starts' bytes."""
    return tuple(sorted(segments, key=lambda segment: segment.start_bytes))


def usable_bases(problem: Problem) -> list[int]:
    """Options whose group size fills every matrix, by index."""
    rows = np.arange(len(problem.matrices))
    return [
        stop
        for stop in range(len(problem.options))
        if problem.allowed[rows, uniform_start(problem, stop)].all()
    ]
