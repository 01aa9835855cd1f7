"""The Run page: runs of the plan and sweeps, which continue when the page is closed."""

from __future__ import annotations

from pathlib import Path

from lsq_core import disk, jobs
from lsq_core.files import DamagedFileError
from lsq_core.jobs import Job
from lsq_core.ui import cached, cached_results, jobs_panel, state, words
from lsq_core.ui.page import PageContext, headline, next_step, page
from lsq_core.ui.run import plan, result, sweep
from lsq_core.ui.safe import st

#: Jobs listed on this page; audits and generated texts are shown with their run.
VERBS = ("run", "sweep")


def run_page(ctx: PageContext) -> None:
    """Show the current or last job and its result, the form for the next, and recent runs."""
    folder = disk.jobs_folder(ctx.store)
    job_list = [j for j in jobs.list_jobs(folder) if j.verb in VERBS or j.state == "damaged"]
    shown = choose_job(job_list)
    has_weights = cached.published(ctx.store, ctx.source) is None
    if not has_weights:
        render_no_weights(ctx.info.source)
    elif shown is None:
        headline(
            "No runs yet." if cached_results.results(ctx.store).empty else "Nothing is running.",
            "Runs continue in the background; you can close this page.",
        )
    if shown is not None and (has_weights or shown.active or _selected_job(job_list)):
        show(ctx, shown, show_headline=has_weights)
    if has_weights:
        render_form(ctx, folder)
    show_jobs(job_list)


def render_no_weights(name: str) -> None:
    """Explain why a published model can't be run, with links to alternatives."""
    headline(
        f"{words.escape(name)} has no local weights, so it cannot be run.",
        "Only published measurements are available. To quantize it, choose it by its Hugging "
        "Face id or a local folder.",
    )
    with st.container(horizontal=True):
        next_step("app.py", "Choose a model with weights")
        next_step("pages/2_Plan.py", "Plan it")
        next_step("pages/4_Compare.py", "Compare its published runs")


def choose_job(job_list: list[Job]) -> Job | None:
    """Return the job selected in the table, else a running one, else the newest readable one."""
    if not job_list:
        return None
    selected_job = _selected_job(job_list)
    running = (job for job in job_list if job.state == "running")
    readable = (job for job in job_list if job.state != "damaged")
    return selected_job or next(running, None) or next(readable, None)


def _selected_job(job_list: list[Job]) -> Job | None:
    rows = st.session_state.get("jobs", {}).get("selection", {}).get("rows", [])
    return job_list[rows[0]] if rows and rows[0] < len(job_list) else None


def show(ctx: PageContext, job: Job, show_headline: bool) -> None:
    """Show a job, its progress or result, and the queue of other active jobs."""
    if job.state == "damaged":
        jobs_panel.show_damaged(job)
    elif job.verb == "sweep":
        jobs_panel.follow(job, sweep.render_headline, sweep.show_rows)
    else:
        jobs_panel.follow(job, result.render_headline if show_headline else None)
        if job.state == "done":
            show_result(ctx, job)
    jobs_panel.follow_queue(disk.jobs_folder(ctx.store), job)


def show_result(ctx: PageContext, job: Job) -> None:
    """Show the result of a run, or that its file is damaged."""
    try:
        result.show(ctx, job)
    except DamagedFileError:
        jobs_panel.show_damaged(job)


def render_form(ctx: PageContext, folder: Path) -> None:
    """Show the forms for one run of the plan and for a sweep."""
    info = ctx.info
    state.init_settings(cached.model_key(info), cached.newest_settings(ctx.store, info))
    profile = cached.profile(ctx.store, info, state.settings(), ctx.device)
    state.init_plan(profile is not None)
    state.sync_plan_url()
    run_tab, sweep_tab = st.tabs(["Run the plan", "Sweep"], key="run_ask")
    with run_tab:
        plan.render_form(ctx, folder)
    with sweep_tab:
        sweep.render_form(ctx, folder)


def show_jobs(job_list: list[Job]) -> None:
    """Show the recent jobs with their states; selecting one shows it above."""
    if not job_list:
        return
    st.subheader("Recent runs", anchor=False)
    st.dataframe(
        jobs_panel.table(job_list[:50]),
        hide_index=True,
        key="jobs",
        on_select="rerun",
        selection_mode="single-row",
        height=220 if len(job_list) > 5 else "auto",
        column_config={
            "started": st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm:ss"),
            "message": st.column_config.TextColumn(width="large"),
        },
    )


page("Run", run_page)
