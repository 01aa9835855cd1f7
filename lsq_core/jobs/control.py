"""Starting, resuming, cancelling and deleting background jobs."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from lsq_core import paths
from lsq_core.errors import InputError, LsqError
from lsq_core.files import fsync_folder, write_error
from lsq_core.jobs.folder import (
    list_jobs,
    locked,
    process_id,
    process_identity,
    read,
    read_state,
    write_end,
)
from lsq_core.jobs.job import ACTIVE_STATES, CANCEL_FILE, GRACE_S, PROGRESS_EVERY, Job
from lsq_core.jsontext import write_json
from lsq_core.memory import oom_kills

# --- starting -------------------------------------------------------------------------------


def start(folder: Path, arguments: list[str]) -> Job:
    """Start a job for a command line of this project, such as ``["run", "--model", "demo"]``.

    If a job with the same command is queued or running, whichever process started it, return that
    one instead. A job continues when its caller ends; jobs on the same device wait for one another.

    Raises
    ------
    LsqError
        If its folder cannot be created or no process can be started.
    """
    with _start_lock(folder):
        same = _find_active(folder, arguments)
        if same is not None:
            return same
        job_folder = _new_folder(folder, arguments)
        try:
            _launch(job_folder)
        except LsqError:
            shutil.rmtree(job_folder, ignore_errors=True)  # nothing was started in it
            raise
    return read(job_folder)


def resume(job: Job) -> Job:
    """Resume a job that ended without a result, from the intermediate results in its folder.

    If another job with the same command was started in the meantime, return that one instead.

    Raises
    ------
    InputError
        If it has a result, is active, or its command can no longer be read.
    """
    with _start_lock(job.folder.parent):
        job = read(job.folder)
        if not job.can_resume:
            raise InputError(f"Job {job.id} is {job.state}, so there is nothing to resume.")
        same = _find_active(job.folder.parent, job.arguments)
        if same is not None:
            return same
        with locked(job.folder):
            (job.folder / CANCEL_FILE).unlink(missing_ok=True)
            before = {"state": "queued", "message": "Resuming.", "seconds": job.seconds}
            write_json(job.folder / "progress.json", before)
            _launch(job.folder)
    return read(job.folder)


def _find_active(folder: Path, arguments: list[str] | tuple[str, ...]) -> Job | None:
    """Return the queued or running job with exactly this command, or None."""
    spec = tuple(arguments)
    return next((job for job in list_jobs(folder) if job.active and job.arguments == spec), None)


@contextmanager
def _start_lock(folder: Path) -> Iterator[None]:
    """Lock a folder, so that only one process at a time starts a job in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "start.lock").open("w")
    except OSError as error:
        raise write_error(folder, error) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _new_folder(folder: Path, arguments: list[str]) -> Path:
    """Create a job's folder, which becomes visible only once it contains ``job.json``."""
    id = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    unfinished, job_folder = folder / f".{id}", folder / id
    try:
        unfinished.mkdir()
        spec = {"id": id, "arguments": list(arguments), "created": time.time()}
        write_json(unfinished / "job.json", spec)
        unfinished.rename(job_folder)
    except (OSError, LsqError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise error if isinstance(error, LsqError) else write_error(job_folder, error) from error
    fsync_folder(folder)
    return job_folder


def _launch(job_folder: Path) -> None:
    """Start the process that runs a folder's job."""
    try:
        with (job_folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "lsq_core", "job", str(job_folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=paths.IMPORT_FOLDER,
            )
    except OSError as error:
        raise LsqError(
            f"No process could be started for {job_folder} ({error.strerror})."
        ) from error
    write_json(
        job_folder / "process.json", process_identity(process.pid) | {"oom_kills": oom_kills()}
    )


def follow(job: Job, report: Callable[[str, int, int, str], None]) -> Job:
    """Report a job's progress until it ends; the job continues if this is interrupted."""
    while job.active:
        report(job.stage or job.state, job.done, job.total, job.message)
        time.sleep(PROGRESS_EVERY)
        job = read(job.folder)
    return job


# --- ending ---------------------------------------------------------------------------------


def cancel(job: Job) -> Job:
    """Terminate a job, or kill it if it does not end in time; return its final state."""
    if job.active:
        with suppress(OSError):  # if it cannot be written, the job will appear as interrupted
            (job.folder / CANCEL_FILE).touch()
    pid = process_id(job.folder) if job.active else None
    if pid is not None:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            _signal(pid, signal.SIGTERM)
            if not _wait_for_end(process):
                _signal(pid, signal.SIGKILL)
                _wait_for_end(process)
    after = read(job.folder)
    if after.state in (*ACTIVE_STATES, "interrupted"):
        write_end(job.folder, "cancelled", "Cancelled.")
    return read(job.folder)


def _wait_for_end(process: psutil.Process) -> bool:
    """Wait up to ``GRACE_S`` seconds for a process; return whether it has ended.

    A process started by another one, such as the app, remains a zombie until its parent waits for
    it.
    """
    until = time.monotonic() + GRACE_S
    while time.monotonic() < until:
        with suppress(psutil.TimeoutExpired):
            process.wait(0.02)
            return True
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
    return False


def delete(job: Job) -> None:
    """Delete a job that has ended, and its files; results in the database stay.

    Raises
    ------
    InputError
        If it is queued or running.
    LsqError
        If its folder cannot be deleted.
    """
    if read_state(job.folder) in ACTIVE_STATES:
        raise InputError(f"Job {job.id} is active; cancel it first.")
    try:
        shutil.rmtree(job.folder)
    except OSError as error:
        raise LsqError(f"{job.folder} cannot be deleted ({error.strerror}).") from error


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it has ended in the meantime
        os.killpg(pid, number)  # including the processes that it started
