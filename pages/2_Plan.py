"""Which matrix gets which bits: a method, a base or a budget, and the plan that follows it live."""

from __future__ import annotations

from dataclasses import replace

from lsq_core.errors import LsqError
from lsq_core.planning.pins import with_pins
from lsq_core.ui import cached, state, words
from lsq_core.ui.page import Here, headline, page
from lsq_core.ui.plan import actions, live, prediction, query, rows, summary
from lsq_core.ui.plan.controls import controls
from lsq_core.ui.safe import st


def plan_page(here: Here) -> None:
    """Controls, the plan's first line, its live picture, and what else there is to know of it."""
    info = here.info
    state.begin_settings(info.fingerprint, cached.newest_settings(here.store, info))
    settings = state.settings()
    found = cached.profile(here.store, info, settings)
    offered = query.offered(info, found)
    state.begin_plan(found is not None)
    state.choose_among(offered)
    prediction.begin_prediction(here, info)
    first = st.container()
    controls(cached.problem(info, found), offered)
    asked = query.Asked(here, info, found, settings, state.plan_request())
    missing = query.missing_metrics(asked)
    if missing:
        with first:
            query.say_what_is_missing(asked, missing)
        return
    try:
        moved = live.take_budget(with_pins(asked.problem, asked.request.pins), asked.request)
        asked = replace(asked, request=state.plan_request())  # the budget the slider settled on
        plan = cached.plan(info, found, asked.request, settings, asked.rows)
        if moved:
            st.warning(moved)
        live.show_live(asked, plan)
    except LsqError as error:
        with first:
            headline("There is no such plan.")
        st.error(words.literal(str(error)))
        return
    finally:
        state.share_plan()
    with first:
        summary.say_what_it_takes(asked, plan)
    actions.actions(asked, plan)
    if asked.rows is not None:
        rows.show_rows(here, asked.problem, plan, asked.rows)
    prediction.show_frontiers(asked)
    summary.show_accounts(plan)
    summary.show_flagged(plan)


page("Plan", plan_page)
