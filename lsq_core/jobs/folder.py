"""Background jobs: a command line run by a process of its own, with a folder of its own.

The folder holds ``job.json`` (what was asked), ``process.json`` (which process does it),
``progress.json`` (how far it is), ``result.json`` and ``log.txt``. So a job outlives the page, the
browser and the server, and is found again by looking into the folder. This is the side of those
who start and watch jobs; what the process itself does is in :mod:`lsq_core.jobs.worker`.

Everything read from a folder is checked: a job whose files are damaged is listed as damaged, and
costs no other.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil

from lsq_core.errors import InputError, LsqError
from lsq_core.files import DamagedFileError, read_json
from lsq_core.jobs.job import CANCEL_FILE, STATES, WORKING_LOCK, Job
from lsq_core.jsontext import write_json
from lsq_core.memory import oom_kills

#: Seconds that a job may take to have a process.
_START_TIMEOUT_S = 10.0
#: A time beyond this one, in the year 2255, is damage.
_MAX_TIMESTAMP = 9e9


# --- looking --------------------------------------------------------------------------------


def read(job_folder: Path) -> Job:
    """The job in a folder.

    Raises
    ------
    InputError
        When the folder holds no job.
    """
    try:
        job = _parse_job(job_folder)
        if job.active and not _is_alive(job_folder, job.created):
            job = _finalize_dead_job(job_folder)
    except DamagedFileError as error:
        return _damaged_job(job_folder, str(error))
    if job.state == "done" and not _is_complete(job_folder / "result.json", job.result_bytes):
        return replace(
            job, state="damaged", message=f"{job_folder / 'result.json'} is damaged or gone."
        )
    return job


def list_jobs(folder: Path) -> list[Job]:
    """Every job, newest first; the damaged ones too."""
    try:
        job_folders = [p for p in folder.iterdir() if not p.name.startswith(".") and p.is_dir()]
    except OSError:
        return []
    found = []
    for job_folder in sorted(job_folders, reverse=True):
        try:
            found.append(read(job_folder))
        except InputError as error:
            if job_folder.is_dir():  # else it was deleted meanwhile
                found.append(_damaged_job(job_folder, str(error)))
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
    interrupted = [job for job in list_jobs(folder) if job.state == "interrupted"]
    if not interrupted:
        raise InputError(f"No job in {folder} was interrupted; there is nothing to resume.")
    return interrupted[0]


def read_state(job_folder: Path) -> str:
    """How a job stands; damaged where there is nothing to tell it by."""
    try:
        return read(job_folder).state
    except InputError:
        return "damaged"


def write_end(job_folder: Path, state: str, message: str) -> None:
    """Write how a job ended whose process didn't."""
    try:
        progress = read_json(job_folder / "progress.json") or {}
    except DamagedFileError:
        progress = {}
    progress |= {"state": state, "message": message, "eta": None}
    write_json(job_folder / "progress.json", progress)


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


def _parse_job(job_folder: Path) -> Job:
    """The job as its files have it, whether its process lives or not.

    Raises
    ------
    InputError
        When there is no job.
    DamagedFileError
        When what it was asked to do cannot be read.
    """
    spec = read_json(job_folder / "job.json")
    if spec is None:
        raise InputError(f"There is no job in {job_folder}.")
    arguments, created = spec.get("arguments"), spec.get("created")
    if not (isinstance(arguments, list) and arguments and all(_is_argument(a) for a in arguments)):
        raise DamagedFileError(f"{job_folder / 'job.json'} is damaged: it has no command.")
    if not (_is_valid(created, _NUMBER) and created < _MAX_TIMESTAMP):
        raise DamagedFileError(f"{job_folder / 'job.json'} is damaged: it has no time.")
    try:
        progress = _read_progress(job_folder)
    except DamagedFileError as error:
        progress = _recover_progress(job_folder, str(error))
    return Job(
        id=job_folder.name,
        folder=job_folder,
        arguments=tuple(arguments),
        created=created,
        **progress,
    )


def _is_argument(value: object) -> bool:
    """Whether a value can be an argument of a process."""
    return isinstance(value, str) and "\0" not in value


def _read_progress(job_folder: Path) -> dict:
    path = job_folder / "progress.json"
    content = read_json(path)
    if content is None:
        return {"state": "queued"}
    progress = {name: content[name] for name in _PROGRESS if name in content}
    wrong = [name for name, value in progress.items() if not _is_valid(value, _PROGRESS[name])]
    if wrong or progress.get("state") not in STATES:
        raise DamagedFileError(f"{path} is damaged: its {(wrong or ['state'])[0]} cannot be.")
    return progress


def _is_valid(value: object, types: tuple[type, ...]) -> bool:
    """Whether a value is of a type, and a number neither negative nor infinite."""
    if not isinstance(value, types) or isinstance(value, bool):
        return False
    return not isinstance(value, (int, float)) or (math.isfinite(value) and 0 <= value < 2**63)


def _recover_progress(job_folder: Path, reason: str) -> dict:
    """What a job whose progress is damaged is: working, or ended with or without a result."""
    if _is_alive(job_folder, 0.0):
        return {"state": "running", "message": reason}
    try:
        done = read_json(job_folder / "result.json") is not None
    except DamagedFileError:
        done = False
    if done:
        return {"state": "done", "message": reason}
    return {
        "state": "interrupted",
        "message": f"{reason} It can resume from its other saved results.",
    }


def _is_complete(path: Path, size: int | None) -> bool:
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


def _damaged_job(job_folder: Path, message: str) -> Job:
    """A job whose files are damaged; only its name and time are known."""
    try:
        created = job_folder.stat().st_mtime
    except OSError:
        created = 0.0
    return Job(job_folder.name, job_folder, (), created, "damaged", message=message)


def _finalize_dead_job(job_folder: Path) -> Job:
    """A job whose process is gone without having said how it ended; writes down how that was.

    The first reader writes it, since the evidence of the cause does not last.
    """
    with locked(job_folder):
        job = _parse_job(job_folder)  # it may have ended, or gone on, between the two looks
        if not job.active or _is_alive(job_folder, job.created):
            return job
        state, message = _infer_end_state(job_folder, job)
        with suppress(LsqError):  # in a read-only folder it is inferred again each time
            write_end(job_folder, state, message)
    return replace(job, state=state, message=message, eta=None)


@contextmanager
def locked(job_folder: Path) -> Iterator[None]:
    """Have nobody else change how a job stands, as far as its folder can be written."""
    try:
        lock = (job_folder / "state.lock").open("w")
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _infer_end_state(job_folder: Path, job: Job) -> tuple[str, str]:
    """State and message of a job whose process is gone without a word."""
    if (job_folder / CANCEL_FILE).exists():
        return "cancelled", "Cancelled."
    during = f"during '{job.stage or 'start'}'"
    before, now = _recorded_identity(job_folder).get("oom_kills"), oom_kills()
    if isinstance(before, int) and now is not None and now > before:
        return "interrupted", (
            f"Its process was killed {during}, most likely for lack of memory: the system killed "
            "a process for that since the job began. Free some memory or take a smaller model, "
            "then resume it."
        )
    why = _storage_problem(job_folder)
    return "interrupted", f"Its process ended without a message {during}{why}."


def _storage_problem(job_folder: Path) -> str:
    """What in the job's folder keeps a process from saying how it ended, '' for nothing."""
    with suppress(OSError):
        if shutil.disk_usage(job_folder).free < 2**20:
            return f": the disk of {job_folder} is full"
        if not os.access(job_folder, os.W_OK) or os.statvfs(job_folder).f_flag & os.ST_RDONLY:
            return f": {job_folder} can't be written"
    return ""


# --- which process --------------------------------------------------------------------------


def process_identity(pid: int) -> dict:
    """A process by number and start, since numbers are used again."""
    try:
        return {"pid": pid, "started": psutil.Process(pid).create_time()}
    except psutil.NoSuchProcess:
        return {"pid": pid, "started": 0.0}


def _recorded_identity(job_folder: Path) -> dict:
    """What ``process.json`` says, as far as it can be read."""
    try:
        content = read_json(job_folder / "process.json") or {}
    except DamagedFileError:
        return {}
    whole = _is_valid(content.get("pid"), _COUNT) and _is_valid(content.get("started"), _NUMBER)
    return content if whole and 0 < content["pid"] < 2**31 else {}


def process_id(job_folder: Path) -> int | None:
    """The number of a job's process, None where it has none any more."""
    identity = _recorded_identity(job_folder)
    if not identity:
        return _pid_from_lock(job_folder)
    try:
        process = psutil.Process(identity["pid"])
        same = abs(process.create_time() - identity["started"]) < 1.0
        return process.pid if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _pid_from_lock(job_folder: Path) -> int | None:
    """The same where ``process.json`` can't be read, by the lock that the process holds."""
    with suppress(OSError, ValueError), (job_folder / WORKING_LOCK).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # the job's process holds it
            return int(file.read())
    return None  # without the file, or its lock, there is no process


def _is_alive(job_folder: Path, created: float) -> bool:
    """Whether a job has a process, or is about to have one."""
    if not (job_folder / "process.json").exists() and time.time() - created < _START_TIMEOUT_S:
        return True
    return process_id(job_folder) is not None
