"""A job as a person follows it: stage, bar, time left, memory, log, and a way to end it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import streamlit as st

from lsq_core import jobs
from lsq_core.jobs import Job
from lsq_core.ui import sidebar, words
from lsq_core.ui.page import headline

STATES = {
    "queued": "waiting",
    "running": "running",
    "done": "done",
    "failed": "failed",
    "cancelled": "cancelled",
    "interrupted": "interrupted",
}
#: How a sentence about one that ended goes on.
ENDED = {
    "done": "is done",
    "failed": "failed",
    "cancelled": "was cancelled",
    "interrupted": "was interrupted",
}
#: Stages as a sentence begins.
_STAGES = {
    "start": "Starting",
    "load": "Loading",
    "profile": "Profiling",
    "plan": "Planning",
    "quantize": "Quantizing",
    "save": "Saving",
    "evaluate": "Evaluating",
    "store": "Keeping the result",
}


def find(folder: Path, arguments: list[str]) -> Job | None:
    """The newest job that was asked for just this."""
    return next((j for j in jobs.list_jobs(folder) if j.arguments == tuple(arguments)), None)


def follow(job: Job, say: Callable[[Job], None] | None = None) -> None:
    """Show a job, looking again while it is active.

    ``say`` is drawn first, each time; the sidebar redraws the page when the job has ended.
    """
    every = sidebar.EVERY if job.active else None
    st.fragment(_panel, run_every=every)(job.folder, say)


def _panel(folder: Path, say: Callable[[Job], None] | None) -> None:
    job = jobs.read(folder)
    if say is not None:
        say(job)
    if job.active:
        _progress(job)
    elif job.state in ("failed", "interrupted"):
        st.error(words.literal(f"{job.title} {ENDED[job.state]}: {job.message}"))
    elif job.state == "cancelled":
        st.info(words.literal(f"{job.title} was cancelled after {words.seconds(job.seconds)}."))
    log = job.log_tail()
    if log:
        with st.expander("Log", expanded=job.state in ("failed", "interrupted")):
            st.code(log, language=None)


def _progress(job: Job) -> None:
    facts = [f"{words.seconds(time.time() - job.created)} so far"]
    if job.memory:
        facts.append(f"{words.size(job.memory)} of memory")
    st.progress(min(job.fraction, 1.0), text=job.message or "…")
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button("Cancel", icon=":material/stop_circle:", key=f"cancel-{job.id}"):
            jobs.cancel(job)
            st.rerun()
        st.caption(" · ".join(facts))


def say(job: Job) -> None:
    """A page's first line about a job that is active."""
    share = f", {100 * job.fraction:.0f} %" if job.total > 1 else ""
    left = f"; about {words.seconds(job.eta)} left in this stage" if job.eta else ""
    headline(f"{stage(job)}{share}{left}.", job.title)


def stage(job: Job) -> str:
    """What a job is doing, as a sentence begins."""
    return "Waiting" if job.state == "queued" else _STAGES.get(job.stage, job.stage or "Starting")


def table(found: list[Job]) -> pd.DataFrame:
    """Jobs as rows for a person to read."""
    return pd.DataFrame(
        {
            "started": [pd.Timestamp(j.created, unit="s").floor("s") for j in found],
            "job": [j.title for j in found],
            "state": [STATES[j.state] for j in found],
            "took": [words.seconds(j.seconds) for j in found],
            # what an active one says would be out of date at once
            "message": ["" if j.active else j.message for j in found],
        }
    )
