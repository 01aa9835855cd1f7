"""Jobs as real processes: done, failed, cancelled, killed, waiting for one another."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from lsq_core import disk, jobs
from lsq_core.cli import main
from lsq_core.errors import InputError
from lsq_core.model.loading import inspect_model
from lsq_core.model.source import ModelSource
from lsq_core.store.store import Store


def wait_for(condition, seconds: float = 60):
    """Poll until something is so; the deadline is for a hang, not a measure of speed."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)
    return value


def ended(job: jobs.Job) -> jobs.Job:
    return wait_for(lambda: (now := jobs.read(job.folder)) and not now.active and now)


def in_stage(job: jobs.Job, stage: str) -> jobs.Job:
    def look():
        now = jobs.read(job.folder)
        assert now.active, now.message
        return now.stage == stage and now

    return wait_for(look)


def pid_of(job: jobs.Job) -> int:
    return json.loads((job.folder / "process.json").read_text())["pid"]


def gone(job: jobs.Job) -> bool:
    """Whether the job's process has ended; one that nobody has waited for yet is a zombie."""
    try:
        return psutil.Process(pid_of(job)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "lsq.duckdb")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "jobs"


@pytest.fixture
def quick(random_model, small_text, store) -> list[str]:
    """A command that takes seconds."""
    return [
        *["run", "--model", str(random_model("llama-gqa")), "--method", "uniform"],
        *["--base", "3.13", "--corpus", str(small_text), "--max-tokens", "300"],
        *["--quantizer", "rtn", "--db", str(store.path)],
    ]


@pytest.fixture
def evaluation(store) -> list[str]:
    """A run whose evaluation takes seconds."""
    return [
        *["run", "--model", "demo", "--device", "cpu", "--method", "uniform", "--base", "3.13"],
        *["--max-tokens", "6000", "--quantizer", "rtn", "--db", str(store.path)],
    ]


@pytest.fixture
def long(store) -> list[str]:
    """A command that would take a minute or more."""
    command = ["profile", "--model", "demo", "--device", "cpu", "--quantizer", "rtn"]
    return [*command, "--db", str(store.path)]


def test_a_job_does_what_the_command_does(folder, quick, store):
    job = jobs.start(folder, quick)
    assert job.active
    assert job.title.startswith("run uniform ")
    done = ended(job)
    assert done.state == "done", done.log_tail()
    result = done.result()
    row = store.results().iloc[0]
    assert row["run"] == result["run"]
    assert row["perplexity"] == result["perplexity"]
    assert done.memory > 50e6
    assert done.seconds > 0
    assert done.command == "lsq " + " ".join(quick)
    assert [j.id for j in jobs.list_jobs(folder)] == [job.id]


def test_bad_input_fails_with_its_sentence(folder, quick):
    done = ended(jobs.start(folder, [*quick, "--protocol", "sliding"]))
    assert (done.state, done.result()) == ("failed", None)
    assert "'sliding'" in done.message
    assert "strided or blocks" in done.message
    done = ended(jobs.start(folder, [*quick, "--no-such-option"]))
    assert done.state == "failed"
    assert "--no-such-option" in done.message


def test_a_defect_fails_with_its_name_and_leaves_a_log(folder, quick, store):
    """What no version ever wrote, in a database of ours, is nobody's input."""
    store.save_model(inspect_model(ModelSource(quick[quick.index("--model") + 1])))
    with store.connect() as connection:
        connection.execute("UPDATE models SET left_out = NULL")
    done = ended(jobs.start(folder, quick))
    assert done.state == "failed"
    assert "TypeError" in done.message
    assert "Traceback" in done.log_tail(400)
    assert store.query("SELECT count(*) n FROM runs")["n"][0] == 0


def test_cancel_takes_less_than_two_seconds(folder, long, store):
    job = in_stage(jobs.start(folder, long), "weights")
    began = time.monotonic()
    after = jobs.cancel(job)
    assert time.monotonic() - began < 2
    assert after.state == "cancelled"
    assert gone(job)
    assert store.query("SELECT count(*) AS n FROM profiles")["n"][0] == 0
    assert jobs.cancel(after).state == "cancelled", "twice does no harm"


def test_a_process_that_will_not_listen_is_killed(folder, long):
    job = in_stage(jobs.start(folder, long), "weights")
    os.kill(pid_of(job), signal.SIGSTOP)  # a stopped process does not act on a request to end
    began = time.monotonic()
    after = jobs.cancel(job)
    assert time.monotonic() - began < 2
    assert after.state == "cancelled"
    assert gone(job)


@pytest.mark.parametrize("stage", ["start", "load", "quantize", "evaluate"])
def test_a_run_is_cancelled_within_two_seconds_in_every_stage(folder, evaluation, stage):
    if stage == "quantize":  # round-to-nearest is over before it is seen
        evaluation += ["--quantizer", "hqq"]
    started = jobs.start(folder, evaluation)
    job = started if stage == "start" else in_stage(started, stage)
    began = time.monotonic()
    assert jobs.cancel(job).state == "cancelled"
    assert time.monotonic() - began < 2
    assert not jobs.read(job.folder).active
    assert gone(job)


def test_a_killed_job_is_shown_as_interrupted_and_the_database_reads(folder, long, store):
    job = in_stage(jobs.start(folder, long), "weights")
    os.kill(pid_of(job), signal.SIGKILL)
    after = ended(job)
    assert after.state == "interrupted"
    assert "'weights'" in after.message
    assert Store(store.path).results().empty
    assert jobs.list_jobs(folder)[0].state == "interrupted"


def test_jobs_on_one_device_wait_for_each_other(folder, long, quick):
    first = in_stage(jobs.start(folder, long), "weights")
    second = jobs.start(folder, [*quick, "--device", "cpu"])
    waiting = wait_for(
        lambda: (now := jobs.read(second.folder)).message.startswith("Waiting") and now
    )
    assert waiting.state == "queued"
    os.kill(pid_of(first), signal.SIGKILL)  # the lock goes with the process
    assert ended(second).state == "done"


def test_a_queued_job_can_be_cancelled(folder, long, quick):
    first = in_stage(jobs.start(folder, long), "weights")
    second = jobs.start(folder, [*quick, "--device", "cpu"])
    wait_for(lambda: jobs.read(second.folder).message.startswith("Waiting"))
    assert jobs.cancel(jobs.read(second.folder)).state == "cancelled"
    assert jobs.cancel(first).state == "cancelled"


def test_a_number_used_again_is_not_the_job(folder, quick):
    job = ended(jobs.start(folder, quick))
    identity = {"pid": os.getpid(), "started": 1.0}  # this very process, which started later
    (job.folder / "process.json").write_text(json.dumps(identity))
    progress = json.loads((job.folder / "progress.json").read_text()) | {"state": "running"}
    (job.folder / "progress.json").write_text(json.dumps(progress))
    assert jobs.read(job.folder).state == "interrupted"
    assert jobs.cancel(jobs.read(job.folder)).state == "cancelled"


def test_a_folder_without_a_job(tmp_path):
    with pytest.raises(InputError, match="no job"):
        jobs.read(tmp_path)
    assert jobs.list_jobs(tmp_path / "none") == []


# --- resuming -------------------------------------------------------------------------------


def killed_in_evaluation(folder: Path, arguments: list[str]) -> jobs.Job:
    """A job whose process was killed after it had kept some windows."""
    job = in_stage(jobs.start(folder, arguments), "evaluate")
    wait_for(lambda: list(job.folder.glob("evaluation-*.npz")))
    os.kill(pid_of(job), signal.SIGKILL)
    return ended(job)


def test_a_killed_run_goes_on_where_it_was(folder, evaluation, store, tmp_path):
    """Windows scored before aren't scored again, and the figures are those of a run in one go."""
    job = killed_in_evaluation(folder, [*evaluation, "--save", str(tmp_path / "saved")])
    assert job.state == "interrupted"
    assert job.can_resume
    assert store.results().empty
    saved = (tmp_path / "saved" / "lsq.json").stat().st_mtime_ns
    scored = job.done
    after = ended(jobs.resume(job))
    assert after.state == "done", after.log_tail()
    assert after.id == job.id
    assert (tmp_path / "saved" / "lsq.json").stat().st_mtime_ns == saved, "saved twice"
    lines = [line for line in after.log_tail(400).splitlines() if " window " in line]
    windows = [int(line.split("window ")[1].split(" of ")[0]) for line in lines]
    assert windows.count(0) == 1, "it began with the first window again"
    assert windows == sorted(windows)
    assert scored > 0
    (row,) = store.results().itertuples()
    assert row.run == after.result()["run"]
    assert main([*evaluation, "--json"]) == 0
    whole = store.results().iloc[0]
    assert whole["perplexity"] == pytest.approx(row.perplexity, rel=1e-9)
    assert whole["kl"] == pytest.approx(row.kl, rel=1e-6)
    assert whole["tokens"] == row.tokens


def test_a_run_that_was_kept_is_not_kept_twice(folder, quick, store):
    """Killed after the last stage, before it could say so."""
    job = ended(jobs.start(folder, quick))
    (job.folder / "result.json").unlink()
    progress = json.loads((job.folder / "progress.json").read_text()) | {"state": "running"}
    (job.folder / "progress.json").write_text(json.dumps(progress))
    interrupted = ended(job)
    assert interrupted.state == "interrupted"
    done = ended(jobs.resume(interrupted))
    assert done.state == "done", done.log_tail()
    rows = store.query("SELECT run FROM evaluations WHERE run IS NOT NULL")
    assert rows["run"].tolist() == [done.result()["run"]]
    assert len(store.query("SELECT id FROM runs")) == 1


def test_only_what_has_no_result_can_be_resumed(folder, quick, long):
    done = ended(jobs.start(folder, quick))
    with pytest.raises(InputError, match=r"done.* resume"):
        jobs.resume(done)
    running = in_stage(jobs.start(folder, long), "weights")
    with pytest.raises(InputError, match="is running"):
        jobs.resume(running)
    cancelled = jobs.cancel(running)
    first = jobs.resume(cancelled)
    with pytest.raises(InputError, match="nothing to resume"):
        jobs.resume(cancelled)  # what a second tab still shows
    assert jobs.cancel(first).state == "cancelled"


def test_a_job_resumes_from_the_command_line(quick, store, capsys):
    folder = disk.jobs_folder(store)
    job = jobs.start(folder, [*quick, "--method", "uniform"])
    jobs.cancel(job)
    database = ["--db", str(store.path)]
    assert main(["jobs", *database, "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["jobs"]
    assert (listed["id"], listed["state"]) == (job.id, "cancelled")
    assert main(["resume", *database]) == 2, "what was cancelled on purpose goes on only by name"
    assert main(["resume", job.id, *database]) == 0
    told = capsys.readouterr().out
    assert f"job {job.id} is done" in told
    assert "too few windows" in told
    assert main(["resume", job.id, *database]) == 2, "it is done"


def test_the_command_line_resumes_the_newest_interrupted(quick, store, capsys):
    folder = disk.jobs_folder(store)
    job = in_stage(jobs.start(folder, [*quick, "--method", "uniform"]), "load")
    os.kill(pid_of(job), signal.SIGKILL)
    assert ended(job).state == "interrupted"
    database = ["--db", str(store.path)]
    assert main(["resume", *database, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["job"] == job.id
    assert answer["result"]["run"] == store.results()["run"][0]
    assert main(["resume", *database]) == 2, "nothing was interrupted any more"


def test_auto_waits_for_the_device_that_it_means(folder, long, quick, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    first = in_stage(jobs.start(folder, long), "weights")
    second = jobs.start(folder, quick)  # on auto
    wait_for(lambda: jobs.read(second.folder).message.startswith("Waiting"))
    assert jobs.cancel(jobs.read(first.folder)).state == "cancelled"
    assert ended(second).state == "done"


def test_a_waiting_job_has_nothing_of_the_one_before(folder, long, quick):
    """Neither a share done nor a stage: its bar begins empty."""
    first = in_stage(jobs.start(folder, long), "weights")
    second = jobs.start(folder, [*quick, "--device", "cpu"])
    waiting = wait_for(
        lambda: (now := jobs.read(second.folder)).message.startswith("Waiting") and now
    )
    assert (waiting.fraction, waiting.stage, waiting.eta, waiting.seconds) == (0.0, "", None, 0.0)
    jobs.cancel(waiting)
    resumed = jobs.resume(jobs.read(second.folder))
    assert (resumed.fraction, resumed.stage) == (0.0, "")
    jobs.cancel(resumed)
    jobs.cancel(first)
