"""The same configuration for every matrix."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lsq_core.bits import LADDER, QuantConfig
from lsq_core.planning.frontier import Frontier, Segment
from lsq_core.planning.methods.base import LadderPlanner
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest


class Uniform(LadderPlanner):
    """Uniform quantization, the reference for all other methods."""

    name = "uniform"
    title = "Uniform"
    meaning = "The same configuration for every matrix."
    summary = (
        "Every weight matrix gets the same configuration. The other methods are compared with it."
    )
    source = "Badri & Shaji, Half-Quadratic Quantization (2023)"
    use = "A baseline, and models without a profile."
    limits = (
        "At 3 bits and below a few sensitive layers dominate the loss, and get no more bits than "
        "the others."
    )
    color, symbol = "#8a929c", "circle"
    has_base = True

    def frontier(self, problem: Problem, request: PlanRequest, bases: list[int]) -> Frontier:
        """Return one start for each base, without moves."""
        starts = [uniform_start(problem, base) for base in bases]
        segments = [Segment(start, problem.nominal(start)) for start in starts]
        return Frontier(sort_by_bytes(segments), problem.bytes)


def uniform_start(problem: Problem, base: int) -> np.ndarray:
    """Return the choice (n,) of a base for all matrices, clipped to the range of their pins."""
    return np.clip(base, problem.low, problem.high)


def sort_by_bytes(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Sort segments by the bytes of their starts."""
    return tuple(sorted(segments, key=lambda segment: segment.start_bytes))


def uniform_within(bits: float, ladder: tuple[QuantConfig, ...] = LADDER) -> QuantConfig:
    """Return the largest uniform configuration with at most ``bits`` bits per parameter.

    Plans of that size are compared with it. If none is small enough, return the smallest.
    """
    return max(
        (c for c in ladder if c.nominal_bits <= bits + 1e-6),
        key=lambda c: c.nominal_bits,
        default=ladder[0],
    )


def usable_bases(problem: Problem) -> list[int]:
    """Return the indices of the bases whose uniform start is allowed for every matrix."""
    rows = np.arange(len(problem.matrices))
    return [
        stop
        for stop in range(len(problem.options))
        if problem.allowed[rows, uniform_start(problem, stop)].all()
    ]
