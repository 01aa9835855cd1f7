"""The result of a run: its figures, the audit of its stored weights, and generated texts."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lsq_core import disk, jobs
from lsq_core.errors import InputError
from lsq_core.evaluation.divergence import format_distribution
from lsq_core.evaluation.noise import describe_noise
from lsq_core.exports.weights.registry import FORMATS
from lsq_core.files import DamagedFileError
from lsq_core.jobs import Job
from lsq_core.results.audit import audit_run
from lsq_core.stages.saved import saved_folder
from lsq_core.store.store import Store
from lsq_core.ui import jobs_panel, words
from lsq_core.ui.page import PageContext, headline, next_step
from lsq_core.ui.run import texts
from lsq_core.ui.safe import st
from lsq_core.units import format_bytes

#: Stages whose duration a result contains.
_TIMED_STAGES = ("quantize", "evaluate")
_TABS = ("Figures", "Verify size", "Generate", "Log")
#: Options of a run that are also passed to its audit and to text generation.
_MODEL_OPTIONS = ("--model", "--revision", "--device")
#: Fields of a result that the page needs.
_REQUIRED_FIGURES = {
    *("run", "perplexity", "perplexity_full", "increase", "kl", "top1", "corpus", "protocol"),
    *("tokens", "truncated", "measured_bytes", "measured_model_bytes", "saved_to"),
    *(f"{stage}_seconds" for stage in _TIMED_STAGES),
}
_FLAGS = ("--trust-remote-code", "--allow-pickle")


def read_result(job: Job) -> dict:
    """Return the result of a finished run.

    Raises
    ------
    DamagedFileError
        If it can't be read, or figures are missing.
    """
    result = job.result() or {}
    if not result.keys() >= _REQUIRED_FIGURES or not isinstance(result["increase"], dict):
        raise DamagedFileError(
            f"{job.folder / 'result.json'} is damaged: some of the run's figures are missing."
        )
    return result


def render_headline(job: Job) -> None:
    """Show the headline: the progress of a run, or its result."""
    title = job.title
    if job.active:
        jobs_panel.render_headline(job)
        return
    result = read_result(job) if job.state == "done" else None
    if result is None:
        headline(f"The run {jobs_panel.ENDED_PHRASES[job.state]}.", words.escape(title))
        return
    change = result["increase"]
    headline(
        f"Perplexity {words.figure(result['perplexity'], 2, _noise(result))}, "
        f"{words.loss_verdict(change['relative'])}.",
        words.escape(
            f"{title} · {result['corpus']}, {result['protocol']}, {result['tokens']:,} tokens"
            + (", limited by max tokens" if result["truncated"] else "")
        ),
    )


def _noise(result: dict) -> float | None:
    """Return the perplexity's relative numerical noise; None for a job of an older version."""
    return (result.get("noise") or {}).get("perplexity")


def show(ctx: PageContext, job: Job) -> None:
    """Show a finished run."""
    figures, audited, prompt, log = st.tabs(_TABS, key="run_view")
    with figures:
        show_figures(job)
    with audited:
        show_audit(ctx.store, job)
    with prompt:
        texts.show(ctx.store, job, model_options(job))
    with log:
        st.caption(job.command)
        st.code(job.log_tail(40), language=None, height=240)


def show_figures(job: Job) -> None:
    """Show the measured figures."""
    result = read_result(job)
    change = result["increase"]
    noise = result.get("noise") or {}  # a job of an older version has none
    figures = {
        "Perplexity": words.figure(result["perplexity"], 4, _noise(result)),
        "Full precision": words.figure(result["perplexity_full"], 4, _noise(result)),
        "Difference": words.signed_percent(change["relative"], 2),
        "KL (nats)": words.figure(result["kl"], 4, noise.get("kl")),
        "Top-1 agreement": f"{100 * result['top1']:.1f} %",
        "Measured size": format_bytes(result["measured_bytes"]),
    }
    for column, (label, value) in zip(st.columns(len(figures)), figures.items(), strict=True):
        column.metric(label, value)
    interval_text = words.interval(change["low"], change["high"])
    parts = [f"{stage} {words.seconds(result[f'{stage}_seconds'])}" for stage in _TIMED_STAGES]
    facts = [
        f"95 % interval of the difference {interval_text}",
        f"whole model {format_bytes(result['measured_model_bytes'])}",
        f"took {words.seconds(job.seconds)}: {', '.join(parts)}",
    ]
    if result.get("divergence"):  # a job of an older version has none
        facts.append(f"KL by token: {format_distribution(result['divergence'])}")
    facts += [f"numerical noise {describe_noise(noise)}"] if noise else []
    facts += [f"saved to {result['saved_to']}"] if result["saved_to"] else []
    st.caption(words.escape(" · ".join(facts)))
    if "export" in result:
        st.caption(describe_export(result))
    next_step("pages/4_Compare.py", "Compare it with the other runs")


def describe_export(result: dict) -> str:
    """Describe the measurements of the same model in another tool's format."""
    export = result["export"]
    change = export["perplexity"] / result["perplexity"] - 1
    return words.escape(
        f"As {FORMATS[export['format']].title}, run {export['run']}: perplexity "
        f"{words.figure(export['perplexity'], 4)} ({words.signed_percent(change, 2)} relative to "
        f"the model above), KL {words.figure(export['kl'], 4)} nats, "
        f"{format_bytes(export['measured_bytes'])} for the linear weights and "
        f"{format_bytes(export['measured_model_bytes'])} for the model, saved to "
        f"{export['saved_to']}"
    )


def model_options(job: Job) -> list[str]:
    """Return the options of a run's job that select the model and device."""
    option_values = [
        word
        for option in _MODEL_OPTIONS
        for value in job.option_values(option)
        for word in (option, value)
    ]
    return option_values + [flag for flag in _FLAGS if flag in job.arguments]


# --- plan against artifact --------------------------------------------------------------------


def show_audit(store: Store, job: Job) -> None:
    """Show the audit of the stored matrices: at once for a saved model, else by rebuilding it."""
    run = read_result(job)["run"]
    try:
        stored_run = store.run(run)
    except InputError:
        st.info("This run is no longer in the database.")
        return
    if saved_folder(stored_run) is not None:
        show_audit_result(audit_run(run, store).to_json())
        return
    folder = disk.jobs_folder(store)
    argv = ["audit", run, *model_options(job), "--db", str(store.path)]
    auditing = jobs_panel.find(folder, argv)
    if auditing is not None and auditing.state == "done":
        show_audit_result(auditing.result())
    elif auditing is not None:
        jobs_panel.follow(auditing)
    else:
        st.caption(
            "The quantized model was not saved. It can be rebuilt from its plan with the "
            "same quantizer to verify its stored tensors; nothing is evaluated."
        )
        if st.button("Rebuild and verify", icon=":material/fact_check:"):
            jobs.start(folder, argv)
            st.rerun()


def show_audit_result(audit: dict) -> None:
    """Show the verdict, then every matrix, starting with those that differ."""
    (st.success if audit["agrees"] else st.error)(words.escape(audit["verdict"]))
    lines = pd.DataFrame(audit["modules"]).sort_values("agrees", kind="stable")
    st.dataframe(
        pd.DataFrame(
            {
                "module": lines["module"],
                "layer": lines["layer"],
                "planned": lines["planned"],
                "planned bytes": lines["planned_bytes"],
                "stored": lines["stored"],
                "stored bytes": lines["stored_bytes"],
                "verdict": ["as planned" if agrees else "differs" for agrees in lines["agrees"]],
            }
        ),
        hide_index=True,
        height=260,
        column_config={
            name: st.column_config.NumberColumn(format="localized")
            for name in ("planned bytes", "stored bytes")
        },
    )
    st.caption(f"Read from {words.escape(_abbreviate_home(audit['source']))}")


def _abbreviate_home(source: str) -> str:
    """Replace the user's home folder by ``~``."""
    return source.replace(str(Path.home()), "~")
