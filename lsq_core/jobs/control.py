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
from lsq_core.files import cannot_write, sync_folder
from lsq_core.jobs.folder import (
    list_jobs,
    locked,
    process_id,
    process_identity,
    read,
    read_state,
    write_end,
)
from lsq_core.jobs.job import ACTIVE, CANCEL, GRACE, PROGRESS_EVERY, Job
from lsq_core.jsontext import write_json
from lsq_core.memory import oom_kills

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
        with locked(job.folder):
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
    write_json(home / "process.json", process_identity(process.pid) | {"oom_kills": oom_kills()})


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
    pid = process_id(job.folder) if job.active else None
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
        write_end(job.folder, "cancelled", "Cancelled.")
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


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it ended meanwhile
        os.killpg(pid, number)  # everything that it started goes with it
