"""The requested budget, and the nearest one that a plan can have.

The requested budget is kept: if a server or a pin needs more, the plan gets more, and returns to
the requested budget once they are removed.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from lsq_core.errors import InputError
from lsq_core.model.info import ModelInfo
from lsq_core.planning.constraints import restrict
from lsq_core.planning.methods import get_planner
from lsq_core.planning.methods.uniform import uniform_start, usable_bases
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.ui import state
from lsq_core.units import format_bytes


def shown_request(info: ModelInfo, settings: ProfileSettings) -> PlanRequest:
    """Return the request of the plan shown on the Plan page; an invalid one is left unchanged."""
    request = state.plan_request()
    options = get_planner(request.method).options(request)
    try:
        problem = restrict(Problem(info.matrices).with_options(options), request)
        return within_reach(problem, request, settings.metadata)[0]
    except InputError:
        return request


def within_reach(problem: Problem, request: PlanRequest, metadata: str) -> tuple[PlanRequest, str]:
    """Return the request with the nearest feasible budget, and a notice if it differs, else ''.

    ``problem`` must already be restricted by the request.

    Raises
    ------
    InputError
        If the budget cannot be parsed, or there is no plan at all.
    """
    if request.budget is None:
        return request, ""
    budget = request.parse_budget(problem.total)
    low, high = feasible(problem, request.method, request.base)
    if budget.planned_bytes is None:
        requested = 8 * budget.nominal_bytes / problem.total
        nearest = max(min(requested, high), low)  # low may be rounded above high
        if nearest == requested:
            return request, ""
        end = "smallest" if nearest > requested else "largest"
        asked, found = f"{requested:.2f} bits", f"{nearest:.2f} bits"
        near = abs(nearest - requested) <= 0.005
    else:
        smallest, largest = feasible_planned(problem, request, metadata)
        if smallest <= budget.planned_bytes <= largest:
            return request, ""
        end = "smallest" if budget.planned_bytes < smallest else "largest"
        nearest, size = (low, smallest) if end == "smallest" else (high, largest)
        asked, found, near = format_bytes(budget.planned_bytes), format_bytes(size), False
    shown = replace(request, budget=state.budget_text(nearest))
    if near:  # only rounded at an end
        return shown, ""
    under = f" {request.restrictions}" if request.restrictions else ""
    return shown, f"{asked} is out of reach{under}; showing the {end} plan, {found}."


def feasible(problem: Problem, method: str, base: str | None) -> tuple[float, float]:
    """Return bits per parameter of the smallest plan, which is the base if any, and the largest.

    The lower end is rounded up to the four decimals of a typed budget.
    """
    low, high = problem.feasible
    start = _base_choice(problem, method, base)
    if start is not None:
        low = problem.nominal(start)
    lowest = math.ceil(round(8e4 * low / problem.total, 4)) / 1e4
    return lowest, 8 * high / problem.total


def feasible_planned(problem: Problem, request: PlanRequest, metadata: str) -> tuple[int, int]:
    """Return planned bytes of the smallest plan, which is the base if any, and the largest."""
    smallest, largest = problem.feasible_planned(metadata)
    start = _base_choice(problem, request.method, request.base)
    return smallest if start is None else problem.planned_total(start, metadata), largest


def _base_choice(problem: Problem, method: str, base: str | None) -> np.ndarray | None:
    """Return the uniform choice that a method with a base starts from; None for other methods."""
    bases = usable_bases(problem)
    if not get_planner(method).has_base or not bases:
        return None
    configurations = {problem.options[i].stop_name: i for i in bases}
    return uniform_start(problem, configurations.get(base, bases[0]))
