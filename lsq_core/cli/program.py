"""The command line: ``lsq VERB``.

With ``--json``, exactly one JSON document goes to standard output; progress and messages always go
to standard error. The exit status is 0 for success, 2 for bad input and 1 for a failure. Options
are defined in :mod:`lsq_core.cli.parser`, the verbs in :mod:`lsq_core.cli.verbs`, and their
readable output in :mod:`lsq_core.cli.show`.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path

from lsq_core.cli import output
from lsq_core.cli.parser import build_parser
from lsq_core.errors import InputError, LsqError
from lsq_core.files import translate_disk_error
from lsq_core.jobs.worker import run_job
from lsq_core.progress import ProgressCallback


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit status.

    The internal command ``job FOLDER`` is how :func:`lsq_core.jobs.start` runs a job.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    output.configure_streams()
    if arguments[:1] == ["job"] and len(arguments) == 2:
        folder = Path(arguments[1])
        if not os.path.isfile(folder / "job.json"):  # never raises, unlike Path.is_file
            return _report_failure(f"There is no job in {folder}.", InputError.exit_code)
        return run_job(folder, execute)
    with output.ignore_broken_pipe():
        options = build_parser().parse_args(arguments)
    console = _Console()
    try:
        try:
            result = options.call(options, console.report)
        finally:
            console.close()
    except LsqError as error:
        return _report_failure(str(error), error.exit_code)
    except OSError as error:
        known = translate_disk_error(error)
        if known is None:
            raise
        return _report_failure(str(known), known.exit_code)
    except KeyboardInterrupt:
        return _report_failure("interrupted; what was stored is kept", 1)
    return _print_result(options, result)


def _print_result(options: argparse.Namespace, result: dict) -> int:
    """Print a command's result, and return the exit status."""
    try:
        with output.ignore_broken_pipe():
            if options.json:
                output.print_json(result)
            else:
                output.print_result(options.show, result)
    except OSError as error:
        return _report_failure(f"The output cannot be written: {error.strerror}.", 1)
    return 0


def _report_failure(reason: str, status: int) -> int:
    """Print the reason to standard error if possible, and return the exit status."""
    with suppress(OSError):
        print(f"lsq: {output.escape_controls(reason)}", file=sys.stderr)
    return status


def execute(arguments: list[str], report: ProgressCallback, folder: Path | None = None) -> dict:
    """Run one command of a job and return its result, reporting progress to ``report``.

    Intermediate results are stored in ``folder``, from which the command can resume.

    Raises
    ------
    LsqError
        If the command fails.
    """
    options = build_parser(exit_on_error=False).parse_args(arguments)
    options.checkpoint_folder = folder
    return options.call(options, report)


class _Console:
    """Progress on standard error: one line that is updated in a terminal, else a few lines."""

    def __init__(self) -> None:
        self.shown = ("", -1)
        self.terminal = sys.stderr.isatty()

    def report(self, stage: str, done: int, total: int, message: str) -> None:
        with suppress(OSError):  # work continues if standard error is closed
            self._write(stage, done, total, message)

    def _write(self, stage: str, done: int, total: int, message: str) -> None:
        message = output.escape_controls(message)
        tenth = 10 * done // total if total else 0
        if not self.terminal and (stage, tenth) == self.shown:
            return
        share = f"{100 * done // total:3d} %" if total > 1 else "     "
        line = f"{stage:>9} {share}  {message}"
        if self.terminal:
            new_stage = stage != self.shown[0] and self.shown[0]
            print(("\n" if new_stage else "\r\033[K") + line, end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
        self.shown = (stage, tenth)

    def close(self) -> None:
        if self.terminal and self.shown[0]:
            with suppress(OSError):
                print(file=sys.stderr)
