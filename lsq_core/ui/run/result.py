"""What came of a run: its figures, the audit of what it stored, and its text beside the full's."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lsq_core import disk, jobs
from lsq_core.errors import InputError
from lsq_core.files import Damaged
from lsq_core.jobs import Job
from lsq_core.results.audit import audit_run
from lsq_core.stages.saved import saved_folder
from lsq_core.store.store import Store
from lsq_core.ui import jobs_panel, words
from lsq_core.ui.page import Here, headline, next_step
from lsq_core.ui.run import texts
from lsq_core.ui.safe import st
from lsq_core.units import format_bytes

#: Stages whose time a result tells.
_TIMED = ("quantize", "evaluate")
_TABS = ("Figures", "Plan against artifact", "Try a prompt", "Log")
#: Options of a run that its audit and its texts are made with too.
_SAME = ("--model", "--revision", "--device")
#: What the page shows of a result.
_FIGURES = {
    *("run", "perplexity", "perplexity_full", "increase", "kl", "top1", "corpus", "protocol"),
    *("tokens", "truncated", "measured_bytes", "measured_model_bytes", "saved_to"),
    *(f"{stage}_seconds" for stage in _TIMED),
}
_FLAGS = ("--trust-remote-code", "--allow-pickle")


def result_of(job: Job) -> dict:
    """What came of a run that is done.

    Raises
    ------
    Damaged
        When it can't be read, or figures are missing.
    """
    result = job.result() or {}
    if not result.keys() >= _FIGURES or not isinstance(result["increase"], dict):
        raise Damaged(f"{job.folder / 'result.json'} is damaged: it lacks figures of the run.")
    return result


def say(job: Job) -> None:
    """The first line: how far it is, or what came of it."""
    what = job.title.removeprefix("run ")
    if job.active:
        jobs_panel.say(job)
        return
    result = result_of(job) if job.state == "done" else None
    if result is None:
        headline(f"The run {jobs_panel.ENDED[job.state]}.", what)
        return
    change = result["increase"]
    headline(
        f"Perplexity {words.figure(result['perplexity'], 2)}, "
        f"{words.signed_percent(change['relative'])} over full precision.",
        f"{what} · {result['corpus']}, {result['protocol']}, {result['tokens']:,} tokens"
        + (", cut by max tokens" if result["truncated"] else ""),
    )


def show(here: Here, job: Job) -> None:
    """A run that is done."""
    figures, audited, prompt, log = st.tabs(_TABS, key="run_view")
    with figures:
        show_figures(job)
    with audited:
        show_audit(here.store, job)
    with prompt:
        texts.show(here.store, job, arguments_of(job))
    with log:
        st.caption(job.command)
        st.code(job.log_tail(40), language=None, height=240)


def show_figures(job: Job) -> None:
    """What was measured."""
    result = result_of(job)
    change = result["increase"]
    figures = {
        "Perplexity": words.figure(result["perplexity"], 4),
        "Full precision": words.figure(result["perplexity_full"], 4),
        "Difference": words.signed_percent(change["relative"], 2),
        "KL (nats)": words.figure(result["kl"], 4),
        "Same top token": f"{100 * result['top1']:.1f} %",
        "Measured": format_bytes(result["measured_bytes"]),
    }
    for column, (label, value) in zip(st.columns(len(figures)), figures.items(), strict=True):
        column.metric(label, value)
    spread = words.interval(change["low"], change["high"])
    parts = [f"{stage} {words.seconds(result[f'{stage}_seconds'])}" for stage in _TIMED]
    facts = [
        f"95 % interval of the difference {spread}",
        f"whole model {format_bytes(result['measured_model_bytes'])}",
        f"took {words.seconds(job.seconds)}: {', '.join(parts)}",
    ]
    facts += [f"saved to {result['saved_to']}"] if result["saved_to"] else []
    st.caption(" · ".join(facts))
    next_step("pages/4_Compare.py", "Compare it with the other runs")


def arguments_of(job: Job) -> list[str]:
    """The options that say which model a run was of and where it ran, and its database."""
    given = [word for option in _SAME for value in job.given(option) for word in (option, value)]
    return given + [flag for flag in _FLAGS if flag in job.arguments]


# --- plan against artifact --------------------------------------------------------------------


def show_audit(store: Store, job: Job) -> None:
    """Module by module what was stored: at once for a saved model, else by making it again."""
    run = result_of(job)["run"]
    try:
        kept = store.run(run)
    except InputError:
        st.info("This run is not in the database any more.")
        return
    if saved_folder(kept) is not None:
        show_found(audit_run(run, store).to_json())
        return
    folder = disk.jobs_folder(store)
    words_of = ["audit", run, *arguments_of(job), "--db", str(store.path)]
    auditing = jobs_panel.find(folder, words_of)
    if auditing is not None and auditing.state == "done":
        show_found(auditing.result())
    elif auditing is not None:
        jobs_panel.follow(auditing)
    else:
        st.caption(
            "The quantized model was not saved. It can be made once more from its plan, by the "
            "same quantizer, and its stored tensors measured; that evaluates nothing."
        )
        if st.button("Make it again and audit it", icon=":material/fact_check:"):
            jobs.start(folder, words_of)
            st.rerun()


def show_found(found: dict) -> None:
    """The verdict first, then every matrix, those that are wrong on top."""
    (st.success if found["agrees"] else st.error)(words.literal(found["verdict"]))
    lines = pd.DataFrame(found["modules"]).sort_values("agrees", kind="stable")
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
    st.caption(f"Read from {words.literal(_shortened(found['source']))}")


def _shortened(source: str) -> str:
    """With the person's own folder as ``~``."""
    return source.replace(str(Path.home()), "~")
