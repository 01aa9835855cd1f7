"""Jobs as real processes: done, failed, cancelled, killed, queued and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lsq_core import disk, jobs
from lsq_core.cli.program import main
from lsq_core.errors import InputError
from lsq_core.model.loading import inspect_model
from lsq_core.model.source import ModelSource
from lsq_core.store.store import Store
from tests.helpers import wait_for


def wait_for_end(job: jobs.Job) -> jobs.Job:
    return wait_for(lambda: (now := jobs.read(job.folder)) and not now.active and now)


def wait_for_stage(job: jobs.Job, stage: str) -> jobs.Job:
    def check_stage():
        now = jobs.read(job.folder)
        assert now.active, now.message
        return now.stage == stage and now

    return wait_for(check_stage)


def job_pid(job: jobs.Job) -> int:
    return json.loads((job.folder / "process.json").read_text())["pid"]


def process_ended(job: jobs.Job) -> bool:
    """Return whether the job's process has ended; until it is waited for, it is a zombie."""
    try:
        return psutil.Process(job_pid(job)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "lsq.duckdb")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "jobs"


@pytest.fixture
def quick_run(random_model, small_text, store) -> list[str]:
    """A command that takes seconds."""
    return [
        *["run", "--model", str(random_model("llama-gqa")), "--method", "uniform"],
        *["--base", "3.13", "--corpus", str(small_text), "--max-tokens", "300"],
        *["--quantizer", "rtn", "--db", str(store.path)],
    ]


@pytest.fixture
def long_evaluation(store) -> list[str]:
    """A run whose evaluation takes seconds."""
    return [
        *["run", "--model", "demo", "--device", "cpu", "--method", "uniform", "--base", "3.13"],
        *["--max-tokens", "6000", "--quantizer", "rtn", "--db", str(store.path)],
    ]


@pytest.fixture
def long_profile(store) -> list[str]:
    """A command that would take a minute or more."""
    command = ["profile", "--model", "demo", "--device", "cpu", "--quantizer", "rtn"]
    return [*command, "--db", str(store.path)]


@pytest.mark.parametrize(
    ("command", "title"),
    [
        ("run --model demo --method mxq --budget 2.7bpp", "MXQ 2.70 bits · demo"),
        ("run --model demo --method mxq --budget 9MiB", "MXQ 9MiB · demo"),
        ("run --method uniform --base 3.13", "Uniform 3.13 bits"),
        (
            "run --model a/b --method sensiboost --base 3.13 --budget 3.2bpp",
            "SensiBoost base 3.13, 3.20 bits · a/b",
        ),
        ("run --method none --budget --model demo", "none --model · demo"),
        ("sweep --model demo --method mxq --method uniform", "Sweep of MXQ, Uniform · demo"),
        ("profile --model /tmp/x/tiny --corpus c4", "Profile · tiny"),
        ("", "0"),
    ],
)
def test_job_title(command, title, tmp_path):
    assert jobs.Job("0", tmp_path, tuple(command.split()), 0.0, "done").title == title


def test_job_result_matches_command(folder, quick_run, store):
    job = jobs.start(folder, quick_run)
    assert job.active
    assert job.title == "Uniform 3.13 bits · " + quick_run[2].rpartition("/")[2]
    done = wait_for_end(job)
    assert done.state == "done", done.log_tail()
    result = done.result()
    row = store.results().iloc[0]
    assert row["run"] == result["run"]
    assert row["perplexity"] == result["perplexity"]
    assert done.memory > 50e6
    assert done.seconds > 0
    assert done.command == "lsq " + " ".join(quick_run)
    assert [j.id for j in jobs.list_jobs(folder)] == [job.id]


def test_job_bad_input_failed_with_message(folder, quick_run):
    done = wait_for_end(jobs.start(folder, [*quick_run, "--protocol", "sliding"]))
    assert (done.state, done.result()) == ("failed", None)
    assert "'sliding'" in done.message
    assert "is not a protocol" in done.message
    done = wait_for_end(jobs.start(folder, [*quick_run, "--no-such-option"]))
    assert done.state == "failed"
    assert "--no-such-option" in done.message


def test_job_exception_failed_with_traceback_in_log(folder, quick_run, store):
    """A value in our database that no version ever wrote is a bug, not bad input."""
    store.save_model(inspect_model(ModelSource(quick_run[quick_run.index("--model") + 1])))
    with store.connect() as connection:
        connection.execute("UPDATE models SET left_out = NULL")
    done = wait_for_end(jobs.start(folder, quick_run))
    assert done.state == "failed"
    assert "TypeError" in done.message
    assert "Traceback" in done.log_tail(400)
    assert store.query("SELECT count(*) n FROM runs")["n"][0] == 0


def test_cancel_within_2_s(folder, long_profile, store):
    job = wait_for_stage(jobs.start(folder, long_profile), "weights")
    started_at = time.monotonic()
    after = jobs.cancel(job)
    assert time.monotonic() - started_at < 2
    assert after.state == "cancelled"
    assert process_ended(job)
    assert store.query("SELECT count(*) AS n FROM profiles")["n"][0] == 0
    assert jobs.cancel(after).state == "cancelled", "twice does no harm"


_START = """
import json, sys
from pathlib import Path
from lsq_core import jobs
print(jobs.start(Path(sys.argv[1]), json.loads(sys.argv[2])).folder, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_cancel_job_of_another_process(folder, long_profile, stopped):
    """As from a terminal, for a job started by the app, which has not waited for it yet."""
    command = [sys.executable, "-c", _START, str(folder), json.dumps(long_profile)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        job = wait_for_stage(jobs.read(Path(other.stdout.readline().strip())), "weights")
        if stopped:
            os.kill(job_pid(job), signal.SIGSTOP)
        assert jobs.cancel(job).state == "cancelled"
        assert process_ended(job)
        other.stdin.close()


def test_cancel_stopped_process_is_killed(folder, long_profile):
    job = wait_for_stage(jobs.start(folder, long_profile), "weights")
    os.kill(job_pid(job), signal.SIGSTOP)  # a stopped process does not react to SIGTERM
    started_at = time.monotonic()
    after = jobs.cancel(job)
    assert time.monotonic() - started_at < 2
    assert after.state == "cancelled"
    assert process_ended(job)


@pytest.mark.parametrize("stage", ["start", "load", "quantize", "evaluate"])
def test_cancel_run_within_2_s_in_each_stage(folder, long_evaluation, stage):
    if stage == "quantize":  # round-to-nearest is too fast to be caught
        long_evaluation += ["--quantizer", "hqq"]
    started = jobs.start(folder, long_evaluation)
    job = started if stage == "start" else wait_for_stage(started, stage)
    started_at = time.monotonic()
    assert jobs.cancel(job).state == "cancelled"
    assert time.monotonic() - started_at < 2
    assert not jobs.read(job.folder).active
    assert process_ended(job)


def test_killed_job_interrupted_and_database_readable(folder, long_profile, store):
    job = wait_for_stage(jobs.start(folder, long_profile), "weights")
    os.kill(job_pid(job), signal.SIGKILL)
    after = wait_for_end(job)
    assert after.state == "interrupted"
    assert "'weights'" in after.message
    assert Store(store.path).results().empty
    assert jobs.list_jobs(folder)[0].state == "interrupted"


def test_jobs_on_same_device_are_queued(folder, long_profile, quick_run):
    first = wait_for_stage(jobs.start(folder, long_profile), "weights")
    second = jobs.start(folder, [*quick_run, "--device", "cpu"])
    waiting = wait_for(
        lambda: (now := jobs.read(second.folder)).message.startswith("Waiting") and now
    )
    assert waiting.state == "queued"
    os.kill(job_pid(first), signal.SIGKILL)  # the lock is released with the process
    assert wait_for_end(second).state == "done"


def test_cancel_queued_job(folder, long_profile, quick_run):
    first = wait_for_stage(jobs.start(folder, long_profile), "weights")
    second = jobs.start(folder, [*quick_run, "--device", "cpu"])
    wait_for(lambda: jobs.read(second.folder).message.startswith("Waiting"))
    assert jobs.cancel(jobs.read(second.folder)).state == "cancelled"
    assert jobs.cancel(first).state == "cancelled"


def test_reused_pid_is_not_the_job(folder, quick_run):
    job = wait_for_end(jobs.start(folder, quick_run))
    identity = {"pid": os.getpid(), "started": 1.0}  # this very process, which started later
    (job.folder / "process.json").write_text(json.dumps(identity))
    progress = json.loads((job.folder / "progress.json").read_text()) | {"state": "running"}
    (job.folder / "progress.json").write_text(json.dumps(progress))
    assert jobs.read(job.folder).state == "interrupted"
    assert jobs.cancel(jobs.read(job.folder)).state == "cancelled"


def test_read_folder_without_job_raises(tmp_path):
    with pytest.raises(InputError, match="no job"):
        jobs.read(tmp_path)
    assert jobs.list_jobs(tmp_path / "none") == []


# --- resuming -------------------------------------------------------------------------------


def kill_during_evaluation(folder: Path, arguments: list[str]) -> jobs.Job:
    """Return a job whose process was killed after it had saved some windows."""
    job = wait_for_stage(jobs.start(folder, arguments), "evaluate")
    wait_for(lambda: list(job.folder.glob("evaluation-*.npz")))
    os.kill(job_pid(job), signal.SIGKILL)
    return wait_for_end(job)


def test_resume_killed_run_continues_from_checkpoint(folder, long_evaluation, store, tmp_path):
    """Windows are not scored again, and the figures match those of an uninterrupted run."""
    job = kill_during_evaluation(folder, [*long_evaluation, "--save", str(tmp_path / "saved")])
    assert job.state == "interrupted"
    assert job.can_resume
    assert store.results().empty
    saved = (tmp_path / "saved" / "lsq.json").stat().st_mtime_ns
    scored = job.done
    after = wait_for_end(jobs.resume(job))
    assert after.state == "done", after.log_tail()
    assert after.id == job.id
    assert (tmp_path / "saved" / "lsq.json").stat().st_mtime_ns == saved, "saved twice"
    lines = [line for line in after.log_tail(1000).splitlines() if " windows " in line]
    begun = [int(line.split("windows ")[1].split("–")[0]) for line in lines if "–" in line]
    assert begun == sorted(begun), "it began with the first window again"
    assert sum("0 of " in line and "are scored" in line for line in lines) == 1
    assert scored > 0
    (row,) = store.results().itertuples()
    assert row.run == after.result()["run"]
    assert main([*long_evaluation, "--json"]) == 0
    uninterrupted = store.results().iloc[0]
    assert uninterrupted["perplexity"] == pytest.approx(row.perplexity, rel=1e-9)
    assert uninterrupted["kl"] == pytest.approx(row.kl, rel=1e-6)
    assert uninterrupted["tokens"] == row.tokens


def test_resume_after_run_stored_does_not_duplicate(folder, quick_run, store):
    """The job was killed after its last stage, before it reported its end."""
    job = wait_for_end(jobs.start(folder, quick_run))
    (job.folder / "result.json").unlink()
    progress = json.loads((job.folder / "progress.json").read_text()) | {"state": "running"}
    (job.folder / "progress.json").write_text(json.dumps(progress))
    interrupted = wait_for_end(job)
    assert interrupted.state == "interrupted"
    done = wait_for_end(jobs.resume(interrupted))
    assert done.state == "done", done.log_tail()
    rows = store.query("SELECT run FROM evaluations WHERE run IS NOT NULL")
    assert rows["run"].tolist() == [done.result()["run"]]
    assert len(store.query("SELECT id FROM runs")) == 1


def test_resume_done_or_running_job_raises(folder, quick_run, long_profile):
    done = wait_for_end(jobs.start(folder, quick_run))
    with pytest.raises(InputError, match=r"done.* resume"):
        jobs.resume(done)
    running = wait_for_stage(jobs.start(folder, long_profile), "weights")
    with pytest.raises(InputError, match="is running"):
        jobs.resume(running)
    cancelled = jobs.cancel(running)
    first = jobs.resume(cancelled)
    with pytest.raises(InputError, match="nothing to resume"):
        jobs.resume(cancelled)  # as still shown in another tab
    assert jobs.cancel(first).state == "cancelled"


def test_cli_resume_job_by_id(quick_run, store, capsys):
    folder = disk.jobs_folder(store)
    job = jobs.start(folder, [*quick_run, "--method", "uniform"])
    jobs.cancel(job)
    database = ["--db", str(store.path)]
    assert main(["jobs", *database, "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["jobs"]
    assert (listed["id"], listed["state"]) == (job.id, "cancelled")
    assert main(["resume", *database]) == 2, "what was cancelled on purpose goes on only by name"
    assert main(["resume", job.id, *database]) == 0
    output = capsys.readouterr().out
    assert f"job {job.id} is done" in output
    assert "too few windows" in output
    assert main(["resume", job.id, *database]) == 2, "it is done"


def test_cli_resume_newest_interrupted(quick_run, store, capsys):
    folder = disk.jobs_folder(store)
    job = wait_for_stage(jobs.start(folder, [*quick_run, "--method", "uniform"]), "load")
    os.kill(job_pid(job), signal.SIGKILL)
    assert wait_for_end(job).state == "interrupted"
    database = ["--db", str(store.path)]
    assert main(["resume", *database, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["job"] == job.id
    assert answer["result"]["run"] == store.results()["run"][0]
    assert main(["resume", *database]) == 2, "nothing was interrupted any more"


def test_auto_device_queues_behind_cpu_job(folder, long_profile, quick_run, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    first = wait_for_stage(jobs.start(folder, long_profile), "weights")
    second = jobs.start(folder, quick_run)  # on the device "auto"
    wait_for(lambda: jobs.read(second.folder).message.startswith("Waiting"))
    assert jobs.cancel(jobs.read(first.folder)).state == "cancelled"
    assert wait_for_end(second).state == "done"


def test_queued_job_progress_is_empty(folder, long_profile, quick_run):
    """It has no fraction done and no stage, so its bar is empty."""
    first = wait_for_stage(jobs.start(folder, long_profile), "weights")
    second = jobs.start(folder, [*quick_run, "--device", "cpu"])
    waiting = wait_for(
        lambda: (now := jobs.read(second.folder)).message.startswith("Waiting") and now
    )
    assert (waiting.fraction, waiting.stage, waiting.eta, waiting.seconds) == (0.0, "", None, 0.0)
    jobs.cancel(waiting)
    resumed = jobs.resume(jobs.read(second.folder))
    assert (resumed.fraction, resumed.stage) == (0.0, "")
    jobs.cancel(resumed)
    jobs.cancel(first)
