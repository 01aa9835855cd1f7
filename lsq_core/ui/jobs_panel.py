"""Panels of jobs: stage, progress, time left, memory and log, with cancel and resume buttons."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from lsq_core import jobs
from lsq_core.errors import LsqError
from lsq_core.jobs import Job
from lsq_core.ui import sidebar, words
from lsq_core.ui.page import headline
from lsq_core.ui.safe import st

STATE_LABELS = {
    "queued": "waiting",
    "running": "running",
    "done": "done",
    "failed": "failed",
    "cancelled": "cancelled",
    "interrupted": "interrupted",
    "damaged": "damaged",
}
#: Predicates of sentences about an ended job.
ENDED_PHRASES = {
    "done": "finished",
    "failed": "failed",
    "cancelled": "was cancelled",
    "interrupted": "was interrupted",
    "damaged": "is damaged",
}
#: Stages as the start of a sentence.
_STAGE_LABELS = {
    "start": "Starting",
    "load": "Loading",
    "weights": "Measuring the weights",
    "profile": "Profiling",
    "rows": "Measuring the rows",
    "plan": "Planning",
    "refine": "Refining",
    "quantize": "Quantizing",
    "save": "Saving",
    "evaluate": "Evaluating",
    "store": "Storing the result",
    "sweep": "Sweeping",
    "generate": "Generating",
}
#: Stages of a run, in order; an existing profile takes no time.
_RUN_STEPS = ("profile", "plan", "load", "quantize", "save", "evaluate", "store")


def find(folder: Path, arguments: Sequence[str], ignoring: Sequence[str] = ()) -> Job | None:
    """Return the newest job with the same arguments, apart from the options in ``ignoring``."""
    wanted = _without(arguments, ignoring)
    found = (job for job in jobs.list_jobs(folder) if _without(job.arguments, ignoring) == wanted)
    return next(found, None)


def _without(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return the arguments without some options and their values."""
    kept = list(arguments)
    for option in options:
        if option in kept:
            at = kept.index(option)
            del kept[at : at + 2]
    return kept


def follow(
    job: Job,
    render_headline: Callable[[Job], None] | None = None,
    detail: Callable[[Job], None] | None = None,
    open_log: bool = True,
) -> None:
    """Show a job, updating while it is active.

    On each update ``render_headline`` is called first, and ``detail`` below the bar; the sidebar
    redraws the page when the job has ended. ``open_log`` is whether the log starts expanded.
    """
    every = sidebar.POLL_SECONDS if job.active else None
    open_log = open_log and job.verb != "sweep"
    st.fragment(_panel, run_every=every)(job.folder, render_headline, detail, open_log)


def _panel(
    folder: Path,
    render_headline: Callable[[Job], None] | None,
    detail: Callable[[Job], None] | None,
    open_log: bool,
) -> None:
    try:
        job = jobs.read(folder)
        if render_headline is not None and job.state != "damaged":
            render_headline(job)
    except LsqError as error:  # it was deleted elsewhere, or its files are damaged
        st.error(words.escape(str(error)))
        return
    if job.state == "damaged":
        show_damaged(job)
        return
    if job.active:
        _progress(job)
    elif job.state in ("failed", "interrupted"):
        st.error(words.escape(f"{job.title} {ENDED_PHRASES[job.state]}: {job.message}"))
    elif job.state == "cancelled":
        st.info(words.escape(f"{job.title} was cancelled after {words.seconds(job.seconds)}."))
    if job.can_resume:
        _resume(job)
    if detail is not None:
        detail(job)
    log = job.log_tail(5 if job.active else 7)
    if log and job.state != "done":
        with st.expander("Log", expanded=open_log):
            st.code(log, language=None)


def show_damaged(job: Job) -> None:
    """Show why a job can't be read, with buttons to run it again or delete it."""
    st.error(words.escape(f"The job {job.title} is damaged. {job.message}"))
    with st.container(horizontal=True):
        retry_clicked = job.can_resume and st.button("Run again", key=f"again-{job.id}")
        if retry_clicked and _report_errors(lambda: jobs.resume(job)):
            st.rerun()
        delete_clicked = st.button("Delete", key=f"delete-{job.id}", icon=":material/delete:")
        if delete_clicked and _report_errors(lambda: jobs.delete(job)):
            st.session_state.pop("jobs", None)
            st.rerun(scope="app")


def _report_errors(step: Callable[[], object]) -> bool:
    """Run a step and show the error if it fails; return whether it succeeded."""
    try:
        step()
    except LsqError as error:
        st.error(words.escape(str(error)))
        return False
    return True


def _resume(job: Job) -> None:
    """Render the resume button, and what has been done already."""
    with st.container(horizontal=True, vertical_alignment="center"):
        label = "Try again" if job.state == "failed" else "Resume"
        pressed = st.button(label, icon=":material/resume:", key=f"resume-{job.id}", type="primary")
        if pressed and _report_errors(lambda: jobs.resume(job)):
            st.rerun()
        at = f"It stopped while {stage(job).lower()}" if job.stage else "It stopped immediately"
        share = f", {100 * job.fraction:.0f} % of it done" if job.total > 1 else ""
        keeps_progress = job.verb in ("run", "sweep", "profile", "plan", "refine")
        st.caption(
            f"{at}{share}, after {words.seconds(job.seconds)}. "
            + ("Profiles, finished runs and evaluated windows are kept." if keeps_progress else "")
        )


def _progress(job: Job) -> None:
    facts = [f"{words.seconds(time.time() - job.created)} elapsed"]
    if job.memory:
        facts.append(f"{words.size(job.memory)} memory")
    bar(job, job.message or "…")
    if job.verb == "run" and job.stage in _RUN_STEPS:
        st.caption(" · ".join(_steps(job)))
    with st.container(horizontal=True, vertical_alignment="center"):
        cancel_clicked = st.button("Cancel", icon=":material/stop_circle:", key=f"cancel-{job.id}")
        if cancel_clicked and _report_errors(lambda: jobs.cancel(job)):
            st.rerun()
        st.caption(" · ".join(facts))


def bar(job: Job, text: str) -> None:
    """Render a job's progress bar under a key of its own.

    Without the key the browser would reuse another job's bar in the same place and animate it from
    its previous position.
    """
    with st.container(key=f"bar-{job.id}"):
        st.progress(min(job.fraction, 1.0), text=text)


def _steps(job: Job) -> list[str]:
    """Return the steps of a run, finished ones checked and the current one bold."""
    steps = [s for s in _RUN_STEPS if s != "save" or "--save" in job.arguments]
    at = steps.index(job.stage) if job.stage in steps else 0
    return [
        f"✓ {step}" if i < at else f"**{step}**" if i == at else step
        for i, step in enumerate(steps)
    ]


def follow_queue(folder: Path, shown: Job) -> None:
    """Show the other running and waiting jobs, updating while there are any."""
    others = any(job.active and job.id != shown.id for job in jobs.list_jobs(folder))
    if others:
        st.fragment(_queue, run_every=sidebar.POLL_SECONDS)(folder, shown.id)


def _queue(folder: Path, shown: str) -> None:
    """Show one line per job with a cancel button, oldest first."""
    job_list = reversed(jobs.list_jobs(folder))
    others = [job for job in job_list if job.active and job.id != shown]
    if not others:
        return
    with st.container(key="queue", gap="xxsmall"):
        for index, job in enumerate(others, start=1):
            with st.container(horizontal=True, vertical_alignment="center", key=f"next-{job.id}"):
                st.markdown(
                    f":material/hourglass_empty: **{stage(job)}** ({index} of {len(others)}, one "
                    f"job at a time per device): {words.escape(job.title)}"
                )
                cancel_clicked = st.button("Cancel", key=f"cancel-queued-{job.id}", type="tertiary")
                if cancel_clicked and _report_errors(partial(jobs.cancel, job)):
                    st.rerun()


def render_headline(job: Job) -> None:
    """Render a page's headline for an active job."""
    share = f", {100 * job.fraction:.0f} %" if job.total > 1 else ""
    rest = "left" if job.stage == "sweep" else "left in this stage"
    left = f"; about {words.seconds(job.eta)} {rest}" if job.eta else ""
    headline(f"{stage(job)}{share}{left}.", job.title)


def stage(job: Job) -> str:
    """Return a job's stage as the start of a sentence."""
    return (
        "Waiting"
        if job.state == "queued"
        else _STAGE_LABELS.get(job.stage, job.stage or "Starting")
    )


def table(job_list: list[Job]) -> pd.DataFrame:
    """Return jobs as a table for display."""
    return pd.DataFrame(
        {
            "started": [pd.Timestamp(j.created, unit="s").floor("s") for j in job_list],
            "job": [j.title for j in job_list],
            # an active job's values would be out of date immediately
            "state": ["active" if j.active else STATE_LABELS[j.state] for j in job_list],
            "took": ["" if j.active else words.seconds(j.seconds) for j in job_list],
            "message": ["" if j.active else j.message for j in job_list],
        }
    )
