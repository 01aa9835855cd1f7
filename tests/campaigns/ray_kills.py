"""Kill the driver and the actors of sweeps on Ray at random moments, and compare the table.

``python -m tests.campaigns.ray_kills [COUNT] [SEED]`` sends COUNT (20) SIGKILLs, several per sweep,
to sweeps on two single-core actors. A kill hits either the driver, whose job must then be reported
as interrupted and resume, or a busy or idle actor, whose task another one must take over. In the
end, the table must equal that of a sweep without Ray and without kills, digit for digit; the
database must have every evaluation exactly once, and no process may be left over.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from lsq_core import jobs
from lsq_core.distributed.status import read_actors
from lsq_core.jobs.folder import process_id
from lsq_core.store.store import Store
from tests.campaigns.fuzzed_commands import read_rows
from tests.campaigns.harness import Tally, run_campaign
from tests.campaigns.kills import (
    PATIENCE_S,
    Expected,
    faults_of_message,
    faults_of_place,
    figures,
    fill_database,
    own_place,
)

#: Maximum number of SIGKILLs per sweep.
_KILLS = 10
_SWEEP = (
    *("sweep", "--model", "demo", "--device", "cpu", "--quantizer", "rtn"),
    *("--method", "uniform", "--method", "kurt-scaled", "--method", "mxq"),
    *("--budget", "2.5bpp", "--budget", "2.8bpp", "--budget", "3.2bpp", "--budget", "3.7bpp"),
    *("--samples", "4", "--block-tokens", "64", "--max-tokens", "400"),
)


def command(folder: Path, text: Path, *options: str) -> list[str]:
    """Return the command line of the sweep on two texts, using the database in ``folder``."""
    others = [word for name in (text, text.with_name("other.txt")) for word in ("--corpus", name)]
    words = [*_SWEEP, "--calibration", text, *others, "--db", folder / "lsq.duckdb", *options]
    return [str(word) for word in words]


def write_other_text(folder: Path, count: int = 400) -> None:
    """Write the second text, of ``count`` lines, next to the first."""
    lines = (f"{i} is followed by {i + 1}, and {i} precedes it." for i in range(count))
    (folder / "other.txt").write_text("\n".join(lines), "utf8")


def measure_profile(whole: Path) -> None:
    """Store the profile in the database, so that a sweep spends most of its time on runs."""
    text = str(whole.parent / "text.txt")
    settings = ("--calibration", text, "--samples", "4", "--block-tokens", "64")
    plan = ("plan", "--model", "demo", "--device", "cpu", "--method", "kurt-scaled")
    argv = [*plan, "--budget", "3.2bpp", *settings, "--db", str(whole)]
    job = _ended(jobs.start(whole.parent / "profile", argv))
    if job.state != "done":
        raise RuntimeError(f"the profile ended as {job.state}: {job.message}")


def expected(whole: Path, folder: Path) -> Expected:
    """Run the sweep without Ray and without kills."""
    with own_place(whole, folder):
        began = time.monotonic()
        job = _ended(jobs.start(folder / "jobs", command(folder, whole.parent / "text.txt")))
        if job.state != "done":
            raise RuntimeError(f"the sweep ended as {job.state}: {job.message}")
        return Expected(figures(job.result()), time.monotonic() - began)


def _processes(job: jobs.Job) -> list[psutil.Process]:
    """Return the actors of a running job, found among its driver's child processes."""
    found = []
    with suppress(psutil.Error, TypeError):
        for process in psutil.Process(process_id(job.folder)).children(recursive=True):
            with suppress(psutil.Error):
                if process.name().startswith("ray::ModelActor"):
                    found.append(process)
    return found


def _is_measuring(job: jobs.Job) -> bool:
    """Return whether an actor of a job's current driver is measuring something."""
    working = any(row.state == "working" for row in read_actors(job.folder))
    return working and bool(_processes(job))


def _ended(job: jobs.Job) -> jobs.Job:
    """Wait until a job has ended, with a very generous deadline, and return it."""
    deadline = time.monotonic() + 5 * PATIENCE_S
    while (job := jobs.read(job.folder)).active and time.monotonic() < deadline:
        time.sleep(0.1)
    return job


def kill_once(job: jobs.Job, moment: float, rng: random.Random) -> tuple[jobs.Job, str]:
    """Kill the driver or an actor after some seconds; return the job and a description."""
    if rng.random() < 0.8:  # else it may be planning, or starting the cluster
        while (job := jobs.read(job.folder)).active and not _is_measuring(job):
            time.sleep(0.5)
    deadline = time.monotonic() + moment
    while (job := jobs.read(job.folder)).active and time.monotonic() < deadline:
        time.sleep(0.05)
    actors = _processes(job)
    driver = process_id(job.folder)
    if not job.active or driver is None:
        return job, ""
    stage = f"{job.stage or 'start'} {100 * job.fraction:.0f} %"
    if actors and rng.random() < 0.7:
        victim = rng.choice(actors)
        with suppress(psutil.Error):
            victim.send_signal(signal.SIGKILL)
        return job, f"actor {victim.pid} after {moment:.1f} s in {stage}"
    with suppress(ProcessLookupError):
        os.kill(driver, signal.SIGKILL)
    while (job := jobs.read(job.folder)).active:
        time.sleep(0.02)
    return job, f"driver {driver} after {moment:.1f} s in {stage}, {job.state}"


def evaluations(folder: Path) -> Counter[tuple[str, str, str]]:
    """Count the evaluations of each run by text and protocol."""
    rows = Store(folder / "lsq.duckdb").query(
        "SELECT run, corpus, protocol FROM evaluations WHERE run IS NOT NULL"
    )
    return Counter(rows.itertuples(index=False, name=None))


def kill_sweep(
    wanted: Expected, whole: Path, folder: Path, rng: random.Random, kills: int
) -> tuple[list[str], list[str]]:
    """Run a sweep with at most ``kills`` kills; return the faults and each kill's description."""
    with own_place(whole, folder):
        before, wrong, said = read_rows(folder / "lsq.duckdb"), [], []
        old = evaluations(folder)
        arguments = command(
            folder, whole.parent / "text.txt", "--ray", "local", "--actor-cores", "1"
        )
        job = jobs.start(folder / "jobs", arguments)
        while len(said) < kills:
            job, done = kill_once(job, rng.uniform(0.2, wanted.seconds / kills), rng)
            if not done:
                break
            said.append(done)
            if job.state == "interrupted":
                wrong += faults_of_message(job)
                job = jobs.resume(job)
        job = _ended(job)
        if job.state != "done":
            wrong.append(f"lost: in the end it is {job.state}: {job.message}")
        elif figures(job.result()) != wanted.figures:
            wrong.append("lost: the table is another one")
        wrong += faults_of_place(folder, before)
        made = evaluations(folder) - old
        if len(made) != 24 or set(made.values()) != {1}:
            wrong.append(f"lost: the sweep stored {sorted(made.values())}")
    return wrong, said


def campaign(count: int, folder: Path, seed: int, log: Callable[[str], None]) -> Tally:
    """Return the tally of about ``count`` kills."""
    tally, whole = Tally("kills of sweeps on Ray", 0), fill_database(folder)
    measure_profile(whole)
    write_other_text(folder)
    wanted = expected(whole, folder / "expected")
    log(f"without Ray it takes {wanted.seconds:.1f} s and has {len(wanted.figures)} figures")
    sweep, deadline = 0, time.monotonic() + count * PATIENCE_S
    while tally.n < count and time.monotonic() < deadline:
        rng = random.Random(f"{seed}-{sweep}")
        wrong, said = kill_sweep(wanted, whole, folder / "place", rng, min(_KILLS, count - tally.n))
        for number, done in enumerate(said, start=tally.n + 1):
            log(f"{number:3} sweep {sweep}: {done}")
        log(f"    sweep {sweep}: {'; '.join(wrong) or 'whole, and the table is the same'}")
        for fault in wrong:
            tally.add(fault, f"sweep {sweep}")
        tally.n += len(said)
        sweep += 1
    return tally


if __name__ == "__main__":
    sys.exit(run_campaign(campaign, 20))
