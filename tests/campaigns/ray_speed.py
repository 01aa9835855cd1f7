"""Time a sweep of 24 evaluations without Ray, with one single-core actor, and with two.

``python -m tests.campaigns.ray_speed [REPEATS [TOKENS]]`` runs the three variants in turn, REPEATS
(3) times each, with one thread per process, on a database that has the profile; each of the two
texts has TOKENS (8,192) tokens. It prints the wall-clock time in seconds, both in total and from
the moment when the first actor is ready (or the first run starts), which leaves out starting a
cluster and importing torch; the processor time of all processes of the sweep; and the ratios of the
medians. On a busy machine only the processor time is meaningful.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from lsq_core import jobs
from lsq_core.distributed.status import read_actors
from lsq_core.jobs.folder import process_id
from tests.campaigns.kills import figures, fill_database
from tests.campaigns.ray_kills import command, measure_profile, write_other_text

#: The variants and the options that each adds.
WAYS = {
    "without Ray": (),
    "one actor": ("--ray", "local", "--actor-cores", "1", "--actors", "1"),
    "two actors": ("--ray", "local", "--actor-cores", "1"),
}


@dataclass(frozen=True)
class Timing:
    """Seconds of a sweep: total and measuring by the clock, and processor time of all processes."""

    whole: float
    measuring: float
    processor: float


def _processor_seconds(pid: int, seen: dict[int, float]) -> None:
    """Record the processor time used so far by each process of a job."""
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error):
                times = process.cpu_times()
                seen[process.pid] = times.user + times.system


def write_texts(folder: Path, tokens: int) -> None:
    """Write two texts of at least ``tokens`` tokens; every line has several."""
    lines = range(tokens // 4)
    calls = (f"Return the {i}-th item, or raise IndexError beyond {i} of them." for i in lines)
    (folder / "text.txt").write_text("\n".join(calls), "utf8")
    write_other_text(folder, len(lines))


def time_sweep(way: str, whole: Path, folder: Path, tokens: int) -> tuple[Timing, list]:
    """Run one sweep; return its timing and figures."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(whole, folder / "lsq.duckdb")
    options = ("--max-tokens", str(tokens), *WAYS[way])
    job = jobs.start(folder / "jobs", command(folder, whole.parent / "text.txt", *options))
    began, first, seen = time.monotonic(), None, {}
    pid = process_id(job.folder)
    while (job := jobs.read(job.folder)).active:
        _processor_seconds(pid, seen)
        first = first or (time.monotonic() if _measures(job, way) else None)
        time.sleep(0.1)
    if job.state != "done":
        raise RuntimeError(f"the sweep ended as {job.state}: {job.message}")
    end = time.monotonic()
    return Timing(end - began, end - (first or began), sum(seen.values())), figures(job.result())


def _measures(job: jobs.Job, way: str) -> bool:
    if way == "without Ray":
        return job.stage == "sweep"
    return any(row.state != "starting" for row in read_actors(job.folder))


def main(repeats: int = 3, tokens: int = 8192) -> None:
    """Print every timing, and the ratios of the medians."""
    timings: dict[str, list[Timing]] = {way: [] for way in WAYS}
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        whole = fill_database(Path(name))
        write_texts(Path(name), tokens)
        measure_profile(whole)
        wanted = None
        for _ in range(repeats):
            for way in WAYS:
                timing, found = time_sweep(way, whole, Path(name) / "place", tokens)
                if wanted not in (None, found):
                    raise RuntimeError(f"{way} has other figures")
                wanted = found
                timings[way].append(timing)
                print(f"{way}: {timing}", flush=True)
    for kind in ("measuring", "whole"):
        medians = {w: statistics.median(getattr(t, kind) for t in timings[w]) for w in WAYS}
        faster = medians["one actor"] / medians["two actors"]
        overhead = medians["one actor"] / medians["without Ray"] - 1
        print(f"{kind}: two actors {faster:.2f} times as fast as one")
        print(f"{kind}: one actor {overhead:+.1%} beside no Ray")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
