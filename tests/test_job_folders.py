"""Job folders that are damaged, twins, shutdowns: what of it a person sees, and what it costs."""

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
from lsq_core.cli import main
from lsq_core.errors import InputError, LsqError
from lsq_core.files import Damaged
from lsq_core.jobs import worker
from lsq_core.jsontext import json_bytes, write_json
from lsq_core.store.store import Store
from tests.conftest import ROOT
from tests.test_jobs import ended, gone, pid_of, wait_for

RESULT = {"run": "abc", "perplexity": 3.5}


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "jobs"


def finished(folder: Path, id: str, arguments: tuple[str, ...] = ("results",)) -> Path:
    """The folder of a job that is done, as a process leaves it."""
    home = folder / id
    home.mkdir(parents=True)
    write_json(home / "job.json", {"id": id, "arguments": arguments, "created": 1.7e9})
    write_json(home / "process.json", {"pid": 2**22 - 1, "started": 1.0, "oom_kills": None})
    content = json_bytes(RESULT)
    (home / "result.json").write_bytes(content)
    progress = {"state": "done", "message": "Done.", "stage": "store", "done": 1, "total": 1}
    progress |= {"seconds": 2.0, "memory": 10**8, "eta": None}
    progress |= {"result_bytes": len(content), "result_sha256": sha256(content).hexdigest()}
    write_json(home / "progress.json", progress)
    (home / "log.txt").write_text("12:00:00 done: Done.\n")
    return home


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda home: (home / name).write_bytes(content)


def change(name: str, **entries: object) -> Callable[[Path], object]:
    """Other entries in a JSON file, as it is read by whoever knows no better."""

    def damage(home: Path) -> None:
        content = json.loads((home / name).read_bytes()) | entries
        (home / name).write_text(json.dumps(content))

    return damage


def zeroed(name: str) -> Callable[[Path], object]:
    return lambda home: (home / name).write_bytes(bytes((home / name).stat().st_size))


def cut(name: str) -> Callable[[Path], object]:
    return lambda home: os.truncate(home / name, (home / name).stat().st_size // 2)


def as_folder(name: str) -> Callable[[Path], object]:
    def damage(home: Path) -> None:
        (home / name).unlink()
        (home / name).mkdir()

    return damage


#: What is done to a job's folder, and the states that may come of it.
DAMAGES: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "job-empty": (put("job.json", b""), {"damaged"}),
    "job-cut": (cut("job.json"), {"damaged"}),
    "job-zeroed": (zeroed("job.json"), {"damaged"}),
    "job-missing": (lambda home: (home / "job.json").unlink(), {"damaged"}),
    "job-list": (put("job.json", b"[]"), {"damaged"}),
    "job-not-utf8": (put("job.json", b'{"id": "\xff"}'), {"damaged"}),
    "job-deep": (put("job.json", b'{"a":' * 100_000), {"damaged"}),
    "job-folder": (as_folder("job.json"), {"damaged"}),
    "job-no-arguments": (change("job.json", arguments=[]), {"damaged"}),
    "job-text-arguments": (change("job.json", arguments="run"), {"damaged"}),
    "job-number-argument": (change("job.json", arguments=["run", 3]), {"damaged"}),
    "job-null-argument": (change("job.json", arguments=["run", "a\0b"]), {"damaged"}),
    "job-text-created": (change("job.json", created="now"), {"damaged"}),
    "job-created-far-off": (change("job.json", created=1e300), {"damaged"}),
    "progress-empty": (put("progress.json", b""), {"done"}),
    "progress-cut": (cut("progress.json"), {"done"}),
    "progress-zeroed": (zeroed("progress.json"), {"done"}),
    "progress-list": (put("progress.json", b"[1]"), {"done"}),
    "progress-unknown-state": (change("progress.json", state="fine"), {"done"}),
    "progress-text-done": (change("progress.json", done="x"), {"done"}),
    "progress-negative-total": (change("progress.json", total=-1), {"done"}),
    "progress-nan": (put("progress.json", b'{"state": "done", "eta": NaN}'), {"done"}),
    "progress-and-result-gone": (
        lambda home: [put("progress.json", b"")(home), (home / "result.json").unlink()],
        {"interrupted"},
    ),
    "process-empty": (put("process.json", b""), {"done"}),
    "process-zeroed-while-running": (
        lambda home: [zeroed("process.json")(home), change("progress.json", state="running")(home)],
        {"interrupted"},
    ),
    "process-text-pid": (
        lambda home: [
            change("process.json", pid="x")(home),
            change("progress.json", state="running")(home),
        ],
        {"interrupted"},
    ),
    "process-huge-pid": (
        lambda home: [
            change("process.json", pid=2**70)(home),
            change("progress.json", state="queued")(home),
        ],
        {"interrupted"},
    ),
    "result-empty": (put("result.json", b""), {"damaged"}),
    "result-cut": (cut("result.json"), {"damaged"}),
    "result-zeroed": (zeroed("result.json"), {"damaged"}),
    "result-missing": (lambda home: (home / "result.json").unlink(), {"damaged"}),
    "log-folder": (as_folder("log.txt"), {"done"}),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_job_costs_one_entry(tmp_path, kind, capsys):
    """The others are listed as before; it can be asked about everything, and be deleted."""
    store = Store(tmp_path / "lsq.duckdb")
    folder = disk.jobs_folder(store)
    home, other = finished(folder, "20260102-1"), finished(folder, "20260101-0")
    whole = jobs.read(other)
    damage, states = DAMAGES[kind]
    damage(home)
    job, untouched = jobs.list_jobs(folder)
    assert untouched == whole
    assert job.state in states, job.message
    assert (
        job.state == "done"
        or "without a word" in job.message
        or "damaged" in job.message
        or ("no job" in job.message)
    )
    assert job.id == home.name
    assert isinstance(job.title + job.command + job.log_tail() + job.verb, str)
    assert 0 <= job.fraction <= 1
    if job.verb == "":
        with pytest.raises(InputError):
            jobs.resume(job)
    assert main(["jobs", "--db", str(store.path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["jobs"]) == 2
    assert main(["jobs", "--db", str(store.path)]) == 0
    assert main(["disk", "--db", str(store.path), "--prune", home.name]) == 0
    assert jobs.list_jobs(folder) == [whole]


def test_a_flipped_bit_in_a_result_is_seen_when_it_is_read(folder):
    home = finished(folder, "20260101-0")
    assert jobs.read(home).result() == RESULT
    content = (home / "result.json").read_bytes().replace(b"3.5", b"3.6")
    (home / "result.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"result\.json is damaged"):
        jobs.read(home).result()


def test_a_result_of_an_earlier_version_has_no_hash_and_is_read(folder):
    home = finished(folder, "20260101-0")
    progress = json.loads((home / "progress.json").read_text())
    del progress["result_bytes"], progress["result_sha256"]
    write_json(home / "progress.json", progress)
    assert (jobs.read(home).state, jobs.read(home).result()) == ("done", RESULT)


def test_every_page_opens_beside_every_damage(tmp_path):
    """All damaged folders at once, and what is damaged is listed on the Run page."""
    from tests.test_app import PAGES, go, open_page

    folder = disk.jobs_folder(Store(tmp_path / "lsq.duckdb"))
    for number, (damage, _) in enumerate(DAMAGES.values()):
        damage(finished(folder, f"20260101-{number:02}", ("run", "--model", "demo")))
    app = open_page("Model")
    for title in PAGES:
        go(app, title)
        assert not app.exception, title
        if title == "Run":
            states = app.dataframe[-1].value["state"].tolist()
            damaged = sum(states == {"damaged"} for _, states in DAMAGES.values())
            assert states.count("damaged") == damaged
            assert len(states) == len(DAMAGES)


# --- twins ------------------------------------------------------------------------------------


@contextmanager
def busy_device(folder: Path) -> Iterator[None]:
    """No job gets its turn meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "device-cpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def waiting(job: jobs.Job) -> jobs.Job:
    return wait_for(lambda: (now := jobs.read(job.folder)).message.startswith("Waiting") and now)


ASKED = ["results", "--json"]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_an_identical_job_is_joined(folder):
    with busy_device(folder):
        first = jobs.start(folder, ASKED)
        assert jobs.start(folder, ASKED).id == first.id
        other = jobs.start(folder, [*ASKED, "--model", "demo"])
        assert other.id != first.id
        assert jobs.cancel(jobs.read(first.folder)).state == "cancelled"
        assert [job.id for job in jobs.list_jobs(folder) if job.active] == [other.id]
        again = jobs.start(folder, ASKED)
        assert again.id not in (first.id, other.id), "one that has ended isn't joined"
        assert jobs.resume(jobs.read(first.folder)).id == again.id, "nor is its twin made go on"
        for job in (other, again):
            jobs.cancel(jobs.read(job.folder))


def test_tabs_and_processes_that_start_at_once_start_one(folder):
    """Four threads, as tabs of a server, and two processes of their own."""
    script = (
        "from pathlib import Path; from lsq_core import jobs; "
        f"print(jobs.start(Path({str(folder)!r}), {ASKED!r}).id)"
    )
    found: list[str] = []
    with busy_device(folder):
        others = [
            subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT)
            for _ in range(2)
        ]
        tabs = [
            threading.Thread(target=lambda: found.append(jobs.start(folder, ASKED).id))
            for _ in range(4)
        ]
        for tab in tabs:
            tab.start()
        for tab in tabs:
            tab.join()
        found += [other.communicate()[0].decode().strip() for other in others]
        (job,) = jobs.list_jobs(folder)
        assert set(found) == {job.id}
        assert len(found) == 6
        jobs.cancel(job)


# --- how it ended -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_shutdown_interrupts_and_resume_goes_on(folder, number):
    """Nobody asked for the end, so it isn't cancelled, and 'resume' finds it."""
    with busy_device(folder):
        job = waiting(jobs.start(folder, ASKED))
        os.kill(pid_of(job), number)
        after = ended(job)
        assert after.state == "interrupted"
        assert "from outside" in after.message
        wait_for(lambda: gone(job))
    assert jobs.find(folder).id == job.id
    assert ended(jobs.resume(after)).state == "done"


def test_a_cancelled_job_that_is_resumed_can_be_interrupted(folder):
    """What a person asked for once doesn't hold for the next time."""
    with busy_device(folder):
        job = waiting(jobs.start(folder, ASKED))
        cancelled = jobs.cancel(job)
        assert cancelled.state == "cancelled"
        resumed = waiting(jobs.resume(cancelled))
        os.kill(pid_of(resumed), signal.SIGTERM)
        assert ended(resumed).state == "interrupted"


def test_whoever_cancels_may_end_before_the_job_does(folder):
    """The wish is kept in the folder."""
    with busy_device(folder):
        job = waiting(jobs.start(folder, ASKED))
        (job.folder / jobs.CANCEL).touch()
        os.kill(pid_of(job), signal.SIGKILL)
        assert ended(job).state == "cancelled"


def test_a_job_whose_process_file_is_lost_is_found_and_ended(folder):
    with busy_device(folder):
        job = waiting(jobs.start(folder, ASKED))
        pid = pid_of(job)
        (job.folder / "process.json").write_bytes(b"")
        now = jobs.read(job.folder)
        assert now.active
        assert jobs.cancel(now).state == "cancelled"
        wait_for(lambda: not psutil.pid_exists(pid) or gone_pid(pid))


def gone_pid(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_two_processes_never_do_one_job(folder, capfd):
    with busy_device(folder):
        job = waiting(jobs.start(folder, ASKED))
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


def test_a_kill_for_lack_of_memory_is_said_once_and_for_all(folder, monkeypatch):
    """The count of such kills rose while it ran; that it rises later tells nothing of it."""
    home, other = finished(folder, "1"), finished(folder, "0")
    for one in (home, other):
        change("progress.json", state="running", stage="quantize")(one)
        change("process.json", oom_kills=3)(one)
    monkeypatch.setattr(jobs, "oom_kills", lambda: 3)
    assert "lack of memory" not in jobs.read(other).message
    monkeypatch.setattr(jobs, "oom_kills", lambda: 4)
    job = jobs.read(home)
    assert job.state == "interrupted"
    assert "lack of memory" in job.message
    assert "quantize" in job.message
    assert "lack of memory" not in jobs.read(other).message
    monkeypatch.setattr(jobs, "oom_kills", lambda: 0)  # the machine was started anew
    assert "lack of memory" in jobs.read(home).message


def test_a_folder_that_takes_no_job_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LsqError, match="cannot be written"):
        jobs.start(tmp_path / "file", ASKED)
    assert jobs.list_jobs(tmp_path / "file") == []


def test_a_job_that_fills_a_disk_elsewhere_says_so(folder):
    """Whoever wrote, a library for one, and however it told."""
    home = finished(folder, "1")

    def execute(*_: object) -> dict:
        try:
            Path("/dev/full").write_bytes(b"x")
        except OSError as error:
            raise ValueError("saving went wrong") from error
        return {}

    signals = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        assert worker.work(home, execute) == 1
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
    job = jobs.read(home)
    assert job.state == "failed"
    assert "disk is full" in job.message
    assert "see the log" not in job.message


def test_deleting_a_job_under_way_is_refused(folder):
    with busy_device(folder):
        job = waiting(jobs.start(folder, ASKED))
        with pytest.raises(InputError, match="cancel it first"):
            jobs.delete(job)
        jobs.delete(jobs.cancel(job))
        assert not job.folder.exists()


def test_listing_many_jobs_is_quick(folder):
    """Every page does it each second."""
    home = finished(folder, "000")
    for number in range(1, 200):
        shutil.copytree(home, folder / f"{number:03}")
    began = time.process_time()
    assert len(jobs.list_jobs(folder)) == 200
    assert time.process_time() - began < 1.0
