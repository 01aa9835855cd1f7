"""Background jobs: a command line run by a process of its own, with a folder of its own.

The folder holds ``job.json`` (what was asked), ``process.json`` (which process does it),
``progress.json`` (how far it is), ``result.json`` and ``log.txt``. So a job outlives the page, the
browser and the server, and is found again by looking into the folder. This is the side of those
who start and watch jobs; what the process itself does is in :mod:`lsq_core.worker`.

Everything read from a folder is checked: a job whose files are damaged is listed as damaged, and
costs no other.
"""

from __future__ import annotations

import fcntl
import itertools
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import psutil

from lsq_core import paths
from lsq_core.errors import InputError, LsqError
from lsq_core.files import Damaged, cannot_write, read_json, sync_folder
from lsq_core.jsontext import write_json
from lsq_core.memory import oom_kills

#: Seconds a process has to end by itself before it is killed.
GRACE = 1.0
#: Seconds between two writes of the progress file.
PROGRESS_EVERY = 0.2
ACTIVE = ("queued", "running")
STATES = (*ACTIVE, "done", "failed", "cancelled", "interrupted", "damaged")
#: The file that says that a person asked for the end; a process that is ended otherwise, by a
#: shutdown say, was interrupted.
CANCEL = "cancel"
#: The file that a job's process keeps locked while it works, and which holds its number.
WORKING = "working.lock"
#: Seconds that a job may take to have a process.
_STARTING = 10.0
#: Bytes at the end of a log that are read.
_LOG_BYTES = 65536
#: A time beyond this one, in the year 2255, is damage.
_LATEST = 9e9


@dataclass(frozen=True)
class Job:
    """A job as its folder says it is now.

    ``state`` is queued, running, done, failed, cancelled, interrupted or damaged; interrupted
    means that its process ended without a result, and that nobody asked for that; damaged that
    what it was or its result cannot be read. ``result_bytes`` and ``result_sha256`` are of the
    file with its result.
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
    result_bytes: int | None = None
    result_sha256: str = ""

    @property
    def active(self) -> bool:
        """Whether it is still going to do something."""
        return self.state in ACTIVE

    @property
    def can_resume(self) -> bool:
        """Whether it ended without a result, so that it can go on from what it kept."""
        return bool(self.arguments) and not self.active and self.state != "done"

    @property
    def fraction(self) -> float:
        """How much of the present stage is done, 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 0.0

    @property
    def verb(self) -> str:
        """The command's first word, '' where that can't be read any more."""
        return self.arguments[0] if self.arguments else ""

    @property
    def command(self) -> str:
        """The command line that does the same in a terminal."""
        return "lsq " + shlex.join(self.arguments) if self.arguments else ""

    @property
    def title(self) -> str:
        """Verb, method, base or budget, and model in a few words."""
        words = dict(itertools.pairwise(self.arguments))
        if self.verb == "sweep":
            parts = ["sweep", *self.given("--method")]
        else:
            named = ("--method", "--base", "--budget", "--run")
            parts = [self.verb or self.id, *(words.get(option, "") for option in named)]
        return " ".join(part for part in [*parts, words.get("--model", "")] if part)

    def given(self, option: str) -> list[str]:
        """Every value that an option was given in its command line."""
        return [value for name, value in itertools.pairwise(self.arguments) if name == option]

    def log_tail(self, lines: int = 12) -> str:
        """The last lines that the process wrote."""
        try:
            with (self.folder / "log.txt").open("rb") as file:
                file.seek(max(os.fstat(file.fileno()).st_size - _LOG_BYTES, 0))
                text = file.read().decode("utf8", "replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def result(self) -> dict | None:
        """What the command printed as JSON, once it is done; None where there is none.

        Raises
        ------
        Damaged
            When there is one and it isn't what was written.
        """
        path = self.folder / "result.json"
        found = read_json(path)
        if found is not None and self.result_sha256:
            with path.open("rb") as file:
                same = sha256(file.read()).hexdigest() == self.result_sha256
            if not same:
                raise Damaged(f"{path} is damaged: it is not what was written.")
        return found


# --- starting -------------------------------------------------------------------------------


def start(folder: Path, arguments: list[str]) -> Job:
    """Start a job for a command line of this project, such as ``["run", "--model", "demo"]``.

    Where one of just this command waits or runs, that one is returned and none is started,
    whoever asked for it. A job runs on when the caller ends; jobs on the same device wait for one
    another.

    Raises
    ------
    LsqError
        When its folder cannot be made, or no process can be started.
    """
    with _starting(folder):
        same = _under_way(folder, arguments)
        if same is not None:
            return same
        home = _new_folder(folder, arguments)
        try:
            _launch(home)
        except LsqError:
            shutil.rmtree(home, ignore_errors=True)  # nothing was begun in it
            raise
    return read(home)


def resume(job: Job) -> Job:
    """Let a job that ended without a result go on in its folder, with what it kept there.

    Where another one of the same command was started meanwhile, that one is returned.

    Raises
    ------
    InputError
        When it has a result, goes on already, or its command can't be read any more.
    """
    with _starting(job.folder.parent):
        job = read(job.folder)
        if not job.can_resume:
            raise InputError(f"Job {job.id} is {job.state}, so there is nothing to resume.")
        same = _under_way(job.folder.parent, job.arguments)
        if same is not None:
            return same
        with _alone(job.folder):
            (job.folder / CANCEL).unlink(missing_ok=True)
            before = {"state": "queued", "message": "Resuming.", "seconds": job.seconds}
            write_json(job.folder / "progress.json", before)
            _launch(job.folder)
    return read(job.folder)


def _under_way(folder: Path, arguments: list[str] | tuple[str, ...]) -> Job | None:
    """The job of just this command that waits or runs."""
    asked = tuple(arguments)
    return next((job for job in list_jobs(folder) if job.active and job.arguments == asked), None)


@contextmanager
def _starting(folder: Path) -> Iterator[None]:
    """Have jobs of a folder started one after another, by whichever process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "start.lock").open("w")
    except OSError as error:
        raise cannot_write(folder, error) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _new_folder(folder: Path, arguments: list[str]) -> Path:
    """A job's folder, which is seen with its ``job.json`` in it or not at all."""
    id = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    unfinished, home = folder / f".{id}", folder / id
    try:
        unfinished.mkdir()
        asked = {"id": id, "arguments": list(arguments), "created": time.time()}
        write_json(unfinished / "job.json", asked)
        unfinished.rename(home)
    except (OSError, LsqError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise error if isinstance(error, LsqError) else cannot_write(home, error) from error
    sync_folder(folder)
    return home


def _launch(home: Path) -> None:
    """Start the process that does a folder's job."""
    try:
        with (home / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "lsq_core", "job", str(home)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=paths.IMPORT_FOLDER,
            )
    except OSError as error:
        raise LsqError(f"No process could be started for {home} ({error.strerror}).") from error
    write_json(home / "process.json", _identity(process.pid) | {"oom_kills": oom_kills()})


# --- looking --------------------------------------------------------------------------------


def read(home: Path) -> Job:
    """The job in a folder.

    Raises
    ------
    InputError
        When the folder holds no job.
    """
    try:
        job = _as_written(home)
        if job.active and not _alive(home, job.created):
            job = _settle(home)
    except Damaged as error:
        return _damaged(home, str(error))
    if job.state == "done" and not _is_whole(home / "result.json", job.result_bytes):
        return replace(job, state="damaged", message=f"{home / 'result.json'} is damaged or gone.")
    return job


def list_jobs(folder: Path) -> list[Job]:
    """Every job, newest first; the damaged ones too."""
    try:
        homes = [p for p in folder.iterdir() if not p.name.startswith(".") and p.is_dir()]
    except OSError:
        return []
    found = []
    for home in sorted(homes, reverse=True):
        try:
            found.append(read(home))
        except InputError as error:
            if home.is_dir():  # else it was deleted meanwhile
                found.append(_damaged(home, str(error)))
    return found


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
        time.sleep(PROGRESS_EVERY)
        job = read(job.folder)
    return job


# --- ending ---------------------------------------------------------------------------------


def cancel(job: Job) -> Job:
    """End a job: ask, wait, then kill. Returns it as it is then."""
    if job.active:
        with suppress(OSError):  # where it can't be written, the end is told as an interruption
            (job.folder / CANCEL).touch()
    pid = _pid(job.folder) if job.active else None
    if pid is not None:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            _signal(pid, signal.SIGTERM)
            try:
                process.wait(GRACE)
            except psutil.TimeoutExpired:
                _signal(pid, signal.SIGKILL)
                process.wait(GRACE)
    after = read(job.folder)
    if after.state in (*ACTIVE, "interrupted"):
        _end(job.folder, "cancelled", "Cancelled.")
    return read(job.folder)


def delete(job: Job) -> None:
    """Delete a job that has ended, with all that it kept; results in the database stay.

    Raises
    ------
    InputError
        When it waits or runs.
    """
    if read_state(job.folder) in ACTIVE:
        raise InputError(f"Job {job.id} is under way; cancel it first.")
    try:
        shutil.rmtree(job.folder)
    except OSError as error:
        raise LsqError(f"{job.folder} cannot be deleted ({error.strerror}).") from error


def read_state(home: Path) -> str:
    """How a job stands; damaged where there is nothing to tell it by."""
    try:
        return read(home).state
    except InputError:
        return "damaged"


def _end(home: Path, state: str, message: str) -> None:
    """Write how a job ended whose process didn't."""
    try:
        progress = read_json(home / "progress.json") or {}
    except Damaged:
        progress = {}
    progress |= {"state": state, "message": message, "eta": None}
    write_json(home / "progress.json", progress)


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it ended meanwhile
        os.killpg(pid, number)  # everything that it started goes with it


# --- what a folder says ---------------------------------------------------------------------

_NUMBER, _COUNT = (int, float), (int,)
#: The entries of ``progress.json`` and of what type each is; None is nothing.
_PROGRESS = {
    "state": (str,),
    "stage": (str,),
    "message": (str,),
    "result_sha256": (str,),
    "done": _COUNT,
    "total": _COUNT,
    "seconds": _NUMBER,
    "eta": (*_NUMBER, type(None)),
    "memory": (*_COUNT, type(None)),
    "result_bytes": (*_COUNT, type(None)),
}


def _as_written(home: Path) -> Job:
    """The job as its files have it, whether its process lives or not.

    Raises
    ------
    InputError
        When there is no job.
    Damaged
        When what it was asked to do cannot be read.
    """
    asked = read_json(home / "job.json")
    if asked is None:
        raise InputError(f"There is no job in {home}.")
    arguments, created = asked.get("arguments"), asked.get("created")
    if not (isinstance(arguments, list) and arguments and all(_is_text(a) for a in arguments)):
        raise Damaged(f"{home / 'job.json'} is damaged: it holds no command.")
    if not (_is(created, _NUMBER) and created < _LATEST):
        raise Damaged(f"{home / 'job.json'} is damaged: it holds no time.")
    try:
        progress = _read_progress(home)
    except Damaged as error:
        progress = _without_progress(home, str(error))
    return Job(id=home.name, folder=home, arguments=tuple(arguments), created=created, **progress)


def _is_text(value: object) -> bool:
    """Whether a value can be an argument of a process."""
    return isinstance(value, str) and "\0" not in value


def _read_progress(home: Path) -> dict:
    path = home / "progress.json"
    content = read_json(path)
    if content is None:
        return {"state": "queued"}
    progress = {name: content[name] for name in _PROGRESS if name in content}
    wrong = [name for name, value in progress.items() if not _is(value, _PROGRESS[name])]
    if wrong or progress.get("state") not in STATES:
        raise Damaged(f"{path} is damaged: its {(wrong or ['state'])[0]} cannot be.")
    return progress


def _is(value: object, types: tuple[type, ...]) -> bool:
    """Whether a value is of a type, and a number neither negative nor infinite."""
    if not isinstance(value, types) or isinstance(value, bool):
        return False
    return not isinstance(value, (int, float)) or (math.isfinite(value) and 0 <= value < 2**63)


def _without_progress(home: Path, reason: str) -> dict:
    """What a job whose progress is damaged is: working, or ended with or without a result."""
    if _alive(home, 0.0):
        return {"state": "running", "message": reason}
    try:
        done = read_json(home / "result.json") is not None
    except Damaged:
        done = False
    if done:
        return {"state": "done", "message": reason}
    return {"state": "interrupted", "message": f"{reason} It can go on from what else it kept."}


def _is_whole(path: Path, size: int | None) -> bool:
    """Whether a result has the size it was written with and the ends of an object.

    This is looked at often, and a result may be long: all of it is checked when it is read.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            first = file.read(1)
            file.seek(max(found - 1, 0))
            return (size in (None, found)) and (first, file.read(1)) == (b"{", b"}")
    except OSError:
        return False


def _damaged(home: Path, message: str) -> Job:
    """A job of which nothing can be told but its name and time."""
    try:
        created = home.stat().st_mtime
    except OSError:
        created = 0.0
    return Job(home.name, home, (), created, "damaged", message=message)


def _settle(home: Path) -> Job:
    """A job whose process is gone without having said how it ended; writes down how that was.

    It is written once, by whoever sees it first, since what tells the cause doesn't last.
    """
    with _alone(home):
        job = _as_written(home)  # it may have ended, or gone on, between the two looks
        if not job.active or _alive(home, job.created):
            return job
        state, message = _how_it_ended(home, job)
        with suppress(LsqError):  # in a folder that can't be written it is told anew each time
            _end(home, state, message)
    return replace(job, state=state, message=message, eta=None)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Have nobody else change how a job stands, as far as its folder can be written."""
    try:
        lock = (home / "state.lock").open("w")
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _how_it_ended(home: Path, job: Job) -> tuple[str, str]:
    """State and message of a job whose process is gone without a word."""
    if (home / CANCEL).exists():
        return "cancelled", "Cancelled."
    during = f"during '{job.stage or 'start'}'"
    before, now = _identity_kept(home).get("oom_kills"), oom_kills()
    if isinstance(before, int) and now is not None and now > before:
        return "interrupted", (
            f"Its process was killed {during}, most likely for lack of memory: the system killed "
            "a process for that since the job began. Free some memory or take a smaller model, "
            "then resume it."
        )
    why = _why_no_word(home)
    return "interrupted", f"Its process ended without a word {during}{why}."


def _why_no_word(home: Path) -> str:
    """What in the job's folder keeps a process from saying how it ended, '' for nothing."""
    with suppress(OSError):
        if shutil.disk_usage(home).free < 2**20:
            return f": the disk of {home} is full"
        if not os.access(home, os.W_OK) or os.statvfs(home).f_flag & os.ST_RDONLY:
            return f": {home} can't be written"
    return ""


# --- which process --------------------------------------------------------------------------


def _identity(pid: int) -> dict:
    """A process by number and start, since numbers are used again."""
    try:
        return {"pid": pid, "started": psutil.Process(pid).create_time()}
    except psutil.NoSuchProcess:
        return {"pid": pid, "started": 0.0}


def _identity_kept(home: Path) -> dict:
    """What ``process.json`` says, as far as it can be read."""
    try:
        content = read_json(home / "process.json") or {}
    except Damaged:
        return {}
    whole = _is(content.get("pid"), _COUNT) and _is(content.get("started"), _NUMBER)
    return content if whole and 0 < content["pid"] < 2**31 else {}


def _pid(home: Path) -> int | None:
    """The number of a job's process, None where it has none any more."""
    identity = _identity_kept(home)
    if not identity:
        return _pid_working(home)
    try:
        process = psutil.Process(identity["pid"])
        same = abs(process.create_time() - identity["started"]) < 1.0
        return process.pid if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _pid_working(home: Path) -> int | None:
    """The same where ``process.json`` can't be read, by the lock that the process holds."""
    try:
        with (home / WORKING).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read())
    except (OSError, ValueError):
        pass
    return None


def _alive(home: Path, created: float) -> bool:
    """Whether a job has a process, or is about to have one."""
    if not (home / "process.json").exists() and time.time() - created < _STARTING:
        return True
    return _pid(home) is not None
