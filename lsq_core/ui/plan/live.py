"""The live planner, and the fields for budget and pins beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation.prediction import (
    features,
)
from lsq_core.planning.facts import facts
from lsq_core.planning.methods import PLANNERS, get_planner
from lsq_core.planning.pins import with_pins
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.planning.serving_memory import memories
from lsq_core.ui import cached, state, words
from lsq_core.ui.plan.controls import feasible
from lsq_core.ui.plan.query import Asked
from lsq_core.ui.planner import (
    Curve,
    Facts,
    LiveMethod,
    Preset,
    Solved,
    live_planner,
    take_commit,
)
from lsq_core.ui.safe import st

#: What a knapsack's cost is, as the planner's details say it.
_UNITS = {
    "high-impact": "predicted change of the output",
    "mxq": "weight error",
    "kurt-scaled": "scaled weight error",
    "sensi-milp": "penalty",
    "kurt-milp": "penalty",
    "sensi-knapsack": "squared output error",
    "loss-aware": "expected KL",
}


def take_budget(problem: Problem, request: PlanRequest) -> str:
    """What the slider settled on is the budget from here on, within what is feasible.

    Gives a sentence where the nearest feasible one takes its place, as when a pin needs more.
    """
    settled = take_commit()
    if request.budget is None:
        return ""
    low, high = feasible(problem, request.method, request.base)
    wanted = st.session_state["budget"] if settled is None else settled
    taken = st.session_state["budget"] = max(
        min(wanted, high), low
    )  # low may be rounded above high
    if abs(taken - wanted) <= 0.005:  # the rounding of an end
        return ""
    pinned = " with these pins" if request.pins else ""
    end = "smallest" if taken > wanted else "largest"
    return f"{wanted:.2f} bits is out of reach{pinned}: the {end} plan, {taken:.2f} bits, is shown."


def show_live(asked: Asked, plan: Plan) -> None:
    """The slider and the plans that it redraws; a plan asked for by its base has no slider."""
    problem = with_pins(asked.problem, asked.request.pins)
    stops = np.array([problem.options.index(c) for c in plan.configs])
    by_base = asked.request.budget is None
    methods = [live_method(asked, stops)]
    if asked.request.exact:
        methods = [replace(methods[0], solved=Solved(stops, plan.lower_bound))]
    against = st.session_state["against"]
    if not by_base and against in state.alike(asked.request.method, PLANNERS):
        try:
            other = asked.by(against)
            frontier = cached.frontier(other.info, other.found, other.request)
            budget = other.request.budget_for(problem)
            frontier.check_reaches(budget, problem)
            methods.append(live_method(other, frontier.at(budget.nominal_bytes).choice))
        except LsqError as error:
            st.caption(words.literal(f"Nothing to compare with: {error}"))
    live_planner(
        problem,
        methods,
        budget=None if by_base else st.session_state["budget"],
        other_bytes=asked.info.other_bytes or None,
        metadata=asked.settings.metadata,
        presets=[
            Preset(f"{m.gib} GB", m.bits, m.about)
            for m in memories(asked.info, problem, asked.settings.metadata)
        ],
        facts=[Facts(*pair) for pair in facts(problem, asked.request).items()],
        fixed=stops if by_base else None,
        feasible=feasible(problem, asked.request.method, asked.request.base),
        pins=asked.request.pins,
        on_pins=lambda pins: take_pins(asked, pins),
    )
    if "pins_refused" in st.session_state:
        st.warning(words.literal(st.session_state.pop("pins_refused")))


def take_pins(asked: Asked, pins: Sequence[str]) -> None:
    """Pins set on the plan itself; those that contradict the others are not taken."""
    try:
        with_pins(asked.problem, tuple(pins))
    except InputError as error:
        st.session_state["pins_refused"] = f"Not pinned. {error}"
        return
    st.session_state["pins"] = "\n".join(pins)


def live_method(asked: Asked, stops: np.ndarray) -> LiveMethod:
    """A method as the live planner draws it; ``stops`` (n,) is its plan at the budget."""
    name = asked.request.method
    frontier = cached.frontier(asked.info, asked.found, asked.request, asked.rows)
    said = asked.along
    curve, here = None, None
    if said is not None:
        p = said.prediction
        curve = Curve(said.bits, p.perplexity, p.low, p.high, said.full_precision)
        p = asked.predictor.predict(features(asked.problem, stops[None]))
        here = float(p.perplexity[0]), float(p.low[0]), float(p.high[0])
    unit = _UNITS.get(name, "cost")
    return LiveMethod(name, get_planner(name).title, frontier, unit, curve, here)
