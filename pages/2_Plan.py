"""Which matrix gets which bits: a method, a base or a budget, and the plan that follows it live."""

from __future__ import annotations

from dataclasses import replace

from lsq_core.errors import LsqError
from lsq_core.plan.pins import with_pins
from lsq_core.ui import known, plan_panels, plan_rows, state, words
from lsq_core.ui.page import Here, headline, page
from lsq_core.ui.plan_controls import controls
from lsq_core.ui.safe import st


def plan_page(here: Here) -> None:
    """Controls, the plan's first line, its live picture, and what else there is to know of it."""
    info = here.info
    state.begin_settings(info.fingerprint, known.newest_settings(here.store, info))
    settings = state.settings()
    found = known.profile(here.store, info, settings)
    offered = plan_panels.offered(info, found)
    state.begin_plan(found is not None)
    state.choose_among(offered)
    plan_panels.begin_prediction(here, info)
    first = st.container()
    controls(known.problem(info, found), offered)
    asked = plan_panels.Asked(here, info, found, settings, state.plan_request())
    missing = plan_panels.missing_metrics(asked)
    if missing:
        with first:
            plan_panels.say_what_is_missing(asked, missing)
        return
    try:
        moved = plan_panels.take_budget(with_pins(asked.problem, asked.request.pins), asked.request)
        asked = replace(asked, request=state.plan_request())  # the budget the slider settled on
        plan = known.plan(info, found, asked.request, settings, asked.rows)
        if moved:
            st.warning(moved)
        plan_panels.show_live(asked, plan)
    except LsqError as error:
        with first:
            headline("There is no such plan.")
        st.error(words.literal(str(error)))
        return
    finally:
        state.share_plan()
    with first:
        plan_panels.say_what_it_takes(asked, plan)
    plan_panels.actions(asked, plan)
    if asked.rows is not None:
        plan_rows.show_rows(here, asked.problem, plan, asked.rows)
    plan_panels.show_frontiers(asked)
    plan_panels.show_accounts(plan)
    plan_panels.show_flagged(plan)


page("Plan", plan_page)
