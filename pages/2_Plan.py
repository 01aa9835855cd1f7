"""The Plan page: the configuration of each matrix, by method and base or budget, shown live."""

from __future__ import annotations

from dataclasses import replace

from lsq_core.errors import LsqError
from lsq_core.planning.constraints import restrict
from lsq_core.planning.methods import get_planner
from lsq_core.ui import cached, cached_plans, state, words
from lsq_core.ui.page import PageContext, headline, page
from lsq_core.ui.plan import actions, live, prediction, query, ranking, refine, rows, summary
from lsq_core.ui.plan.budget import within_reach
from lsq_core.ui.plan.controls import render_controls
from lsq_core.ui.safe import st


def plan_page(ctx: PageContext) -> None:
    """Show the headline, the controls, the live plan, its actions, and comparisons and sizes."""
    info = ctx.info
    state.init_settings(cached.model_key(info), cached.newest_settings(ctx.store, info))
    profile = cached.planning_profile(ctx.store, info, state.settings())
    state.init_plan(profile is not None)
    available_methods = query.available_methods(info, profile)
    state.restrict_methods(available_methods)
    settings = state.plan_settings()
    profile = cached.planning_profile(ctx.store, info, settings)
    prediction.init_prediction(ctx, info)
    header = st.container()
    problem = cached_plans.problem_with(info, profile, state.plan_request(), None)
    render_controls(problem, available_methods, profile, cached.is_published(info))
    plan_query = query.PlanQuery(ctx, info, profile, settings, state.plan_request())
    missing = query.missing_metrics(plan_query)
    if missing:
        with header:
            query.render_missing_metrics(plan_query, missing)
        return
    if (
        get_planner(plan_query.request.method).reads_refinement
        and plan_query.extra_measurements is None
    ):
        with header:
            refine.render_absent(plan_query)
        return
    try:
        live.take_budget()
        problem = restrict(plan_query.problem, plan_query.request)
        request, notice = within_reach(problem, state.plan_request(), settings.metadata)
        plan_query = replace(plan_query, request=request)
        plan = cached_plans.plan(
            info, profile, plan_query.request, settings, plan_query.extra_measurements
        )
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
    ranking.show_ranking(plan_query, plan, lead=header)
    if plan_query.rows is not None:
        rows.show_rows(ctx, plan_query.problem, plan, plan_query.rows)
    prediction.show_frontiers(plan_query)
    summary.show_sizes(plan)
    summary.show_flagged(plan)


page("Plan", plan_page)
