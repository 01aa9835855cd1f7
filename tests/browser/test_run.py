"""The Run page when things go wrong, and many runs at once: what is shown is what was kept."""

from __future__ import annotations

import json
import os
import signal
import time

import pandas as pd
import pytest

from lsq_core import disk, jobs
from lsq_core.results.audit import audit_run
from lsq_core.store.store import Store
from tests.browser.conftest import Person, open_browser, serve

pytestmark = pytest.mark.browser

ADDRESS = "/Run?model=demo&method=uniform&ask=base&base=3.13"


def newest(server, verb: str) -> jobs.Job:
    folder = disk.jobs_folder(Store(server.database))
    return next(job for job in jobs.list_jobs(folder) if job.arguments[0] == verb)


def kill(job: jobs.Job) -> None:
    identity = json.loads((job.folder / "process.json").read_text())
    os.kill(identity["pid"], signal.SIGKILL)


def begin_a_run(person, tokens: int) -> None:
    person.open(ADDRESS)
    person.wait(lambda: person.all("input[aria-label='Max tokens']"))
    person.type("Max tokens", str(tokens))
    person.click("Quantize and evaluate")


def begin_evaluating(person, tokens: int) -> None:
    begin_a_run(person, tokens)
    person.reads("Evaluating", 60)


def runs(server) -> pd.DataFrame:
    return Store(server.database).query(
        "SELECT e.id AS evaluation, r.id AS run, r.method, e.perplexity "
        "FROM evaluations e JOIN runs r ON e.run = r.id"
    )


def test_a_killed_worker_is_shown_and_resumed(person):
    """Half a minute: the evaluation has to be cut off after it kept something."""
    begin_evaluating(person, 16000)
    job = newest(person.server, "run")
    person.wait(lambda: list(job.folder.glob("evaluation-*.npz")), 60)
    kill(job)
    person.wait(lambda: "was interrupted" in person.first_line, why="nobody said it was killed")
    (told,) = person.wait(lambda: person.all("[data-testid=stAlertContentError]"))
    assert "'evaluate'" in told.text
    person.driver.refresh()
    person.wait(lambda: "was interrupted" in person.first_line, why="a reload forgot it")
    person.click("Resume")
    person.wait(lambda: "Perplexity" in person.first_line, 120)
    (row,) = runs(person.server).itertuples()
    assert person.metric("Perplexity") == f"{row.perplexity:.4f}"
    windows = [line for line in job.log_tail(400).splitlines() if "window 0 of" in line]
    assert len(windows) == 1, "windows were scored twice"


def test_a_job_outlives_the_server_and_is_seen_in_a_second_tab(tmp_path):
    """Server killed without notice in mid-run; another one finds the job, still running."""
    with open_browser(tmp_path / "chromium") as driver:
        with serve("app.py", tmp_path) as server:
            person = Person(driver, server)
            begin_evaluating(person, 12000)
            driver.refresh()
            person.reads("Evaluating", 60)
            driver.switch_to.new_window("tab")
            person.open("/Run?model=demo")
            person.reads("Evaluating", 60)
            server.process.kill()
        job = newest(server, "run")
        assert job.active, "it ended with the server"
        with serve("app.py", tmp_path) as server:
            person = Person(driver, server)
            person.open("/Run?model=demo")
            person.reads("Perplexity", 120)
            (row,) = runs(server).itertuples()
            assert person.metric("Perplexity") == f"{row.perplexity:.4f}"


def test_a_queue_is_seen_and_cancelled(person):
    begin_evaluating(person, 0)
    first = newest(person.server, "run")
    person.type("Max tokens", "30000")  # the same again would be joined
    person.click("Quantize and evaluate")
    waiting = person.wait(lambda: person.all(".st-key-queue"), why="no queue is shown")[0]
    second = newest(person.server, "run")
    assert second.id != first.id
    assert second.title in waiting.text
    assert "Waiting" in waiting.text
    bar = person.wait(lambda: person.all(f".st-key-side-bar-{second.id} [role=progressbar]"))[0]
    assert bar.get_attribute("aria-valuenow") == "0"
    person.click("Cancel", ".st-key-queue button")
    person.wait(lambda: not person.all(".st-key-queue"), why="it is still in the queue")
    assert jobs.read(second.folder).state == "cancelled"
    assert jobs.read(first.folder).state == "running"
    person.wait(person.settled)
    began = time.monotonic()
    person.click("Cancel")
    person.wait(lambda: jobs.read(first.folder).state == "cancelled", 10)
    took = time.monotonic() - began
    print(f"from the click to the end of the process: {took:.2f} s")
    assert took < 6, "may take 2 s; beside other tests 3 times that"
    person.wait(lambda: "was cancelled" in person.first_line, 10)


def test_a_sweep_fills_its_rows_and_the_store(person):
    from selenium.webdriver.common.keys import Keys

    before = set(runs(person.server)["evaluation"])
    person.open("/Run?model=demo")
    person.click("Sweep", "[role=tab]")
    person.type("Budgets", "2.25, 3.2")
    person.type("At most tokens", "1500")
    # SensiBoost and MXQ would measure a profile first
    methods = person.all("[data-testid=stMultiSelect] input")[0]
    methods.send_keys(Keys.BACKSPACE, Keys.BACKSPACE, Keys.ESCAPE)
    captions = "[data-testid=stCaptionContainer]"
    person.wait(lambda: any(e.text.startswith("2 runs;") for e in person.all(captions)))
    person.click("Start the sweep")
    line = person.reads("2 made", 90)
    rows = runs(person.server)
    rows = rows[~rows["evaluation"].isin(before)]
    assert len(rows) == 2, "a plan that was run before gets an evaluation more, not a run"
    assert rows["run"].nunique() == 2
    best = rows.loc[rows["perplexity"].idxmin()]
    under = person.all("[data-testid=stCaptionContainer]")[0].text
    assert f"perplexity {best['perplexity']:.2f}" in under
    assert "0 not made" in line


def test_a_run_is_audited_and_writes_beside_full_precision(person):
    store = Store(person.server.database)
    begin_a_run(person, 1500)
    person.wait(lambda: (job := newest(person.server, "run")).state == "done" and job, 90)
    person.wait(lambda: "over full precision" in person.first_line)
    run = newest(person.server, "run").result()["run"]
    person.click("Plan against artifact", "[role=tab]")
    person.click("Make it again and audit it")
    told = person.wait(lambda: person.all("[data-testid=stAlertContentSuccess]"), 60)[0].text
    assert told == audit_run(run, store, device="cpu").verdict
    person.click("Try a prompt", "[role=tab]")
    person.click("Write")
    full, quantized = person.wait(
        lambda: (found := person.all(".lsq-text")) and len(found) == 2 and found, 60
    )
    kept = newest(person.server, "generate").result()
    for shown, name in ((full, "full"), (quantized, "quantized")):
        tokens = shown.find_elements("css selector", ".token")
        assert len(tokens) == len(kept[name])
        odds = tokens[0].get_attribute("data-odds")
        assert f"quantized {100 * kept[name][0]['quantized']:.1f} %" in odds
        parted = shown.find_elements("css selector", ".parts")
        at = kept["parts_at"]
        assert [tokens.index(p) for p in parted] == ([] if at is None else [at])
