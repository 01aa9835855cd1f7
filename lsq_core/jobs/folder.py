"""Background jobs: each runs a command line in its own process and has its own folder.

The folder holds ``job.json`` (the command), ``process.json`` (the process that runs it),
``progress.json``, ``result.json`` and ``log.txt``. A job therefore outlives the page, the browser
and the server, and can be found again from its folder. This module is for starting and watching
jobs; what the job's process does is in :mod:`lsq_core.jobs.worker`.

Everything read from a folder is validated: a job whose files are damaged is listed as damaged and
does not affect other jobs.
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

#: Seconds that a job's process may take to start.
_START_TIMEOUT_S = 10.0
#: Times beyond this one, in the year 2255, are treated as damage.
_MAX_TIMESTAMP = 9e9


# --- reading --------------------------------------------------------------------------------


def read(job_folder: Path) -> Job:
    """Return the job in a folder.

    Raises
    ------
    InputError
        If the folder contains no job.
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
    """Return all jobs, newest first, including damaged ones."""
    try:
        job_folders = [p for p in folder.iterdir() if not p.name.startswith(".") and p.is_dir()]
    except OSError:
        return []
    found = []
    for job_folder in sorted(job_folders, reverse=True):
        try:
            found.append(read(job_folder))
        except InputError as error:
            if job_folder.is_dir():  # otherwise it was deleted in the meantime
                found.append(_damaged_job(job_folder, str(error)))
    return found


def find(folder: Path, id: str | None = None) -> Job:
    """Return the job with an id, by default the newest interrupted one.

    Raises
    ------
    InputError
        If there is none.
    """
    if id is not None:
        return read(folder / Path(id).name)
    interrupted = [job for job in list_jobs(folder) if job.state == "interrupted"]
    if not interrupted:
        raise InputError(f"No job in {folder} was interrupted; there is nothing to resume.")
    return interrupted[0]


def read_state(job_folder: Path) -> str:
    """Return a job's state; ``damaged`` if the folder contains no job."""
    try:
        return read(job_folder).state
    except InputError:
        return "damaged"


def write_end(job_folder: Path, state: str, message: str) -> None:
    """Record the final state of a job whose process did not record it."""
    try:
        progress = read_json(job_folder / "progress.json") or {}
    except DamagedFileError:
        progress = {}
    progress |= {"state": state, "message": message, "eta": None}
    write_json(job_folder / "progress.json", progress)


# --- parsing --------------------------------------------------------------------------------

_NUMBER, _COUNT = (int, float), (int,)
#: The entries of ``progress.json`` and their types.
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
    """Return the job as recorded in its files, whether or not its process is alive.

    Raises
    ------
    InputError
        If there is no job.
    DamagedFileError
        If ``job.json`` is damaged.
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
    """Return whether a value can be an argument of a process."""
    return isinstance(value, str) and "\0" not in value


def _read_progress(job_folder: Path) -> dict:
    path = job_folder / "progress.json"
    content = read_json(path)
    if content is None:
        return {"state": "queued"}
    progress = {name: content[name] for name in _PROGRESS if name in content}
    wrong = [name for name, value in progress.items() if not _is_valid(value, _PROGRESS[name])]
    if wrong or progress.get("state") not in STATES:
        raise DamagedFileError(f"{path} is damaged: its {(wrong or ['state'])[0]} is invalid.")
    return progress


def _is_valid(value: object, types: tuple[type, ...]) -> bool:
    """Return whether a value has one of the types and, if a number, is finite and not negative."""
    if not isinstance(value, types) or isinstance(value, bool):
        return False
    return not isinstance(value, (int, float)) or (math.isfinite(value) and 0 <= value < 2**63)


def _recover_progress(job_folder: Path, reason: str) -> dict:
    """Infer the state of a job with a damaged progress file: running, done or interrupted."""
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
    """Return whether a result has the recorded size, and starts and ends like a JSON object.

    This is checked often and results may be long; the full content is checked when it is read.
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
    """Return a job whose files are damaged, with only its id and time."""
    try:
        created = job_folder.stat().st_mtime
    except OSError:
        created = 0.0
    return Job(job_folder.name, job_folder, (), created, "damaged", message=message)


def _finalize_dead_job(job_folder: Path) -> Job:
    """Infer, record and return the final state of a job whose process died without recording it.

    The first reader records it, because the evidence of the cause does not last.
    """
    with locked(job_folder):
        job = _parse_job(job_folder)  # it may have ended or been resumed since it was last read
        if not job.active or _is_alive(job_folder, job.created):
            return job
        state, message = _infer_end_state(job_folder, job)
        with suppress(LsqError):  # in a read-only folder, the state is inferred each time
            write_end(job_folder, state, message)
    return replace(job, state=state, message=message, eta=None)


@contextmanager
def locked(job_folder: Path) -> Iterator[None]:
    """Lock a job's state against changes by other processes, if its folder is writable."""
    try:
        lock = (job_folder / "state.lock").open("w")
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _infer_end_state(job_folder: Path, job: Job) -> tuple[str, str]:
    """Return state and message of a job whose process died without recording them."""
    if (job_folder / CANCEL_FILE).exists():
        return "cancelled", "Cancelled."
    during = f"during '{job.stage or 'start'}'"
    before, now = _recorded_identity(job_folder).get("oom_kills"), oom_kills()
    if isinstance(before, int) and now is not None and now > before:
        return "interrupted", (
            f"Its process was killed {during}, most likely for lack of memory: the system killed "
            "a process for that since the job began. Free some memory or use a smaller model, "
            "then resume it."
        )
    why = _storage_problem(job_folder)
    return "interrupted", f"Its process ended without a message {during}{why}."


def _storage_problem(job_folder: Path) -> str:
    """Return why a process could not record its end in the job's folder, '' if it could."""
    with suppress(OSError):
        if shutil.disk_usage(job_folder).free < 2**20:
            return f": the disk of {job_folder} is full"
        if not os.access(job_folder, os.W_OK) or os.statvfs(job_folder).f_flag & os.ST_RDONLY:
            return f": {job_folder} can't be written"
    return ""


# --- processes ------------------------------------------------------------------------------


def process_identity(pid: int) -> dict:
    """Return a process's id and start time, since ids are reused."""
    try:
        return {"pid": pid, "started": psutil.Process(pid).create_time()}
    except psutil.NoSuchProcess:
        return {"pid": pid, "started": 0.0}


def _recorded_identity(job_folder: Path) -> dict:
    """Return the content of ``process.json``, empty if it cannot be read."""
    try:
        content = read_json(job_folder / "process.json") or {}
    except DamagedFileError:
        return {}
    whole = _is_valid(content.get("pid"), _COUNT) and _is_valid(content.get("started"), _NUMBER)
    return content if whole and 0 < content["pid"] < 2**31 else {}


def process_id(job_folder: Path) -> int | None:
    """Return the id of a job's process, or None if it is no longer running."""
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
    """Return the same from the lock that the process holds, if ``process.json`` is unreadable."""
    with suppress(OSError, ValueError), (job_folder / WORKING_LOCK).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # the job's process holds it
            return int(file.read())
    return None  # no file or no lock means no process


def _is_alive(job_folder: Path, created: float) -> bool:
    """Return whether a job's process is running or about to start."""
    if not (job_folder / "process.json").exists() and time.time() - created < _START_TIMEOUT_S:
        return True
    return process_id(job_folder) is not None
