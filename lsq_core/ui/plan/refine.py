"""Refining the plan on the Plan page: the time limit, the steps, and the refined plan."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd

from lsq_core import charts, disk, jobs
from lsq_core.corpus.registry import BUILT_IN_CORPORA, corpus_identity
from lsq_core.errors import InputError, LsqError
from lsq_core.jobs import Job, arguments
from lsq_core.planning.constraints import restrict
from lsq_core.planning.methods import get_planner
from lsq_core.planning.methods.refined import Refined, is_refinable
from lsq_core.planning.request import PlanRequest
from lsq_core.refinement.step import RefinementStep
from lsq_core.stages.refine import DEFAULT_MINUTES, MEASURED_TOKENS
from lsq_core.stages.refined import find_steps
from lsq_core.ui import cached_plans, jobs_panel, state, words
from lsq_core.ui.page import headline
from lsq_core.ui.plan.query import PlanQuery
from lsq_core.ui.safe import st

#: Session keys: whether the popover is open, and whether a search was just started from it.
_POPOVER, _STARTED = "refine_popover", "refine_started"


def _refined_request(query: PlanQuery) -> PlanRequest | None:
    """Return the request that refines the shown plan; None if it can't be refined."""
    request, planner = query.request, get_planner(query.request.method)
    if planner.reads_refinement:
        return request
    if not is_refinable(planner) or request.ladder not in Refined.ladders:
        return None
    return replace(request, method=Refined.name, start=request.method, exact=False)


def render_button(query: PlanQuery) -> None:
    """Show the choice of a time limit, and the button that starts the search."""
    request = _refined_request(query)
    if st.session_state.pop(_STARTED, False):
        st.session_state[_POPOVER] = False  # the popover would cover the progress below
    with st.popover(
        "Refine",
        icon=":material/auto_fix_high:",
        disabled=request is None,
        key=_POPOVER,
        on_change="rerun",
    ):
        if request is None:
            return
        st.write(
            "Gradients at this plan propose exchanges of equal size, which are kept if they reduce "
            f"the KL divergence measured on {MEASURED_TOKENS:,} tokens of the calibration text."
        )
        minutes = st.number_input(
            "Start no new round after (minutes)",
            1.0,
            600.0,
            DEFAULT_MINUTES,
            step=5.0,
            format="%g",
            key="refine_minutes",
            persist_state="session",
            help="A round in progress is finished. Press again to continue from the last step.",
        )
        text = _choose_text(query)
        if st.button("Refine by measuring", type="primary", icon=":material/play_arrow:"):
            _start(query, request, minutes, text)


def _choose_text(query: PlanQuery) -> str | None:
    """Offer another text if the profile's isn't on this machine, as with some shipped profiles."""
    own = query.settings.calibration
    try:
        corpus_identity(own)
    except InputError:
        return st.selectbox(
            "Text to search on",
            list(BUILT_IN_CORPORA),
            accept_new_options=True,
            key="refine_text",
            persist_state="session",
            help=f"The profile was measured on {words.escape(own)}, which is not on this machine. "
            "Choose a text similar to your use case, or type the path of a text file. stdlib is "
            "always available; wikitext2, c4 and pileval are downloaded.",
        )
    return None


def _start(query: PlanQuery, request: PlanRequest, minutes: float, text: str | None) -> None:
    job = _find_job(query, request)
    try:
        if job is None or not job.active:
            jobs.start(disk.jobs_folder(query.ctx.store), _command(query, request, minutes, text))
    except LsqError as error:
        st.error(words.escape(str(error)))
        return
    st.session_state[_STARTED] = True
    st.rerun()


def _command(
    query: PlanQuery, request: PlanRequest, minutes: float, text: str | None = None
) -> list[str]:
    argv = ["refine", *arguments.model_arguments(query.ctx.source, query.ctx.device)]
    argv += arguments.refine_arguments(request, query.settings, minutes, text)
    return [*argv, "--db", str(query.ctx.store.path)]


def _find_job(query: PlanQuery, request: PlanRequest) -> Job | None:
    """Return the newest search for this plan, whatever its time limit and text."""
    command = _command(query, request, DEFAULT_MINUTES)
    ignoring = ("--minutes", "--text")
    return jobs_panel.find(disk.jobs_folder(query.ctx.store), command, ignoring)


def render_panel(query: PlanQuery) -> None:
    """Show the search for this plan until it is done, and its steps so far."""
    request = _refined_request(query)
    if request is None:
        return
    job = _find_job(query, request)
    if job is not None and job.state != "done":
        with st.container(border=True, key="plan-refine"):
            st.markdown(f"**{words.escape(job.title)}**")
            jobs_panel.follow(job, detail=lambda _: _show_steps(query, request), open_log=False)
        return
    if _steps(query, request):
        with st.container(border=True, key="plan-refine"):
            _show_steps(query, request)


def _steps(query: PlanQuery, request: PlanRequest) -> list[RefinementStep]:
    """Return the steps of the search at exactly this budget."""
    options = get_planner(Refined.name).options(request)
    problem = restrict(
        cached_plans.problem(query.info, query.profile).with_options(options), request
    )
    profile = query.profile.id if query.profile else ""
    return find_steps(query.ctx.store, profile, problem, request, query.settings.metadata)


def _show_steps(query: PlanQuery, request: PlanRequest) -> None:
    """Show the gain, the divergence after each step, and a button to open the refined plan."""
    steps = _steps(query, request)
    if not steps:
        return
    first, last = steps[0], steps[-1]
    if not last.number:
        tried = f"{words.plural(last.rounds, 'round')} found nothing better yet."
        st.markdown(
            f"**KL {words.figure(first.kl, 4)}** at the start. "
            + (tried if last.rounds else "The first round is searching.")
        )
        return
    changed = int((first.choice != last.choice).sum())
    gain = words.signed_percent(last.kl / first.kl - 1)
    st.markdown(
        f"**KL {words.figure(first.kl, 4)} → {words.figure(last.kl, 4)} ({gain})** in "
        f"{words.plural(last.number, 'step')} from {get_planner(request.refined_from).title}, "
        f"{changed} of {len(first.choice)} matrices changed; measured on the calibration text "
        "that was also used to choose them."
    )
    if last.number > 1:
        st.plotly_chart(
            charts.refinement_steps(_frame(steps)), config=charts.CONFIG, key="refinement_steps"
        )
    if query.request.method != Refined.name:
        st.button(
            "Show the refined plan",
            icon=":material/compare_arrows:",
            on_click=_show_refined,
            args=(request,),
        )


def _show_refined(request: PlanRequest) -> None:
    """Choose the refined plan, compared with the one it started from."""
    state.set_values(
        {"method": Refined.name, "start": request.refined_from, "against": request.refined_from}
    )


def _frame(steps: list[RefinementStep]) -> pd.DataFrame:
    pairs = itertools.pairwise(steps)
    changed = [0, *(int((a.choice != b.choice).sum()) for a, b in pairs)]
    return pd.DataFrame(
        {
            "step": [step.number for step in steps],
            "kl": [step.kl for step in steps],
            "expected": [np.nan if step.expected is None else step.expected for step in steps],
            "changed": changed,
        }
    )


def render_absent(query: PlanQuery) -> None:
    """Explain that no plan has been refined from this start, with a button to plan one."""
    start = get_planner(query.request.refined_from)
    headline(
        f"No plan by {start.title} has been refined yet.",
        f"Choose a budget with {start.title}, then press Refine under its plan: the search takes "
        "minutes and continues in the background.",
    )
    st.button(
        f"Plan by {start.title}",
        type="primary",
        icon=":material/arrow_forward:",
        on_click=state.set_values,
        args=({"method": start.name},),
    )
