"""What a planning method is."""

from __future__ import annotations

from typing import Protocol

from lsq_core.bits import (
    LADDER,
    Config,
)
from lsq_core.planning.frontier import Frontier
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest


class Planner(Protocol):
    """One file a planner, one entry in ``PLANNERS``: it answers every budget by a frontier."""

    name: str
    title: str
    #: What the profile must hold: names of ``lsq_core.profiling.metrics.METRICS``.
    metrics: tuple[str, ...]
    #: Whether its plans start from a base stop; one that does not has a cost to minimise.
    has_base: bool
    #: Whether it reads :class:`lsq_core.planning.problem.Impact`.
    reads_rows: bool

    def options(self, request: PlanRequest) -> tuple[Config, ...]:
        """What a matrix can be given, from few bits to many."""
        ...

    def frontier(self, problem: Problem, request: PlanRequest, bases: list[int]) -> Frontier:
        """Every budget's plan, from each of the given base stops where it starts from one."""
        ...


class LadderPlanner:
    """A planner that gives each matrix a stop of the ladder, as all but one do."""

    reads_rows = False

    def options(self, request: PlanRequest) -> tuple[Config, ...]:
        """What a matrix can be given."""
        return LADDER
