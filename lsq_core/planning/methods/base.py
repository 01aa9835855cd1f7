"""The interface of a planning method."""

from __future__ import annotations

from typing import Protocol

from lsq_core.bits import LADDERS, Config, get_ladder
from lsq_core.errors import InputError
from lsq_core.planning.frontier import Frontier
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest


class Planner(Protocol):
    """A planning method: its descriptive attributes and the frontier of its plans."""

    #: Identifier on the command line, in plans and in the database.
    name: str
    title: str
    #: One sentence describing what it does.
    meaning: str
    #: Texts of its card: a short description, its origin, its best use and its known limits. Empty
    #: if unknown.
    summary: str
    source: str
    use: str
    limits: str
    #: Colour and Plotly marker symbol in charts.
    color: str
    symbol: str
    #: Metrics that the profile must hold: names of ``lsq_core.profiling.metrics.METRICS``.
    metrics: tuple[str, ...]
    #: Fields of :class:`PlanRequest` specific to the method, beyond those that all methods share
    #: (method, base, budget, pins, ties, serve and ladder).
    fields: tuple[str, ...]
    #: Whether its plans start from a base configuration; other methods minimise a cost.
    has_base: bool
    #: Whether it reads :class:`lsq_core.planning.problem.Impact`.
    reads_rows: bool
    #: Names of the ladders that it supports (:data:`lsq_core.bits.LADDERS`).
    ladders: tuple[str, ...]
    #: Whether it reads :class:`lsq_core.planning.problem.Refinement`.
    reads_refinement: bool
    #: The quantity that it minimises, with its unit if any; empty for a method with a base.
    cost_unit: str

    def options(self, request: PlanRequest) -> tuple[Config, ...]:
        """Return the configurations that a matrix can get, from few bits to many.

        Raises
        ------
        InputError
            If the method doesn't support the request's ladder.
        """
        ...

    def frontier(self, problem: Problem, request: PlanRequest, bases: list[int]) -> Frontier:
        """Return the plans for every budget; methods with a base start from each of ``bases``."""
        ...


class LadderPlanner:
    """Base class of planners that give each matrix a configuration of the ladder."""

    summary = source = use = limits = ""
    metrics: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    reads_rows = False
    reads_refinement = False
    ladders: tuple[str, ...] = tuple(LADDERS)
    cost_unit = ""

    def options(self, request: PlanRequest) -> tuple[Config, ...]:
        """Return the configurations of the request's ladder.

        Raises
        ------
        InputError
            If the method doesn't support that ladder.
        """
        check_ladder(self, request)
        return get_ladder(request.ladder)


def check_ladder(planner: Planner, request: PlanRequest) -> None:
    """Raise :class:`InputError` if a method doesn't support the request's ladder."""
    if request.ladder not in planner.ladders:
        raise InputError(
            f"{planner.title} supports only the {' or '.join(planner.ladders)} ladder, not the "
            f"{request.ladder} one."
        )
