"""Actions on a plan: run, refine, download, export or save it, or copy its command."""

from __future__ import annotations

import shlex
from dataclasses import replace

from lsq_core.jobs import arguments
from lsq_core.jsontext import json_text
from lsq_core.model.info import ModelInfo
from lsq_core.planning.plan import Plan
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.profile import Profile
from lsq_core.ui import cached, cached_results, state
from lsq_core.ui.export_plan import render_plan_export
from lsq_core.ui.page import PageContext
from lsq_core.ui.plan import refine, run
from lsq_core.ui.plan.prediction import render_loss_search
from lsq_core.ui.plan.query import PlanQuery
from lsq_core.ui.safe import st

# --- where it can go ------------------------------------------------------------------------


def render_actions(query: PlanQuery, plan: Plan) -> None:
    """Show the actions: run, refine, search by loss, download, export, save, command line."""
    ctx, info, profile = query.ctx, query.info, query.profile
    options = None
    with st.container(horizontal=True):
        if not cached.is_published(info):
            options = run.render_button(query)
            refine.render_button(query)
        with st.popover("Search by loss"):
            render_loss_search(query)
        st.download_button(
            "Download plan",
            lambda: plan_json(query, plan),
            f"plan-{plan.method}-{plan.bits_per_param:.2f}.json",
            "application/json",
            on_click="ignore",
        )
        with st.popover("For another tool"):
            render_plan_export(plan, info, "plan")
        with st.popover("Save or open"):
            render_save_form(ctx, info, plan, profile)
        with st.popover("Command line"):
            argv = ["plan", *arguments.model_arguments(ctx.source, ctx.device)]
            argv += [
                *arguments.plan_arguments(query.request, query.settings),
                "--out",
                "plan.json",
            ]
            st.code(f"lsq {shlex.join(argv)}", language="bash", wrap_lines=True)
    if options is not None:
        run.render_panel(query, options)
        refine.render_panel(query)


def plan_json(query: PlanQuery, plan: Plan) -> str:
    """Return the plan as JSON text for download."""
    content = plan.to_json() | {
        "model": query.ctx.source.name,
        "fingerprint": query.info.fingerprint,
        "profile": query.profile.id if query.profile else None,
        "covered": query.info.coverage,
    }
    return json_text(content, indent=1)


def render_save_form(
    ctx: PageContext, info: ModelInfo, plan: Plan, profile: Profile | None
) -> None:
    """Show a form to save the plan under a name or open a saved one."""
    if not info.fingerprint:
        st.write(
            "A plan can be saved once the model has been downloaded, by profiling it or by a run."
        )
        return
    name = st.text_input("Name", key="plan_name").strip()
    if st.button("Save the plan", disabled=not name):
        ctx.store.save_plan(plan, info.fingerprint, profile.id if profile else None, name)
        st.success(f"Saved as '{name}'.")
    saved_plans = cached_results.named_plans(ctx.store, info.fingerprint)
    if len(saved_plans):
        titles = dict(zip(saved_plans["id"], saved_plans["name"], strict=True))
        id = st.selectbox("Saved plans", list(titles), format_func=titles.get)
        st.button("Open", on_click=open_plan, args=(ctx, info, id))


def open_plan(ctx: PageContext, info: ModelInfo, id: str) -> None:
    """Set the controls to the request of a saved plan."""
    content = ctx.store.plan_content(id)
    state.set_plan(PlanRequest.from_json(content["request"]), info.linear_parameters)
    grid = {"metadata": content["metadata"], "axis": content["axis"]}
    state.set_settings(replace(state.settings(), **grid))
