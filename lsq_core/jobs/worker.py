"""A job's process: it waits for the device, runs the command, and records progress and outcome.

See :mod:`lsq_core.jobs.folder` for how jobs are watched, :mod:`lsq_core.jobs.control` for how they
are started.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import psutil

from lsq_core import devices
from lsq_core.errors import LsqError
from lsq_core.files import DamagedFileError, read_json, translate_disk_error, write_bytes
from lsq_core.jobs import CANCEL_FILE, PROGRESS_EVERY, WORKING_LOCK
from lsq_core.jsontext import json_bytes, write_json

#: Signals that ask a process to end: from :func:`lsq_core.jobs.cancel`, a system that shuts down,
#: or a terminal that closes.
_TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run_job(job_folder: Path, execute: Callable[[list[str], Callable, Path], dict]) -> int:
    """Run the job of a folder in this process and return the exit status.

    ``execute`` is called with the arguments, a report function and the folder, where it may store
    intermediate results, and returns the command's result.
    """
    for number in _TERMINATION_SIGNALS:
        signal.signal(number, _on_signal)
    arguments = read_json(job_folder / "job.json")["arguments"]
    progress = _ProgressFile(job_folder)
    try:
        with _exclusive_lock(job_folder), _device_lock(job_folder.parent, arguments, progress):
            result = json_bytes(execute(arguments, progress.report, job_folder))
            write_bytes(job_folder / "result.json", result)
        written = {"result_bytes": len(result), "result_sha256": sha256(result).hexdigest()}
        progress.end("done", "Done.", written)
        return 0
    except _AlreadyWorking:
        _log_line(f"another process works in {job_folder}")
        return 1
    except _Terminated:
        progress.end(*_termination_state(job_folder, progress))
        return 1
    except LsqError as error:
        progress.end("failed", str(error))
        return error.exit_code
    except BaseException as error:
        with suppress(OSError):
            traceback.print_exc()
        known = translate_disk_error(error)
        failure = str(known) if known else f"{type(error).__name__}: {error} (see the log)"
        progress.end("failed", failure)
        return 1


class _Terminated(BaseException):
    """Raised by the signal handler when the process is asked to end."""


class _AlreadyWorking(BaseException):
    """Raised if another process is running this job."""


def _on_signal(number: int, frame: object) -> None:
    raise _Terminated


def _termination_state(job_folder: Path, progress: _ProgressFile) -> tuple[str, str]:
    """Return state and message of a job that was asked to end, by the user or by a shutdown."""
    if (job_folder / CANCEL_FILE).exists():
        return "cancelled", "Cancelled."
    stage = progress.state.get("stage") or "start"
    return "interrupted", (
        f"Its process was terminated during '{stage}', as when the machine shuts down; "
        "resume it to continue."
    )


@contextmanager
def _exclusive_lock(job_folder: Path) -> Iterator[None]:
    """Hold the lock of a job, which records the process that runs it."""
    with (job_folder / WORKING_LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _AlreadyWorking from None
        with suppress(OSError):
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
        yield


@contextmanager
def _device_lock(folder: Path, arguments: list[str], progress: _ProgressFile) -> Iterator[None]:
    """Wait until no other job uses the device; the lock is released however the process ends.

    A job on Ray waits for all devices of this machine, in order.
    """
    words = dict(itertools.pairwise(arguments))
    named = [devices.canonical_device(words.get("--device", "auto"))]
    if "--ray" in arguments:
        named = devices.device_names()
    with ExitStack() as stack:
        progress.write({"state": "queued", "message": "Waiting for the device."})
        for device in named:
            name = re.sub(r"\W", "-", device)
            lock = stack.enter_context((folder / f"device-{name}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        progress.begin()
        yield


def _log_line(text: str) -> None:
    """Write a line to the log, ignoring errors of the disk."""
    with suppress(OSError):
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


class _ProgressFile:
    """Writes a job's progress, often enough to watch it but not so often as to slow it down.

    Failing to write progress does not stop the job; failures that matter are raised elsewhere.
    """

    def __init__(self, job_folder: Path) -> None:
        self.path = job_folder / "progress.json"
        self.state: dict = {}
        #: Seconds that the job ran before it was interrupted and resumed.
        self.previous_seconds = self._seconds_before()
        self.start_time = self.stage_began = time.monotonic()
        self.stage_first = 0
        self.has_device = False
        self.logged = ("", 0, 0)
        self.written = 0.0

    def _seconds_before(self) -> float:
        try:
            seconds = (read_json(self.path) or {}).get("seconds", 0.0)
        except DamagedFileError:
            return 0.0
        return seconds if isinstance(seconds, (int, float)) else 0.0

    def write(self, state: dict) -> None:
        self._update(state)
        with suppress(LsqError):
            write_json(self.path, self.state)
        self.written = time.monotonic()

    def _update(self, state: dict) -> None:
        self.state |= state | {
            "seconds": self.previous_seconds
            + (time.monotonic() - self.start_time if self.has_device else 0.0),
            "memory": psutil.Process().memory_info().rss,
        }

    def begin(self) -> None:
        self.start_time, self.has_device = time.monotonic(), True
        self.write({"state": "running", "stage": "start", "message": "Starting."})

    def report(self, stage: str, done: int, total: int, message: str) -> None:
        new = (stage, total) != (self.state.get("stage"), self.state.get("total"))
        self.log(stage, done, total, message)
        if new:
            self.stage_began, self.stage_first = time.monotonic(), done
        elif done < total and time.monotonic() - self.written < PROGRESS_EVERY:
            return
        elapsed = time.monotonic() - self.stage_began
        done_now = done - self.stage_first  # work done before says nothing about the speed
        eta = elapsed * (total - done) / done_now if done_now > 0 else None
        self.write({"stage": stage, "done": done, "total": total, "message": message, "eta": eta})

    def log(self, stage: str, done: int, total: int, message: str) -> None:
        """Write a line to the log for each stage and each tenth of it."""
        tenth = 10 * done // total if total else 0
        if (stage, total, tenth) != self.logged:
            share = f" {100 * done // total} %" if total > 1 else ""
            _log_line(f"{stage}{share}: {message}")
            self.logged = (stage, total, tenth)

    def end(self, state: str, message: str, more: dict | None = None) -> None:
        for number in _TERMINATION_SIGNALS:  # the process is already ending
            signal.signal(number, signal.SIG_IGN)
        _log_line(f"{state}: {message}")
        self._update({"state": state, "message": message, "eta": None} | (more or {}))
        try:
            write_json(self.path, self.state)
        except LsqError:
            self._write_in_place()

    def _write_in_place(self) -> None:
        """Overwrite the existing file in place, which needs no further space on a full disk.

        Shorter content is padded with spaces; longer content may still fail.
        """
        content = json_bytes(self.state)
        with suppress(OSError), self.path.open("r+b") as file:
            file.write(content.ljust(os.fstat(file.fileno()).st_size))
            file.flush()
            os.fsync(file.fileno())
