"""Which matrix gets which bits: a method, a base or a budget, and the plan that follows."""

from __future__ import annotations

import math
import shlex
from dataclasses import replace

import pandas as pd
import streamlit as st

from lsq_core import charts
from lsq_core.config import LADDER, format_bytes
from lsq_core.errors import InputError, LsqError
from lsq_core.jsontext import json_text
from lsq_core.model import ModelInfo
from lsq_core.plan import PLANNERS, Plan, PlanRequest, Problem, get_planner
from lsq_core.plan.pins import with_pins
from lsq_core.plan.uniform import uniform_start, usable_bases
from lsq_core.profile import Profile, ProfileSettings
from lsq_core.ui import arguments, known, state, words
from lsq_core.ui.page import Here, headline, next_step, page

_METRICS = {"sensitivity": "by part", "sensitivity_module": "by module"}


def plan_page(here: Here) -> None:
    """Controls, the plan's first line, its picture, its sizes, and where it can go."""
    info = here.info
    state.begin_settings(info.fingerprint, known.newest_settings(here.store, info))
    settings = state.settings()
    found = known.profile(here.store, info, settings)
    state.begin_plan(found is not None)
    first = st.container()
    controls(pinned(known.problem(info, found)))
    state.share_plan()
    request = state.plan_request()
    missing = get_planner(request.method).metrics and found is None
    if missing:
        say_what_is_missing(here, request, settings, first)
        return
    try:
        plan = known.plan(info, found, request, settings)
    except LsqError as error:
        with first:
            headline("There is no such plan.")
        st.error(words.literal(str(error)))
        return
    with first:
        say_what_it_takes(plan)
    show_plan(plan, info)
    actions(here, info, plan, found, request, settings)
    show_accounts(plan)
    show_flagged(plan)


def pinned(problem: Problem) -> Problem:
    """With the pins that were typed; where they are wrong the plan says so, not the controls."""
    try:
        return with_pins(problem, state.pins())
    except InputError:
        return problem


# --- controls -------------------------------------------------------------------------------


def controls(problem: Problem) -> None:
    """One row: the method, a base or a budget, and what the method asks besides."""
    columns = st.columns([1.6, 1.5, 1.9, 1, 1, 0.85], vertical_alignment="bottom")
    with columns[0]:
        st.selectbox(
            "Method",
            list(PLANNERS),
            format_func=lambda name: PLANNERS[name].title,
            key="method",
            persist_state="session",
        )
    method = st.session_state["method"]
    with columns[1]:
        ask = how_to_ask(method)
    with columns[2]:
        if ask == "base":
            base_stop(problem)
        else:
            budget_slider(problem, method)
    if ask == "both":
        with columns[3]:
            base_stop(problem)
    elif state.boosts(method):
        with columns[3]:
            boost_stop()
    with columns[4]:
        if state.boosts(method):
            st.number_input(
                "Top m",
                0,
                key="top_m",
                persist_state="session",
                help="Flagged layers kept of a module type; 0 is all.",
            )
    with columns[5]:
        more(method, ask)


def how_to_ask(method: str) -> str:
    """By base, by budget, or by a base that a budget caps; some methods know budgets only."""
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


def budget_slider(problem: Problem, method: str) -> None:
    """Nominal bits per parameter, within what is feasible for this model and method."""
    low, high = (8 * size / problem.total for size in feasible(problem, method))
    low, high = math.ceil(100 * low - 1e-6) / 100, math.floor(100 * high + 0.5) / 100
    st.session_state["budget"] = min(max(st.session_state["budget"], low), high)
    st.slider(
        "Budget (bits per parameter)",
        low,
        high,
        step=0.01,
        format="%.2f",
        key="budget",
        persist_state="session",
        help="Nominal bits of the planned linear weights, metadata included.",
    )


def feasible(problem: Problem, method: str) -> tuple[float, float]:
    """Nominal bytes of the smallest and largest plan; a method with a base starts at its first."""
    low, high = problem.feasible
    bases = usable_bases(problem)
    if get_planner(method).has_base and bases:
        low = problem.nominal(uniform_start(problem, bases[0]))
    return low, high


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


def more(method: str, ask: str) -> None:
    """What is seldom changed."""
    with st.popover("More", width="stretch"):
        if ask == "both" and state.boosts(method):
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
        if not get_planner(method).has_base:
            st.checkbox(
                "Solve to the optimum",
                key="exact",
                persist_state="session",
                help="An integer program in place of the frontier; it may take seconds.",
            )
        st.text_area(
            "Pins",
            key="pins",
            placeholder="*.layers.0.*=b8g64",
            persist_state="session",
            help="One a line: module names, and the configuration or range that they get, such "
            "as *.down_proj=b3g128..b4g64.",
        )
        settings = state.settings()
        st.caption(
            f"Profile: {settings.calibration}, {settings.quantizer}, axis {settings.axis}, "
            f"{settings.metadata} metadata, {settings.samples} texts."
        )
        st.page_link("pages/1_Explore.py", label="Choose another profile")


# --- what it is -----------------------------------------------------------------------------


def say_what_is_missing(
    here: Here, request: PlanRequest, settings: ProfileSettings, first: object
) -> None:
    """A method that reads a profile, where there is none."""
    planner = get_planner(request.method)
    with first:
        headline(
            f"{planner.title} needs a profile of {here.source.name}.",
            f"It reads {words.listed(planner.metrics).replace('_', ' ')}, measured with "
            f"{settings.calibration}, {settings.quantizer}, axis {settings.axis} and "
            f"{settings.metadata} metadata; these haven't been measured yet.",
        )
    next_step("pages/1_Explore.py", "Profile it on the Explore page")
    st.caption("Uniform needs none. A run, on the Run page, measures what is missing first.")


def say_what_it_takes(plan: Plan) -> None:
    """The first line: bits, bytes, and against its base or the nearest uniform plan."""
    text = f"{plan.bits_per_param:.2f} bits: {format_bytes(plan.planned_bytes)} planned"
    under = " ".join(["Bits per planned parameter, metadata included.", *plan.notes, gap(plan)])
    if len(set(plan.configs)) == 1:
        headline(f"{text}, every matrix the same.", under)
        return
    named = [c for c in LADDER if c.stop_name == plan.base]
    nearest = min(LADDER, key=lambda c: abs(plan.bits_per_param - c.nominal_bits))
    reference = named[0] if named else nearest
    more = plan.bits_per_param / reference.nominal_bits - 1
    headline(f"{text}, {words.signed_percent(more)} against uniform {reference.stop_name}.", under)


def gap(plan: Plan) -> str:
    """How far a knapsack's plan can be from the optimum, or nothing for another method."""
    if not plan.objective:
        return ""
    share = 100 * (plan.objective - plan.lower_bound) / abs(plan.objective)
    return f"At most {share:.2g} % above the least possible cost at this budget."


def plan_frame(plan: Plan) -> pd.DataFrame:
    """A row for each matrix: ``module, type, layer, config, z``."""
    return pd.DataFrame(
        {
            "module": [m.name for m in plan.matrices],
            "type": [m.type for m in plan.matrices],
            "layer": [m.layer for m in plan.matrices],
            "config": [c.name for c in plan.configs],
            "z": [plan.reasons.get(m.name, math.nan) for m in plan.matrices],
        }
    )


def show_plan(plan: Plan, info: ModelInfo) -> None:
    """The plan as a picture."""
    st.plotly_chart(charts.plan_heatmap(plan_frame(plan)), config=charts.CONFIG, key="heatmap")
    if any(m.expert is not None for m in info.matrices):
        st.caption("Experts of a layer share a cell, which shows their commonest configuration.")


def show_accounts(plan: Plan) -> None:
    """Every account of its size, each by its own name."""
    accounts = [
        ("Nominal", format_bytes(plan.nominal_bytes), f"{plan.bits_per_param:.4f} bits",
         "The papers' formula; budgets in bits per parameter mean this."),
        ("Planned", format_bytes(plan.planned_bytes), f"{plan.metadata} metadata",
         "What this project's packing of the linear weights occupies, exactly."),
        ("Whole model", format_bytes(plan.model_bytes), "with the rest",
         "Planned bytes, and embeddings, norms and head in the checkpoint's own precision."),
        ("Weight-only", f"{plan.weight_only_bits:.4f} bits", "codes alone",
         "Bits per planned parameter without any metadata."),
        ("fp16 metadata", f"{plan.bits_with_fp16_metadata:.4f} bits", "as hqq keeps them",
         "Bits per planned parameter if scale and zero stayed fp16."),
    ]  # fmt: skip
    for column, (label, value, under, about) in zip(
        st.columns(len(accounts)), accounts, strict=True
    ):
        column.metric(label, value, under, delta_color="off", delta_arrow="off", help=about)


def show_flagged(plan: Plan) -> None:
    """The matrices that were moved from the base, strongest first."""
    if not plan.reasons:
        return
    configs = {m.name: c for m, c in plan.choice.items()}
    ranked = "draw" if state.is_ablation(plan.method) else "z"
    with st.expander(f"{len(plan.reasons)} matrices moved from the base"):
        st.dataframe(
            pd.DataFrame(
                {
                    "module": list(plan.reasons),
                    ranked: list(plan.reasons.values()),
                    "configuration": [configs[name].name for name in plan.reasons],
                    "bits": [configs[name].nominal_bits for name in plan.reasons],
                }
            ),
            column_config={
                ranked: st.column_config.NumberColumn(format="%.2f"),
                "bits": st.column_config.NumberColumn(format="%.2f"),
            },
            hide_index=True,
        )


# --- where it can go ------------------------------------------------------------------------


def actions(
    here: Here,
    info: ModelInfo,
    plan: Plan,
    found: Profile | None,
    request: PlanRequest,
    settings: ProfileSettings,
) -> None:
    """Run it, take it along, keep it, or do the same in a terminal."""
    content = plan.to_json() | {
        "model": here.source.name,
        "fingerprint": info.fingerprint,
        "profile": found.id if found else None,
        "covered": info.covered,
    }
    with st.container(horizontal=True):
        if st.button("Quantize and evaluate", type="primary", icon=":material/arrow_forward:"):
            st.switch_page("pages/3_Run.py")
        st.download_button(
            "Download plan",
            json_text(content, indent=1),
            f"plan-{plan.method}-{plan.bits_per_param:.2f}.json",
            "application/json",
            on_click="ignore",
        )
        with st.popover("Save or open"):
            save(here, info, plan, found)
        with st.popover("Command line"):
            words_of = ["plan", *arguments.model_arguments(here.source, here.device)]
            words_of += [*arguments.plan_arguments(request, settings), "--out", "plan.json"]
            st.code(f"python -m lsq_core {shlex.join(words_of)}", language="bash", wrap_lines=True)


def save(here: Here, info: ModelInfo, plan: Plan, found: Profile | None) -> None:
    """Keep the plan under a name, or set the controls to one that was kept."""
    if not info.fingerprint:
        st.write("A plan can be kept once the model has been fetched; profiling or a run does.")
        return
    name = st.text_input("Name", key="plan_name").strip()
    if st.button("Save the plan", disabled=not name):
        here.store.save_plan(plan, info.fingerprint, found.id if found else None, name)
        st.success(f"Kept as '{name}'.")
    kept = known.named_plans(here.store, info.fingerprint)
    if len(kept):
        titles = dict(zip(kept["id"], kept["name"], strict=True))
        id = st.selectbox("Kept plans", list(titles), format_func=titles.get)
        st.button("Open", on_click=open_plan, args=(here, id))


def open_plan(here: Here, id: str) -> None:
    """Set the controls to what a kept plan was asked for."""
    content = here.store.plan_content(id)
    state.set_plan(PlanRequest(**content["request"]))
    grid = {"metadata": content["metadata"], "axis": content["axis"]}
    state.set_settings(replace(state.settings(), **grid))


page("Plan", plan_page)
