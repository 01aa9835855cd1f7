"""Restrictions that a request puts on plans: a server's configurations, ties and pins."""

from __future__ import annotations

from dataclasses import replace

from lsq_core.planning.pins import apply_pins
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.planning.servers import get_server
from lsq_core.planning.ties import Tie, merge_groups


def restrict(problem: Problem, request: PlanRequest) -> Problem:
    """Restrict a problem to what a request's server, ties and pins allow.

    Raises
    ------
    InputError
        If a tie names a module that the model lacks or joins no modules, the server and ties leave
        some matrix without a configuration, or a pin is invalid
        (:func:`lsq_core.planning.pins.apply_pins`).
    """
    return apply_pins(apply_ties(problem, request), request.pins)


def apply_ties(problem: Problem, request: PlanRequest) -> Problem:
    """Restrict a problem to a request's server and ties, without its pins.

    Raises
    ------
    InputError
        As for :func:`restrict`, except for pins.
    """
    if not request.has_ties:
        return problem
    ties = [Tie.parse(text) for text in request.ties]
    for tie in ties:
        tie.check(problem.matrices)
    groups = [group for tie in ties for group in tie.groups(problem.matrices)]
    permitted, server = None, None
    if request.serve is not None:
        server = get_server(request.serve)
        permitted = server.permitted(problem.matrices, problem.options)
        groups += server.groups(problem.matrices)
    restricted = replace(
        problem,
        groups=merge_groups(groups),
        permitted=permitted,
        permitted_by=f"{server.title} supports {server.summary}" if server else "",
    )
    restricted.check_options()
    return restricted
