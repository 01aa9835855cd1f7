"""Background jobs: a command line run by a process of its own, with a folder of its own.

The folder holds ``job.json`` (what was asked), ``process.json`` (which process does it),
``progress.json`` (how far it is, replaced atomically), ``result.json`` and ``log.txt``. So a job
outlives the page, the browser and the server, and is found again by looking into the folder.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from lsq_core import devices
from lsq_core.errors import InputError, LsqError
from lsq_core.jsontext import write_json

#: Seconds a process has to end by itself before it is killed.
GRACE = 1.0
#: Seconds between two writes of the progress file.
_PROGRESS_EVERY = 0.2
ACTIVE = ("queued", "running")


@dataclass(frozen=True)
class Job:
    """A job as its folder says it is now.

    ``state`` is queued, running, done, failed, cancelled or interrupted; the last means that its
    process is gone without having said how it ended.
    """

    id: str
    folder: Path
    arguments: tuple[str, ...]
    created: float
    state: str
    stage: str = ""
    done: int = 0
    total: int = 0
    message: str = ""
    eta: float | None = None
    memory: int | None = None
    seconds: float = 0.0

    @property
    def active(self) -> bool:
        """Whether it is still going to do something."""
        return self.state in ACTIVE

    @property
    def can_resume(self) -> bool:
        """Whether it ended without a result, so that it can go on from what it kept."""
        return not self.active and self.state != "done"

    @property
    def fraction(self) -> float:
        """How much of the present stage is done, 0 to 1."""
        return self.done / self.total if self.total else 0.0

    @property
    def command(self) -> str:
        """The command line that does the same in a terminal."""
        return "python -m lsq_core " + shlex.join(self.arguments)

    @property
    def title(self) -> str:
        """Verb, method, base or budget, and model in a few words."""
        words = dict(itertools.pairwise(self.arguments))
        if self.arguments[0] == "sweep":
            parts = ["sweep", *self.given("--method")]
        else:
            named = ("--method", "--base", "--budget", "--run")
            parts = [self.arguments[0], *(words.get(option, "") for option in named)]
        return " ".join(part for part in [*parts, words.get("--model", "")] if part)

    def given(self, option: str) -> list[str]:
        """Every value that an option was given in its command line."""
        return [value for name, value in itertools.pairwise(self.arguments) if name == option]

    def log_tail(self, lines: int = 12) -> str:
        """The last lines that the process wrote."""
        path = self.folder / "log.txt"
        if not path.is_file():
            return ""
        return "\n".join(path.read_text("utf8", "replace").splitlines()[-lines:])

    def result(self) -> dict | None:
        """What the command printed as JSON, once it is done."""
        return _read(self.folder / "result.json")


def start(folder: Path, arguments: list[str]) -> Job:
    """Start a job for a command line of this project, such as ``["run", "--model", "demo"]``.

    It runs on when the caller ends. Jobs on the same device wait for one another.
    """
    id = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    home = folder / id
    home.mkdir(parents=True)
    write_json(home / "job.json", {"id": id, "arguments": arguments, "created": time.time()})
    return _launch(home)


def resume(job: Job) -> Job:
    """Let a job that ended without a result go on in its folder, with what it kept there.

    Raises
    ------
    InputError
        When it has a result, or goes on already.
    """
    with (job.folder / "resume.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = read(job.folder)
        if not job.can_resume:
            raise InputError(f"Job {job.id} is {job.state}, so there is nothing to resume.")
        before = {"state": "queued", "message": "Resuming.", "seconds": job.seconds}
        write_json(job.folder / "progress.json", before)
        return _launch(job.folder)


def _launch(home: Path) -> Job:
    """Start the process that does a folder's job."""
    with (home / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lsq_core", "job", str(home)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=Path(__file__).resolve().parents[1],
        )
    write_json(home / "process.json", _identity(process.pid))
    return read(home)


def read(home: Path) -> Job:
    """The job in a folder.

    Raises
    ------
    InputError
        When the folder holds no job.
    """
    asked = _read(home / "job.json")
    if asked is None:
        raise InputError(f"There is no job in {home}.")
    progress = _read(home / "progress.json") or {"state": "queued"}
    job = Job(
        id=asked["id"],
        folder=home,
        arguments=tuple(asked["arguments"]),
        created=asked["created"],
        **{k: v for k, v in progress.items() if k in Job.__dataclass_fields__},
    )
    if job.active and not _alive(home):
        # It may have ended between the two looks.
        progress = _read(home / "progress.json") or progress
        if progress["state"] in ACTIVE:
            reason = f"Its process ended without a word during '{job.stage or 'start'}'."
            return replace(job, state="interrupted", message=reason)
        return read(home)
    return job


def list_jobs(folder: Path) -> list[Job]:
    """Every job, newest first."""
    homes = sorted((p.parent for p in folder.glob("*/job.json")), reverse=True)
    return [read(home) for home in homes]


def find(folder: Path, id: str | None = None) -> Job:
    """The job of that id; without one the newest that was interrupted.

    Raises
    ------
    InputError
        When there is none.
    """
    if id is not None:
        return read(folder / Path(id).name)
    waiting = [job for job in list_jobs(folder) if job.state == "interrupted"]
    if not waiting:
        raise InputError(f"No job in {folder} was interrupted; there is nothing to resume.")
    return waiting[0]


def follow(job: Job, report: Callable[[str, int, int, str], None]) -> Job:
    """Report what a job does until it has ended; it goes on when this is stopped."""
    while job.active:
        report(job.stage or job.state, job.done, job.total, job.message)
        time.sleep(_PROGRESS_EVERY)
        job = read(job.folder)
    return job


def cancel(job: Job) -> Job:
    """End a job: ask, wait, then kill. Returns it as it is then."""
    identity = _read(job.folder / "process.json")
    if job.active and identity and _alive(job.folder):
        process = psutil.Process(identity["pid"])
        _signal(identity["pid"], signal.SIGTERM)
        try:
            process.wait(GRACE)
        except psutil.TimeoutExpired:
            _signal(identity["pid"], signal.SIGKILL)
            process.wait(GRACE)
    after = read(job.folder)
    if after.state in (*ACTIVE, "interrupted"):
        progress = _read(job.folder / "progress.json") or {}
        progress |= {"state": "cancelled", "message": "Cancelled.", "eta": None}
        write_json(job.folder / "progress.json", progress)
    return read(job.folder)


def _signal(pid: int, number: int) -> None:
    try:
        # Everything that it started goes with it.
        os.killpg(pid, number)
    except ProcessLookupError:
        return  # it ended meanwhile


def _identity(pid: int) -> dict:
    """A process by number and start, since numbers are used again."""
    try:
        return {"pid": pid, "started": psutil.Process(pid).create_time()}
    except psutil.NoSuchProcess:
        return {"pid": pid, "started": 0.0}


def _alive(home: Path) -> bool:
    identity = _read(home / "process.json")
    if identity is None:
        return time.time() - _read(home / "job.json")["created"] < 10  # just being started
    try:
        process = psutil.Process(identity["pid"])
        same = abs(process.create_time() - identity["started"]) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text("utf8"))
    except FileNotFoundError:
        return None


# --- inside the job's own process ------------------------------------------------------------


def work(home: Path, execute: Callable[[list[str], Callable, Path], dict]) -> int:
    """Run the job of a folder in this process; returns the exit status.

    ``execute`` takes the arguments, a report function and the folder, in which it may keep what
    it has so far, and gives the command's result.
    """
    signal.signal(signal.SIGTERM, _stop)
    asked = _read(home / "job.json")
    progress = _ProgressFile(home)
    try:
        with _device_turn(home.parent, asked["arguments"], progress):
            result = execute(asked["arguments"], progress.report, home)
        write_json(home / "result.json", result)
        progress.end("done", "Done.")
        return 0
    except _Stopped:
        progress.end("cancelled", "Cancelled.")
        return 1
    except LsqError as error:
        progress.end("failed", str(error))
        return error.exit_code
    except BaseException as error:
        traceback.print_exc()
        progress.end("failed", f"{type(error).__name__}: {error} (see the log)")
        return 1


class _Stopped(BaseException):
    """Raised where the process is when it is asked to end."""


def _stop(number: int, frame: object) -> None:
    raise _Stopped


@contextmanager
def _device_turn(folder: Path, arguments: list[str], progress: _ProgressFile) -> Iterator[None]:
    """Wait until no other job uses the device; the lock goes with the process, however it ends."""
    words = dict(itertools.pairwise(arguments))
    named = words.get("--device", "auto")
    device = re.sub(r"\W", "-", devices.canonical(named))
    with (folder / f"device-{device}.lock").open("w") as lock:
        progress.write({"state": "queued", "message": "Waiting for the device."})
        fcntl.flock(lock, fcntl.LOCK_EX)
        progress.begin()
        yield


class _ProgressFile:
    """Writes how far a job is: often enough to watch, seldom enough not to slow it."""

    def __init__(self, home: Path) -> None:
        self.path = home / "progress.json"
        self.state: dict = {}
        #: Seconds that it worked before it was cut off.
        self.before = (_read(self.path) or {}).get("seconds", 0.0)
        self.began = self.stage_began = time.monotonic()
        self.stage_first = 0
        self.turn = False
        self.logged = ("", 0, 0)
        self.written = 0.0

    def write(self, state: dict) -> None:
        self.state |= state | {
            "seconds": self.before + (time.monotonic() - self.began if self.turn else 0.0),
            "memory": psutil.Process().memory_info().rss,
        }
        write_json(self.path, self.state)
        self.written = time.monotonic()

    def begin(self) -> None:
        self.began, self.turn = time.monotonic(), True
        self.write({"state": "running", "stage": "start", "message": "Starting."})

    def report(self, stage: str, done: int, total: int, message: str) -> None:
        new = (stage, total) != (self.state.get("stage"), self.state.get("total"))
        self.log(stage, done, total, message)
        if new:
            self.stage_began, self.stage_first = time.monotonic(), done
        elif done < total and time.monotonic() - self.written < _PROGRESS_EVERY:
            return
        elapsed = time.monotonic() - self.stage_began
        done_now = done - self.stage_first  # what was done before tells nothing of the speed
        eta = elapsed * (total - done) / done_now if done_now > 0 else None
        self.write({"stage": stage, "done": done, "total": total, "message": message, "eta": eta})

    def log(self, stage: str, done: int, total: int, message: str) -> None:
        """A line for each stage and each tenth of it, into the log that this process writes."""
        tenth = 10 * done // total if total else 0
        if (stage, total, tenth) != self.logged:
            share = f" {100 * done // total} %" if total > 1 else ""
            print(f"{time.strftime('%H:%M:%S')} {stage}{share}: {message}", flush=True)
            self.logged = (stage, total, tenth)

    def end(self, state: str, message: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {state}: {message}", flush=True)
        self.write({"state": state, "message": message, "eta": None})
