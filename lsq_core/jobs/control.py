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

    Where one of just this command waits or runs, that one is returned and none is started,
    from whichever process. A job runs on when the caller ends; jobs on the same device wait for one
    another.

    Raises
    ------
    LsqError
        When its folder cannot be made, or no process can be started.
    """
    with _start_lock(folder):
        same = _find_active(folder, arguments)
        if same is not None:
            return same
        job_folder = _new_folder(folder, arguments)
        try:
            _launch(job_folder)
        except LsqError:
            shutil.rmtree(job_folder, ignore_errors=True)  # nothing was begun in it
            raise
    return read(job_folder)


def resume(job: Job) -> Job:
    """Let a job that ended without a result go on in its folder, with what it kept there.

    Where another one of the same command was started meanwhile, that one is returned.

    Raises
    ------
    InputError
        When it has a result, goes on already, or its command can't be read any more.
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
    """The job of just this command that waits or runs."""
    spec = tuple(arguments)
    return next((job for job in list_jobs(folder) if job.active and job.arguments == spec), None)


@contextmanager
def _start_lock(folder: Path) -> Iterator[None]:
    """Have jobs of a folder started one after another, by whichever process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "start.lock").open("w")
    except OSError as error:
        raise write_error(folder, error) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _new_folder(folder: Path, arguments: list[str]) -> Path:
    """A job's folder, which is seen with its ``job.json`` in it or not at all."""
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
    """Start the process that does a folder's job."""
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
        with suppress(OSError):  # where it can't be written, the job shows as interrupted
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
    """Wait a moment for a process; whether it has ended.

    One that another process started, the app say, remains as a zombie until that one asks for it.
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
    """Delete a job that has ended, with all that it kept; results in the database stay.

    Raises
    ------
    InputError
        When it waits or runs.
    """
    if read_state(job.folder) in ACTIVE_STATES:
        raise InputError(f"Job {job.id} is active; cancel it first.")
    try:
        shutil.rmtree(job.folder)
    except OSError as error:
        raise LsqError(f"{job.folder} cannot be deleted ({error.strerror}).") from error


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it ended meanwhile
        os.killpg(pid, number)  # everything that it started goes with it
