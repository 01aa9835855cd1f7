"""The Plan page's controls: a method, how to ask it, another to compare with, and the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lsq_core.bits import GROUP_SIZES, LADDER
from lsq_core.errors import InputError
from lsq_core.planning.methods import PLANNERS, get_planner
from lsq_core.planning.methods.uniform import uniform_start, usable_bases
from lsq_core.planning.pins import with_pins
from lsq_core.planning.problem import Problem
from lsq_core.ui import state
from lsq_core.ui.safe import st

_RATIOS = {
    "full": "together in a block",
    "diagonal": "each for itself",
    "uniform": "one for all",
}
_LOSSES = {"block": "the block's own output", "model": "the whole model's output"}
_METRICS = {"sensitivity": "by part", "sensitivity_module": "by module"}


def controls(problem: Problem, offered: Sequence[str]) -> None:
    """One row with the methods that are offered; the budget is on the live planner's slider."""
    columns = st.columns([1.6, 1.5, 1.1, 1, 1.6, 0.85], vertical_alignment="bottom")
    with columns[0]:
        st.selectbox(
            "Method",
            list(offered),
            format_func=lambda name: PLANNERS[name].title,
            key="method",
            persist_state="session",
        )
    method = st.session_state["method"]
    with columns[1]:
        ask = how_to_ask(method)
    with columns[2]:
        if ask != "budget":
            base_stop(pinned(problem))
        elif state.boosts(method):
            boost_stop()
        elif state.reads_rows(method):
            widths()
    with columns[3]:
        if state.boosts(method):
            top_m()
        elif state.reads_rows(method):
            group_size()
    with columns[4]:
        against(state.alike(method, offered), ask)
    with columns[5]:
        more(method, ask)


def how_to_ask(method: str) -> str:
    """By base, by budget, or by a base that a budget caps; some methods know budgets only."""
    if state.reads_rows(method):
        st.selectbox(
            "Ratios",
            list(_RATIOS),
            format_func=_RATIOS.get,
            key="ratios",
            persist_state="session",
            help="How the share of high-impact rows is chosen: one for all matrices, for each "
            "matrix by its own loss alone, or for all matrices of a block together.",
        )
        return "budget"
    if not get_planner(method).has_base:
        st.selectbox("Ask by", ["budget"], format_func=state.ASKS.get, disabled=True)
        return "budget"
    return st.selectbox(
        "Ask by",
        list(state.ASKS),
        format_func=state.ASKS.get,
        key="ask",
        persist_state="session",
    )


def base_stop(problem: Problem) -> None:
    """The stop that every matrix gets at least."""
    stops = [LADDER[i].stop_name for i in usable_bases(problem)]
    if not stops:
        st.info("No single group size fills every matrix; choose a budget and MXQ.")
        return
    if st.session_state["base"] not in stops:
        st.session_state["base"] = stops[0]
    st.selectbox("Base (bits)", stops, key="base", persist_state="session")


def boost_stop() -> None:
    """How far a flagged layer is raised."""
    st.number_input(
        "Boost by",
        0,
        11,
        key="boost_stop",
        persist_state="session",
        help="A flagged layer gets the stop so many above the base.",
    )


def top_m() -> None:
    """How many flagged layers are raised."""
    st.number_input(
        "Top m",
        0,
        key="top_m",
        persist_state="session",
        help="Flagged layers kept of a module type; 0 is all.",
    )


def widths() -> None:
    """The bits of most rows and of the high-impact ones."""
    st.selectbox(
        "Bits",
        state.WIDTHS,
        format_func=lambda text: "{} and {}".format(*text.split("+")),
        key="widths",
        persist_state="session",
        help="Bits of most rows, and of the high-impact ones; 16 keeps those in fp16.",
    )


def group_size() -> None:
    """Weights that share a scale and zero."""
    st.selectbox("Group size", GROUP_SIZES, key="group_size", persist_state="session")


def against(methods: Sequence[str], ask: str) -> None:
    """Another method on the same budget, drawn beneath; a base alone is no budget."""
    others = ["none", *methods]
    if st.session_state["against"] not in others:
        st.session_state["against"] = "none"
    st.selectbox(
        "Compare with",
        others,
        format_func=lambda name: PLANNERS[name].title if name in PLANNERS else "nothing",
        key="against",
        persist_state="session",
        disabled=ask == "base" or not methods,
        help="Another method's plan for the same budget. Ask by budget to compare. Mixed rows "
        "and the ladder don't fit into one picture; Compare shows their runs side by side.",
    )


def more(method: str, ask: str) -> None:
    """What is seldom changed."""
    with st.popover("More", width="stretch"):
        if ask != "budget" and state.boosts(method):
            boost_stop()
        if state.reads_sensitivity(method):
            st.selectbox(
                "Sensitivity",
                list(_METRICS),
                format_func=_METRICS.get,
                key="metric",
                persist_state="session",
            )
        if state.is_ablation(method):
            st.number_input("Seed of the draw", 0, key="seed", persist_state="session")
        if state.reads_rows(method):
            measured_by()
        elif not get_planner(method).has_base:
            st.checkbox(
                "Solve to the optimum",
                key="exact",
                persist_state="session",
                help="A search that proves its plan, in place of the frontier; on a large model "
                "it may take seconds.",
            )
        st.text_area(
            "Pins",
            key="pins",
            placeholder="*.layers.0.*=" + ("b2h3r20g128" if state.reads_rows(method) else "b8g64"),
            persist_state="session",
            help="One a line: module names, and the configuration or range that they get, such "
            "as *.down_proj=b3g128..b4g64.",
        )
        settings = state.settings()
        st.caption(
            f"Profile: {settings.calibration}, {settings.quantizer}, axis {settings.axis}, "
            f"{settings.metadata} metadata."
        )
        st.page_link("pages/1_Explore.py", label="Choose another profile")


def measured_by() -> None:
    """The loss that ratios are measured by, and whether its curvature is mended."""
    st.selectbox(
        "Loss",
        list(_LOSSES),
        format_func=_LOSSES.get,
        key="loss",
        persist_state="session",
        help="What the interactions are measured by. The whole model's runs every block from the "
        "changed one on, and the head: many times dearer.",
    )
    st.checkbox(
        "Without negative curvature",
        key="clip",
        persist_state="session",
        help="Take the negative eigenvalues out of each block's interactions.",
    )


def pinned(problem: Problem) -> Problem:
    """With the pins that were typed; where they are wrong the plan says so, not the controls."""
    try:
        return with_pins(problem, state.pins())
    except InputError:
        return problem


def feasible(problem: Problem, method: str, base: str | None) -> tuple[float, float]:
    """Bits a parameter of the smallest and largest plan; a method with a base starts at one.

    The lowest is rounded up to the four decimals that a budget is typed with.
    """
    low, high = problem.feasible
    bases = usable_bases(problem)
    if get_planner(method).has_base and bases:
        stops = {LADDER[i].stop_name: i for i in bases}
        low = problem.nominal(uniform_start(problem, stops.get(base, bases[0])))
    lowest = math.ceil(round(8e4 * low / problem.total, 4)) / 1e4
    return lowest, 8 * high / problem.total
