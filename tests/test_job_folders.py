"""Job folders: damage, identical jobs, interruptions, and the time it takes to list them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import psutil
import pytest

from lsq_core import disk, jobs
from lsq_core.cli.program import main
from lsq_core.errors import InputError, LsqError
from lsq_core.files import DamagedFileError
from lsq_core.jobs import worker
from lsq_core.jsontext import json_bytes, write_json
from lsq_core.store.store import Store
from lsq_core.ui import jobs_panel
from tests.conftest import ROOT
from tests.test_jobs import job_pid, process_ended, wait_for, wait_for_end

RESULT = {"run": "abc", "perplexity": 3.5}


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "jobs"


def make_finished_job(folder: Path, id: str, arguments: tuple[str, ...] = ("results",)) -> Path:
    """Create the folder of a finished job, as its process leaves it."""
    job_folder = folder / id
    job_folder.mkdir(parents=True)
    write_json(job_folder / "job.json", {"id": id, "arguments": arguments, "created": 1.7e9})
    write_json(job_folder / "process.json", {"pid": 2**22 - 1, "started": 1.0, "oom_kills": None})
    content = json_bytes(RESULT)
    (job_folder / "result.json").write_bytes(content)
    progress = {"state": "done", "message": "Done.", "stage": "store", "done": 1, "total": 1}
    progress |= {"seconds": 2.0, "memory": 10**8, "eta": None}
    progress |= {"result_bytes": len(content), "result_sha256": sha256(content).hexdigest()}
    write_json(job_folder / "progress.json", progress)
    (job_folder / "log.txt").write_text("12:00:00 done: Done.\n")
    return job_folder


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda job_folder: (job_folder / name).write_bytes(content)


def update_json(name: str, **entries: object) -> Callable[[Path], object]:
    """Return a function that overwrites entries of a JSON file in a job's folder."""

    def damage(job_folder: Path) -> None:
        content = json.loads((job_folder / name).read_bytes()) | entries
        (job_folder / name).write_text(json.dumps(content))

    return damage


def fill_with_zeros(name: str) -> Callable[[Path], object]:
    return lambda job_folder: (job_folder / name).write_bytes(
        bytes((job_folder / name).stat().st_size)
    )


def truncate_file(name: str) -> Callable[[Path], object]:
    return lambda job_folder: os.truncate(
        job_folder / name, (job_folder / name).stat().st_size // 2
    )


def replace_by_folder(name: str) -> Callable[[Path], object]:
    def damage(job_folder: Path) -> None:
        (job_folder / name).unlink()
        (job_folder / name).mkdir()

    return damage


#: Kinds of damage to a job's folder, and the states that the job may have afterwards.
DAMAGES: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "job-empty": (overwrite("job.json", b""), {"damaged"}),
    "job-cut": (truncate_file("job.json"), {"damaged"}),
    "job-zeroed": (fill_with_zeros("job.json"), {"damaged"}),
    "job-missing": (lambda job_folder: (job_folder / "job.json").unlink(), {"damaged"}),
    "job-list": (overwrite("job.json", b"[]"), {"damaged"}),
    "job-not-utf8": (overwrite("job.json", b'{"id": "\xff"}'), {"damaged"}),
    "job-deep": (overwrite("job.json", b'{"a":' * 100_000), {"damaged"}),
    "job-folder": (replace_by_folder("job.json"), {"damaged"}),
    "job-no-arguments": (update_json("job.json", arguments=[]), {"damaged"}),
    "job-text-arguments": (update_json("job.json", arguments="run"), {"damaged"}),
    "job-number-argument": (update_json("job.json", arguments=["run", 3]), {"damaged"}),
    "job-null-argument": (update_json("job.json", arguments=["run", "a\0b"]), {"damaged"}),
    "job-text-created": (update_json("job.json", created="now"), {"damaged"}),
    "job-created-far-off": (update_json("job.json", created=1e300), {"damaged"}),
    "progress-empty": (overwrite("progress.json", b""), {"done"}),
    "progress-cut": (truncate_file("progress.json"), {"done"}),
    "progress-zeroed": (fill_with_zeros("progress.json"), {"done"}),
    "progress-list": (overwrite("progress.json", b"[1]"), {"done"}),
    "progress-unknown-state": (update_json("progress.json", state="fine"), {"done"}),
    "progress-text-done": (update_json("progress.json", done="x"), {"done"}),
    "progress-negative-total": (update_json("progress.json", total=-1), {"done"}),
    "progress-nan": (overwrite("progress.json", b'{"state": "done", "eta": NaN}'), {"done"}),
    "progress-and-result-gone": (
        lambda job_folder: [
            overwrite("progress.json", b"")(job_folder),
            (job_folder / "result.json").unlink(),
        ],
        {"interrupted"},
    ),
    "process-empty": (overwrite("process.json", b""), {"done"}),
    "process-zeroed-while-running": (
        lambda job_folder: [
            fill_with_zeros("process.json")(job_folder),
            update_json("progress.json", state="running")(job_folder),
        ],
        {"interrupted"},
    ),
    "process-text-pid": (
        lambda job_folder: [
            update_json("process.json", pid="x")(job_folder),
            update_json("progress.json", state="running")(job_folder),
        ],
        {"interrupted"},
    ),
    "process-huge-pid": (
        lambda job_folder: [
            update_json("process.json", pid=2**70)(job_folder),
            update_json("progress.json", state="queued")(job_folder),
        ],
        {"interrupted"},
    ),
    "result-empty": (overwrite("result.json", b""), {"damaged"}),
    "result-cut": (truncate_file("result.json"), {"damaged"}),
    "result-zeroed": (fill_with_zeros("result.json"), {"damaged"}),
    "result-missing": (lambda job_folder: (job_folder / "result.json").unlink(), {"damaged"}),
    "log-folder": (replace_by_folder("log.txt"), {"done"}),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_job_folder_does_not_affect_others(tmp_path, kind, capsys):
    """Other jobs are listed as before; the damaged one can still be inspected and deleted."""
    store = Store(tmp_path / "lsq.duckdb")
    folder = disk.jobs_folder(store)
    job_folder, other = (
        make_finished_job(folder, "20260102-1"),
        make_finished_job(folder, "20260101-0"),
    )
    other_job = jobs.read(other)
    damage, states = DAMAGES[kind]
    damage(job_folder)
    job, untouched = jobs.list_jobs(folder)
    assert untouched == other_job
    assert job.state in states, job.message
    assert (
        job.state == "done"
        or "without a message" in job.message
        or "damaged" in job.message
        or ("no job" in job.message)
    )
    assert job.id == job_folder.name
    assert isinstance(job.title + job.command + job.log_tail() + job.verb, str)
    assert 0 <= job.fraction <= 1
    if job.verb == "":
        with pytest.raises(InputError):
            jobs.resume(job)
    assert main(["jobs", "--db", str(store.path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["jobs"]) == 2
    assert main(["jobs", "--db", str(store.path)]) == 0
    assert main(["disk", "--db", str(store.path), "--prune", job_folder.name]) == 0
    assert jobs.list_jobs(folder) == [other_job]


def test_result_with_wrong_hash_raises_damaged(folder):
    job_folder = make_finished_job(folder, "20260101-0")
    assert jobs.read(job_folder).result() == RESULT
    content = (job_folder / "result.json").read_bytes().replace(b"3.5", b"3.6")
    (job_folder / "result.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"result\.json is damaged"):
        jobs.read(job_folder).result()


def test_result_without_hash_is_read(folder):
    job_folder = make_finished_job(folder, "20260101-0")
    progress = json.loads((job_folder / "progress.json").read_text())
    del progress["result_bytes"], progress["result_sha256"]
    write_json(job_folder / "progress.json", progress)
    assert (jobs.read(job_folder).state, jobs.read(job_folder).result()) == ("done", RESULT)


def test_pages_open_with_damaged_jobs(tmp_path):
    """Uses all damaged folders at once; the Run page lists the damaged jobs."""
    from tests.test_app import PAGES, go_to_page, open_page

    folder = disk.jobs_folder(Store(tmp_path / "lsq.duckdb"))
    for number, (damage, _) in enumerate(DAMAGES.values()):
        damage(make_finished_job(folder, f"20260101-{number:02}", ("run", "--model", "demo")))
    app = open_page("Model")
    for title in PAGES:
        go_to_page(app, title)
        assert not app.exception, title
        if title == "Run":
            states = app.dataframe[-1].value["state"].tolist()
            damaged = sum(states == {"damaged"} for _, states in DAMAGES.values())
            assert states.count("damaged") == damaged
            assert len(states) == len(DAMAGES)


# --- identical jobs ---------------------------------------------------------------------------


@contextmanager
def hold_device_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of the CPU, so that jobs stay queued."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "device-cpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def wait_until_queued(job: jobs.Job) -> jobs.Job:
    return wait_for(lambda: (now := jobs.read(job.folder)).message.startswith("Waiting") and now)


ARGUMENTS = ["results", "--json"]


@pytest.fixture(autouse=True)
def _hide_cuda_devices(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_start_identical_job_joins_active(folder):
    with hold_device_lock(folder):
        first = jobs.start(folder, ARGUMENTS)
        assert jobs.start(folder, ARGUMENTS).id == first.id
        other = jobs.start(folder, [*ARGUMENTS, "--model", "demo"])
        assert other.id != first.id
        assert jobs.cancel(jobs.read(first.folder)).state == "cancelled"
        assert [job.id for job in jobs.list_jobs(folder) if job.active] == [other.id]
        again = jobs.start(folder, ARGUMENTS)
        assert again.id not in (first.id, other.id), "one that has ended isn't joined"
        assert jobs.resume(jobs.read(first.folder)).id == again.id, "nor is its twin made go on"
        for job in (other, again):
            jobs.cancel(jobs.read(job.folder))


def test_start_concurrent_identical_jobs_start_one(folder):
    """Starts the job from four threads, like tabs of a server, and from two other processes."""
    script = (
        "from pathlib import Path; from lsq_core import jobs; "
        f"print(jobs.start(Path({str(folder)!r}), {ARGUMENTS!r}).id)"
    )
    job_ids: list[str] = []
    with hold_device_lock(folder):
        others = [
            subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT)
            for _ in range(2)
        ]
        tabs = [
            threading.Thread(target=lambda: job_ids.append(jobs.start(folder, ARGUMENTS).id))
            for _ in range(4)
        ]
        for tab in tabs:
            tab.start()
        for tab in tabs:
            tab.join()
        job_ids += [other.communicate()[0].decode().strip() for other in others]
        (job,) = jobs.list_jobs(folder)
        assert set(job_ids) == {job.id}
        assert len(job_ids) == 6
        jobs.cancel(job)


# --- how jobs end -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_interrupts_job_and_resume_completes(folder, number):
    """Nobody cancelled the job, so it is interrupted, and ``resume`` finds it."""
    with hold_device_lock(folder):
        job = wait_until_queued(jobs.start(folder, ARGUMENTS))
        os.kill(job_pid(job), number)
        after = wait_for_end(job)
        assert after.state == "interrupted"
        assert "terminated" in after.message
        wait_for(lambda: process_ended(job))
    assert jobs.find(folder).id == job.id
    assert wait_for_end(jobs.resume(after)).state == "done"


def test_resumed_job_after_cancel_can_be_interrupted(folder):
    """An earlier cancellation has no effect on the resumed job."""
    with hold_device_lock(folder):
        job = wait_until_queued(jobs.start(folder, ARGUMENTS))
        cancelled = jobs.cancel(job)
        assert cancelled.state == "cancelled"
        resumed = wait_until_queued(jobs.resume(cancelled))
        os.kill(job_pid(resumed), signal.SIGTERM)
        assert wait_for_end(resumed).state == "interrupted"


def test_cancel_marker_honored_after_kill(folder):
    """The request to cancel is stored in the job's folder."""
    with hold_device_lock(folder):
        job = wait_until_queued(jobs.start(folder, ARGUMENTS))
        (job.folder / jobs.CANCEL_FILE).touch()
        os.kill(job_pid(job), signal.SIGKILL)
        assert wait_for_end(job).state == "cancelled"


def test_cancel_job_with_lost_process_file(folder):
    with hold_device_lock(folder):
        job = wait_until_queued(jobs.start(folder, ARGUMENTS))
        pid = job_pid(job)
        (job.folder / "process.json").write_bytes(b"")
        now = jobs.read(job.folder)
        assert now.active
        assert jobs.cancel(now).state == "cancelled"
        wait_for(lambda: not psutil.pid_exists(pid) or pid_ended(pid))


def pid_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_second_worker_on_same_job_exits_1(folder, capfd):
    with hold_device_lock(folder):
        job = wait_until_queued(jobs.start(folder, ARGUMENTS))
        before = (job.folder / "progress.json").read_bytes()
        done = subprocess.run(
            [sys.executable, "-m", "lsq_core", "job", str(job.folder)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert "another process" in done.stdout
        assert (job.folder / "progress.json").read_bytes() == before
        jobs.cancel(job)


def test_oom_kill_reported_and_stored(folder, monkeypatch):
    """The OOM-kill count matters only when the job is first read after it ended."""
    job_folder, other = make_finished_job(folder, "1"), make_finished_job(folder, "0")
    for one in (job_folder, other):
        update_json("progress.json", state="running", stage="quantize")(one)
        update_json("process.json", oom_kills=3)(one)
    monkeypatch.setattr(jobs.folder, "oom_kills", lambda: 3)
    assert "lack of memory" not in jobs.read(other).message
    monkeypatch.setattr(jobs.folder, "oom_kills", lambda: 4)
    job = jobs.read(job_folder)
    assert job.state == "interrupted"
    assert "lack of memory" in job.message
    assert "quantize" in job.message
    assert "lack of memory" not in jobs.read(other).message
    monkeypatch.setattr(jobs.folder, "oom_kills", lambda: 0)  # the machine was restarted
    assert "lack of memory" in jobs.read(job_folder).message


def test_start_job_unwritable_folder_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LsqError, match="cannot be written"):
        jobs.start(tmp_path / "file", ARGUMENTS)
    assert jobs.list_jobs(tmp_path / "file") == []


def test_job_disk_full_elsewhere_reported(folder):
    """It is reported even if another library wrote the file and raised its own error."""
    job_folder = make_finished_job(folder, "1")

    def execute(*_: object) -> dict:
        try:
            Path("/dev/full").write_bytes(b"x")
        except OSError as error:
            raise ValueError("saving went wrong") from error
        return {}

    signals = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        assert worker.run_job(job_folder, execute) == 1
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
    job = jobs.read(job_folder)
    assert job.state == "failed"
    assert "disk is full" in job.message
    assert "see the log" not in job.message


def test_delete_active_job_raises(folder):
    with hold_device_lock(folder):
        job = wait_until_queued(jobs.start(folder, ARGUMENTS))
        with pytest.raises(InputError, match="cancel it first"):
            jobs.delete(job)
        jobs.delete(jobs.cancel(job))
        assert not job.folder.exists()


def test_list_200_jobs_within_1_s(folder):
    """Every page lists the jobs once a second."""
    job_folder = make_finished_job(folder, "000")
    for number in range(1, 200):
        shutil.copytree(job_folder, folder / f"{number:03}")
    started = time.process_time()
    assert len(jobs.list_jobs(folder)) == 200
    assert time.process_time() - started < 1.0


def test_job_is_found_whatever_the_value_of_an_option(tmp_path):
    """The newest job with the same arguments apart from the ignored options is found."""
    command = ("refine", "--model", "demo", "--minutes", "5")
    make_finished_job(tmp_path, "20260101-000000-000001", (*command, "--text", "stdlib"))
    make_finished_job(tmp_path, "20260101-000000-000002", (*command, "--budget", "3bpp"))
    wanted = ["refine", "--model", "demo", "--minutes", "60"]
    assert jobs_panel.find(tmp_path, wanted) is None
    assert jobs_panel.find(tmp_path, wanted, ("--minutes",)) is None, "it has a text"
    found = jobs_panel.find(tmp_path, wanted, ("--minutes", "--text"))
    assert found.id == "20260101-000000-000001"
