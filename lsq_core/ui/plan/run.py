"""Quantizing and evaluating the plan on the Plan page: time, progress and result."""

from __future__ import annotations

from lsq_core import disk, jobs
from lsq_core.errors import LsqError
from lsq_core.evaluation.protocol import Protocol
from lsq_core.jobs import Job
from lsq_core.quantization.registry import quantizer_spec
from lsq_core.ui import jobs_panel, words
from lsq_core.ui.page import PageContext, next_step
from lsq_core.ui.plan.query import PlanQuery
from lsq_core.ui.run import result
from lsq_core.ui.run.plan import RunOptions, check_run, run_arguments, select_run_options
from lsq_core.ui.safe import st
from lsq_core.units import format_bytes

#: Session key of the id of the job last started here.
_WATCHED = "plan_job"


def render_button(query: PlanQuery) -> RunOptions:
    """Show the button that starts the run, and return the run options chosen beside it."""
    place = st.container(width="content")
    with st.popover("Evaluation", icon=":material/tune:"):
        options = select_run_options(query.ctx, stacked=True)
    check = check_run(query.ctx, query.request, options)
    clicked = place.button(
        "Quantize and evaluate",
        type="primary",
        icon=":material/play_arrow:",
        disabled=bool(check.reason),
        help="Runs in the background; the result appears below and on the Compare page.",
    )
    if clicked:
        _start(query, options)
    return options


def _start(query: PlanQuery, options: RunOptions) -> None:
    """Start the run and redraw the page to follow it, or show why it can't start."""
    try:
        argv = run_arguments(query.ctx, query.request, options)
        job = jobs.start(disk.jobs_folder(query.ctx.store), _with_database(query.ctx, argv))
    except LsqError as error:
        st.error(words.escape(str(error)))
        return
    st.session_state[_WATCHED] = job.id
    st.rerun()


def _with_database(ctx: PageContext, argv: list[str]) -> list[str]:
    return [*argv, "--db", str(ctx.store.path)]


def render_panel(query: PlanQuery, options: RunOptions) -> None:
    """Describe the run and its duration; then show the job or its result."""
    ctx, request = query.ctx, query.request
    check = check_run(ctx, request, options)
    protocol = Protocol.named(options.evaluation.protocol, ctx.info.context).name
    tokens = options.evaluation.max_tokens
    extent = f"the first {tokens:,} tokens" if tokens else "all"
    quantizer = quantizer_spec(options.quantizer).title
    what = f"{quantizer}, {extent} of {options.evaluation.corpus}, {protocol}."
    note = f"{what} {check.note} {_describe_other_text(query, options)}"
    st.caption(words.escape(check.reason or " ".join(note.split())))
    job = _find_job(query, options)
    if job is None:
        return
    _announce(job)
    with st.container(border=True, key="plan-run"):
        if job.state == "done":
            _show_result(job)
        else:
            st.markdown(f"**{words.escape(job.title)}**")
            jobs_panel.follow(job, open_log=False)


def _describe_other_text(query: PlanQuery, options: RunOptions) -> str:
    """Return a note if the result won't be comparable with the runs behind predictions, else ''."""
    if isinstance(query.predictor, str):
        return ""
    points = query.predictor.points
    if points.corpus == options.evaluation.corpus:
        return ""
    runs = words.plural(len(points.perplexity), "run")
    return f"Its perplexity can't be compared with the {runs} on {points.corpus}."


def _find_job(query: PlanQuery, options: RunOptions) -> Job | None:
    """Return the job of exactly this plan and evaluation, else the one last started here."""
    folder = disk.jobs_folder(query.ctx.store)
    try:
        argv = run_arguments(query.ctx, query.request, options)
        same = jobs_panel.find(folder, _with_database(query.ctx, argv))
    except LsqError:  # the name to save under is taken; pressing the button reports it
        same = None
    watched = st.session_state.get(_WATCHED)
    return same or next((job for job in jobs.list_jobs(folder) if job.id == watched), None)


def _announce(job: Job) -> None:
    """Announce once that a job started here is active, and once how it ended."""
    if st.session_state.get(_WATCHED) != job.id:
        return
    begun = f"{_WATCHED}_begun"
    if job.active and st.session_state.get(begun) != job.id:
        st.session_state[begun] = job.id
        st.toast(words.escape(f"Started: {job.title}"), icon=":material/play_arrow:")
    elif not job.active and st.session_state.get(f"{_WATCHED}_ended") != job.id:
        st.session_state[f"{_WATCHED}_ended"] = job.id
        text = _verdict(job) if job.state == "done" else f"{job.title} {_ended(job)}."
        st.toast(words.escape(text), icon=":material/flag:")


def _ended(job: Job) -> str:
    return jobs_panel.ENDED_PHRASES[job.state]


def _verdict(job: Job) -> str:
    """Return ``Perplexity 24.84, +38.5 % over full precision: a clear loss``, or the error."""
    try:
        found = result.read_result(job)
    except LsqError as error:
        return str(error)
    change = words.loss_verdict(found["increase"]["relative"])
    return f"Perplexity {words.figure(found['perplexity'], 2)}, {change}"


def _show_result(job: Job) -> None:
    """Show the verdict, the prediction before the run, and links to the next pages."""
    try:
        found = result.read_result(job)
    except LsqError:
        jobs_panel.show_damaged(job)
        return
    predicted = found.get("predicted") or {}
    facts = [
        f"{format_bytes(found['measured_bytes'])} measured",
        f"{found['corpus']}, {found['protocol']}, {found['tokens']:,} tokens",
    ]
    if "perplexity" in predicted:
        low, high = predicted["low"], predicted["high"]
        facts.insert(
            0,
            f"{predicted['perplexity']:.2f} ({low:.2f} to {high:.2f}) was predicted",
        )
    st.markdown(f"**{words.escape(_verdict(job))}.** {words.escape(job.title)}")
    st.caption(words.escape(" · ".join([*facts, f"took {words.seconds(job.seconds)}"])))
    with st.container(horizontal=True):
        next_step("pages/4_Compare.py", "Compare it with the other runs")
        next_step("pages/3_Run.py", "Verify the run or generate text")
