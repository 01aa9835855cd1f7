"""Quantize by the plan, evaluate, sweep, and follow it; it goes on when this page is closed."""

from __future__ import annotations

from pathlib import Path

from lsq_core import disk, jobs
from lsq_core.files import Damaged
from lsq_core.jobs import Job
from lsq_core.ui import cached, jobs_panel, state, words
from lsq_core.ui.page import Here, headline, next_step, page
from lsq_core.ui.run import plan, result, sweep
from lsq_core.ui.safe import st

#: The jobs that this page is about; those about one run are shown with it.
VERBS = ("run", "sweep")


def run_page(here: Here) -> None:
    """What is about to run, what is running, and what came of it."""
    folder = disk.jobs_folder(here.store)
    found = [j for j in jobs.list_jobs(folder) if j.verb in VERBS or j.state == "damaged"]
    shown = selected(found)
    has_weights = cached.published(here.store, here.source) is None
    if not has_weights:
        say_no_weights(here.info.source)
    elif shown is None:
        headline(
            "Nothing has run yet." if cached.results(here.store).empty else "Nothing is running.",
            "Quantizing and evaluating goes on in the background; this page can be closed.",
        )
    if shown is not None and (has_weights or shown.active or _picked(found)):
        show(here, shown, say_it=has_weights)
    if has_weights:
        ask(here, folder)
    show_jobs(found)


def say_no_weights(name: str) -> None:
    """Why a published model can't run, and what can be done."""
    headline(
        f"{words.literal(name)} has no weights here, so there is nothing to run.",
        "Its measurements were published. To quantize the model itself, choose it by its Hugging "
        "Face id or as a folder.",
    )
    with st.container(horizontal=True):
        next_step("app.py", "Choose a model with weights")
        next_step("pages/2_Plan.py", "Plan for it")
        next_step("pages/4_Compare.py", "Compare its published runs")


def selected(found: list[Job]) -> Job | None:
    """The job picked in the table of recent ones, else one that is running, else the newest."""
    if not found:
        return None
    picked = _picked(found)
    running = (job for job in found if job.state == "running")
    whole = (job for job in found if job.state != "damaged")
    return picked or next(running, None) or next(whole, None)


def _picked(found: list[Job]) -> Job | None:
    rows = st.session_state.get("jobs", {}).get("selection", {}).get("rows", [])
    return found[rows[0]] if rows and rows[0] < len(found) else None


def show(here: Here, job: Job, say_it: bool) -> None:
    """One job: followed while it is active, then what came of it; and those behind it."""
    if job.state == "damaged":
        jobs_panel.show_damaged(job)
    elif job.verb == "sweep":
        jobs_panel.follow(job, sweep.say, sweep.show_rows)
    else:
        jobs_panel.follow(job, result.say if say_it else None)
        if job.state == "done":
            show_result(here, job)
    jobs_panel.follow_queue(disk.jobs_folder(here.store), job)


def show_result(here: Here, job: Job) -> None:
    """What came of a run, or that its file is damaged."""
    try:
        result.show(here, job)
    except Damaged:
        jobs_panel.show_damaged(job)


def ask(here: Here, folder: Path) -> None:
    """One run of the plan, or a sweep."""
    info = here.info
    state.begin_settings(cached.identity(info), cached.newest_settings(here.store, info))
    found = cached.profile(here.store, info, state.settings(), here.device)
    state.begin_plan(found is not None)
    state.share_plan()
    one, many = st.tabs(["Run the plan", "Sweep"], key="run_ask")
    with one:
        plan.ask(here, folder)
    with many:
        sweep.ask(here, folder)


def show_jobs(found: list[Job]) -> None:
    """Recent runs with their states; picking one shows it above."""
    if not found:
        return
    st.subheader("Recent runs", anchor=False)
    st.dataframe(
        jobs_panel.table(found[:50]),
        hide_index=True,
        key="jobs",
        on_select="rerun",
        selection_mode="single-row",
        height=220 if len(found) > 5 else "auto",
        column_config={
            "started": st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm:ss"),
            "message": st.column_config.TextColumn(width="large"),
        },
    )


page("Run", run_page)
