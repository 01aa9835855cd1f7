"""The Run page in a real browser: failures, queued jobs, sweeps, audits and generation."""

from __future__ import annotations

import json
import os
import signal

import pandas as pd
import pytest

from lsq_core import disk, jobs
from lsq_core.results.audit import audit_run
from lsq_core.store.store import Store
from tests.browser.conftest import User, open_browser, serve

pytestmark = pytest.mark.browser

ADDRESS = "/Run?model=demo&method=uniform&ask=base&base=3.13"


def newest_job(server, verb: str) -> jobs.Job:
    folder = disk.jobs_folder(Store(server.database))
    return next(job for job in jobs.list_jobs(folder) if job.arguments[0] == verb)


def kill(job: jobs.Job) -> None:
    identity = json.loads((job.folder / "process.json").read_text())
    os.kill(identity["pid"], signal.SIGKILL)


def start_run(user, tokens: int) -> None:
    user.open(ADDRESS)
    user.wait(lambda: user.all("input[aria-label='Max tokens']"))
    user.type("Max tokens", str(tokens))
    user.click("Quantize and evaluate")


def start_evaluation(user, tokens: int) -> None:
    start_run(user, tokens)
    user.wait_for_headline("Evaluating", 60)


def evaluations(server) -> pd.DataFrame:
    return Store(server.database).query(
        "SELECT e.id AS evaluation, r.id AS run, r.method, e.perplexity "
        "FROM evaluations e JOIN runs r ON e.run = r.id"
    )


def test_killed_worker_shown_as_interrupted_and_resumed(user):
    """Takes half a minute: the evaluation is killed after saving a checkpoint."""
    start_evaluation(user, 16000)
    job = newest_job(user.server, "run")
    user.wait(lambda: list(job.folder.glob("evaluation-*.npz")), 60)
    kill(job)
    user.wait(lambda: "was interrupted" in user.first_line, why="nobody said it was killed")
    (alert,) = user.wait(lambda: user.texts("[data-testid=stAlertContentError]"))
    assert "'evaluate'" in alert
    user.driver.refresh()
    user.wait(lambda: "was interrupted" in user.first_line, why="a reload forgot it")
    user.click("Resume")
    user.wait(lambda: "Perplexity" in user.first_line, 120)
    (row,) = evaluations(user.server).itertuples()
    assert user.metric("Perplexity") == f"{row.perplexity:.4f}"
    begun = [line for line in job.log_tail(1000).splitlines() if " 0 of " in line]
    assert sum("windows are scored" in line for line in begun) == 1, "windows were scored twice"


def test_job_survives_server_restart(tmp_path):
    """The server is killed during a run; a new server finds the job still running."""
    with open_browser(tmp_path / "chromium") as driver:
        with serve("app.py", tmp_path) as server:
            user = User(driver, server)
            start_evaluation(user, 40000)
            driver.refresh()
            user.wait_for_headline("Evaluating", 60)
            driver.switch_to.new_window("tab")
            user.open("/Run?model=demo")
            user.wait_for_headline("Evaluating", 60)
            server.process.kill()
        job = newest_job(server, "run")
        assert job.active, "it ended with the server"
        with serve("app.py", tmp_path) as server:
            user = User(driver, server)
            user.open("/Run?model=demo")
            user.wait_for_headline("Perplexity", 300)
            (row,) = evaluations(server).itertuples()
            assert user.metric("Perplexity") == f"{row.perplexity:.4f}"


def test_queued_and_running_jobs_can_be_cancelled(user):
    start_evaluation(user, 0)
    first = newest_job(user.server, "run")
    user.type("Max tokens", "30000")  # an identical job would join the first
    user.click("Quantize and evaluate")
    user.first(".st-key-queue")
    second = newest_job(user.server, "run")
    assert second.id != first.id
    queue_panel = user.text(".st-key-queue")
    assert second.title in queue_panel
    assert "Waiting" in queue_panel
    bar = f".st-key-side-bar-{second.id} [role=progressbar]"
    assert user.attribute(bar, "aria-valuenow") == "0"
    user.click("Cancel", ".st-key-queue button")
    user.wait(lambda: not user.all(".st-key-queue"), why="it is still in the queue")
    assert jobs.read(second.folder).state == "cancelled"
    assert jobs.read(first.folder).state == "running"
    user.wait(user.is_idle)
    user.click("Cancel")
    user.wait(lambda: jobs.read(first.folder).state == "cancelled", 60)
    user.wait(lambda: "was cancelled" in user.first_line, 60)


def test_sweep_fills_table_and_store(user):
    from selenium.webdriver.common.keys import Keys

    before = set(evaluations(user.server)["evaluation"])
    user.open("/Run?model=demo")
    user.click("Sweep", "[role=tab]")
    user.type("Budgets", "2.25, 3.2")
    user.type("Max tokens", "1500")
    # SensiBoost and MXQ would measure a profile first
    methods = "[data-testid=stMultiSelect] input"
    for key in (Keys.BACKSPACE, Keys.BACKSPACE, Keys.ESCAPE):
        user.read(lambda key=key: user.first(methods).send_keys(key))
    captions = "[data-testid=stCaptionContainer]"
    user.wait(lambda: any(text.startswith("2 runs;") for text in user.texts(captions)))
    user.click("Start the sweep")
    line = user.wait_for_headline("2 new", 90)
    rows = evaluations(user.server)
    rows = rows[~rows["evaluation"].isin(before)]
    assert len(rows) == 2, "a plan that was run before gets an evaluation more, not a run"
    assert rows["run"].nunique() == 2
    best = rows.loc[rows["perplexity"].idxmin()]
    caption = user.text("[data-testid=stCaptionContainer]")
    assert f"perplexity {best['perplexity']:.2f}" in caption
    assert "0 failed" in line


def test_run_page_audit_and_generation_match_library(user):
    store = Store(user.server.database)
    start_run(user, 1500)
    user.wait(lambda: (job := newest_job(user.server, "run")).state == "done" and job, 90)
    user.wait(lambda: "over full precision" in user.first_line)
    run = newest_job(user.server, "run").result()["run"]
    user.click("Verify size", "[role=tab]")
    user.click("Rebuild and verify")
    alert = user.wait(lambda: user.texts("[data-testid=stAlertContentSuccess]"), 60)[0]
    assert alert == audit_run(run, store, device="cpu").verdict
    user.click("Generate", "[role=tab]")
    user.click("Generate")
    full, quantized = user.wait(
        lambda: (text_boxes := user.all(".lsq-text")) and len(text_boxes) == 2 and text_boxes, 60
    )
    kept = newest_job(user.server, "generate").result()
    for shown, name in ((full, "full"), (quantized, "quantized")):
        tokens = shown.find_elements("css selector", ".token")
        assert len(tokens) == len(kept[name])
        token_odds = tokens[0].get_attribute("data-odds")
        assert f"quantized {100 * kept[name][0]['quantized']:.1f} %" in token_odds
        divergence_marks = shown.find_elements("css selector", ".parts")
        divergence_index = kept["parts_at"]
        assert [tokens.index(p) for p in divergence_marks] == (
            [] if divergence_index is None else [divergence_index]
        )
