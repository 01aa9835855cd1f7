"""Shared parts of the campaigns: command outcomes, attempted connections, the table of counts."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

#: Processor-time limit of a command in seconds, and the factor by which its wall-clock limit is
#: longer, since the machine may be busy.
LIMIT_S = 20
_PATIENCE = 6
_HEADER = """\
| campaign | n | lost | tracebacks | without a sentence | fetches |
|---|---:|---:|---:|---:|---:|"""


# --- command outcomes -------------------------------------------------------------------------


class TooLong(BaseException):
    """A command exceeded its time limit."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`TooLong` in the main thread after ``seconds`` of processor time.

    It is also raised after ``_PATIENCE`` times as long by the clock.
    """

    def stop(*_: object) -> None:
        raise TooLong

    limits = {signal.ITIMER_PROF: seconds, signal.ITIMER_REAL: _PATIENCE * seconds}
    signals = (signal.SIGPROF, signal.SIGALRM)
    before = {number: signal.signal(number, stop) for number in signals}
    for timer, limit in limits.items():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for timer in limits:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def outcome(arguments: list[str], limit: float = LIMIT_S) -> str:
    """Run a command and return how it ended: ``exit N``, ``usage N`` or a fault.

    ``usage N`` is an exit status of the argument parser. A non-zero status without exactly one
    sentence on standard error is a fault, as are a traceback and a hang.
    """
    from lsq_core.cli.program import main

    errors, printed = StringIO(), StringIO()
    try:
        with time_limit(limit), redirect_stderr(errors), redirect_stdout(printed):
            status, kind = main(arguments), "exit"
    except TooLong:
        return "hang"
    except SystemExit as error:
        status, kind = error.code, "usage"
    except BaseException:
        lines = traceback.format_exc().strip().splitlines()
        place = next((line for line in reversed(lines) if "lsq_core" in line), "")
        return f"traceback {lines[-1][:160]} {place.strip()[:120]}"
    fault = _fault(errors.getvalue(), "lsq: " if kind == "exit" else ": error: ")
    return f"{kind} {status}" if status == 0 or not fault else f"{kind} {status} with {fault}"


def _fault(errors: str, sign: str) -> str:
    """Return what is wrong with the standard error of a failed command, or ''."""
    lines = errors.removesuffix("\n").split("\n")
    sentences = [line for line in lines if sign in line]
    if len(sentences) != 1 or "Traceback" in errors:
        return f"{len(sentences)} sentences: {errors[-300:]!r}"
    if lines[-1] != sentences[0]:
        return f"a sentence of several lines: {errors[-300:]!r}"
    if any(unicodedata.category(c) == "Cc" for c in lines[-1]):
        return f"control characters: {lines[-1]!r}"
    return ""


def failed(kind: str) -> bool:
    """Return whether an outcome is a fault; exits of the argument parser count as one."""
    return kind not in ("exit 0", "exit 1", "exit 2")


# --- connections ------------------------------------------------------------------------------


@dataclass
class Connections:
    """Refuses and records this process's connections to other hosts, from :meth:`watch` on."""

    seen: list[str] = field(default_factory=list)

    def watch(self) -> None:
        """Start watching; the audit hook stays until the process ends."""
        sys.addaudithook(self)

    def take(self) -> list[str]:
        """Return and clear the recorded connections."""
        taken, self.seen = self.seen, []
        return taken

    def __call__(self, event: str, arguments: tuple) -> None:
        """Record and refuse an event, as an audit hook."""
        if event == "socket.getaddrinfo":
            host = arguments[0]
        elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
            host = arguments[1][0]
        else:
            return
        host = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host or "")
        if host not in ("127.0.0.1", "::1", "localhost", ""):
            self.seen.append(f"{event} {host}")
            raise OSError(f"a connection to {host} was refused")


# --- table ------------------------------------------------------------------------------------


@dataclass
class Tally:
    """A row of the table: the number of a campaign's cases and of each kind of fault.

    ``lost`` counts stored results that were lost or changed, ``silent`` endings without a sentence
    and hangs, and ``fetches`` connections to other hosts, scripts that ran and reads outside the
    folders a command was given. ``details`` has a line for each fault.
    """

    campaign: str
    n: int = 0
    lost: int = 0
    tracebacks: int = 0
    silent: int = 0
    fetches: int = 0
    details: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, campaign: str, n: int, endings: Counter[str]) -> Tally:
        """Return the row of a campaign from the counts of its faults."""
        tally = cls(campaign, n)
        for ending, count in endings.items():
            for _ in range(count):
                tally.add(ending)
        return tally

    def add(self, ending: str, case: str = "") -> None:
        """Count a fault."""
        if ending.startswith("traceback"):
            self.tracebacks += 1
        elif ending.startswith("lost"):
            self.lost += 1
        elif ending.startswith("fetch"):
            self.fetches += 1
        else:
            self.silent += 1
        self.details.append(f"{case}: {ending}" if case else ending)

    @property
    def has_faults(self) -> bool:
        """Whether there were any faults."""
        return bool(self.lost or self.tracebacks or self.silent or self.fetches)

    def __str__(self) -> str:
        counts = (self.n, self.lost, self.tracebacks, self.silent, self.fetches)
        return f"| {self.campaign} | {' | '.join(map(str, counts))} |"


def print_table(*tallies: Tally) -> int:
    """Print the faults and the table; return the exit status, 1 if there were any faults."""
    for line in (line for tally in tallies for line in tally.details):
        print(f"fault: {line}")
    print(_HEADER)
    for tally in tallies:
        print(tally)
    return int(any(tally.has_faults for tally in tallies))


def run_campaign(
    campaign: Callable[[int, Path, int, Callable[[str], None]], Tally], count: int
) -> int:
    """Run a campaign in a temporary folder and return its exit status.

    ``[COUNT] [SEED]`` on the command line override ``count`` and seed 0. ``campaign`` takes the
    count, the folder, the seed, and a function that logs each case's outcome.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    count = int(sys.argv[1]) if sys.argv[1:] else count
    seed = int(sys.argv[2]) if sys.argv[2:] else 0
    with tempfile.TemporaryDirectory() as name:
        return print_table(campaign(count, Path(name), seed, lambda line: print(line, flush=True)))
