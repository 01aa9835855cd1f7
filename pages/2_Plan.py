"""Which matrix gets which bits: a method, a base or a budget, and the plan that follows it live."""

from __future__ import annotations

from dataclasses import replace

from lsq_core.errors import LsqError
from lsq_core.planning.constraints import restrict
from lsq_core.ui import cached, state, words
from lsq_core.ui.page import PageContext, headline, page
from lsq_core.ui.plan import actions, live, prediction, query, rows, summary
from lsq_core.ui.plan.controls import render_controls
from lsq_core.ui.safe import st


def plan_page(ctx: PageContext) -> None:
    """Controls, the plan's first line, its live picture, and what else there is to know of it."""
    info = ctx.info
    state.init_settings(cached.identity(info), cached.newest_settings(ctx.store, info))
    settings = state.settings()
    profile = cached.profile(ctx.store, info, settings)
    available_methods = query.available_methods(info, profile)
    state.init_plan(profile is not None)
    state.restrict_methods(available_methods)
    prediction.init_prediction(ctx, info)
    header = st.container()
    render_controls(cached.problem(info, profile), available_methods, profile)
    plan_query = query.PlanQuery(ctx, info, profile, settings, state.plan_request())
    missing = query.missing_metrics(plan_query)
    if missing:
        with header:
            query.render_missing_metrics(plan_query, missing)
        return
    try:
        notice = live.set_budget(
            restrict(plan_query.problem, plan_query.request), plan_query.request
        )
        plan_query = replace(
            plan_query, request=state.plan_request()
        )  # the budget the slider settled on
        plan = cached.plan(info, profile, plan_query.request, settings, plan_query.rows)
        if notice:
            st.warning(notice)
        live.show_live_plan(plan_query, plan)
    except LsqError as error:
        with header:
            headline("No such plan.")
        st.error(words.escape(str(error)))
        return
    finally:
        state.sync_plan_url()
    with header:
        summary.render_summary(plan_query, plan)
    actions.render_actions(plan_query, plan)
    if plan_query.rows is not None:
        rows.show_rows(ctx, plan_query.problem, plan, plan_query.rows)
    prediction.show_frontiers(plan_query)
    summary.show_sizes(plan)
    summary.show_flagged(plan)


page("Plan", plan_page)
