"""The interface of a planning method."""

from __future__ import annotations

from typing import Protocol

from lsq_core.bits import LADDERS, Config, get_ladder
from lsq_core.errors import InputError
from lsq_core.planning.frontier import Frontier
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest


class Planner(Protocol):
    """A method: attributes that describe it, and the frontier of its plans for every budget."""

    #: Identifier on the command line, in plans and in the database.
    name: str
    title: str
    #: One sentence on what it does.
    meaning: str
    #: What its card tells: what it does in two sentences, where it comes from, what it is best for,
    #: and where it is known to fail. Empty where nothing is known.
    summary: str
    source: str
    use: str
    limits: str
    #: Colour and Plotly marker symbol in charts.
    color: str
    symbol: str
    #: Metrics that the profile must hold: names of ``lsq_core.profiling.metrics.METRICS``.
    metrics: tuple[str, ...]
    #: Fields of :class:`PlanRequest` that it reads besides method, base, budget and pins.
    fields: tuple[str, ...]
    #: Whether its plans start from a base configuration; otherwise it minimises a cost.
    has_base: bool
    #: Whether it reads :class:`lsq_core.planning.problem.Impact`.
    reads_rows: bool
    #: Names of the ladders that it plans on (:data:`lsq_core.bits.LADDERS`).
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
            If the request is on a ladder that the method doesn't plan on.
        """
        ...

    def frontier(self, problem: Problem, request: PlanRequest, bases: list[int]) -> Frontier:
        """Return the plans for every budget, from each of the given bases if it has one."""
        ...


class LadderPlanner:
    """A planner that gives each matrix a configuration of the ladder, as all but one do."""

    summary = source = use = limits = ""
    metrics: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    reads_rows = False
    reads_refinement = False
    ladders: tuple[str, ...] = tuple(LADDERS)
    cost_unit = ""

    def options(self, request: PlanRequest) -> tuple[Config, ...]:
        """Return the ladder that the request names.

        Raises
        ------
        InputError
            If the method doesn't plan on that ladder.
        """
        check_ladder(self, request)
        return get_ladder(request.ladder)


def check_ladder(planner: Planner, request: PlanRequest) -> None:
    """Raise :class:`InputError` for a request on a ladder that a method doesn't plan on."""
    if request.ladder not in planner.ladders:
        raise InputError(
            f"{planner.title} plans on the {' or '.join(planner.ladders)} ladder alone; "
            f"plan without the {request.ladder} one."
        )
