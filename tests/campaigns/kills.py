"""Kill background jobs and the running app at random moments, and check what is left.

``python -m tests.campaigns.kills [COUNT] [SEED]`` runs COUNT (40) cases, three quarters of which
kill a job and one quarter the app, by SIGKILL, SIGTERM or SIGINT. Each case uses its own copy of a
database with results. After each kill, all stored rows must be unchanged, the job must report how
it ended, and ``resume`` must complete it with exactly the figures of an undisturbed run; some jobs
are killed again while they resume. No process or temporary file may be left over. The app is
killed while a browser (if there is one) loads its pages; it must then start again on a database
that has lost nothing.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from lsq_core import jobs
from tests.campaigns.fuzzed_commands import read_rows, tables_missing_rows
from tests.campaigns.harness import Tally, run_campaign
from tests.conftest import ROOT

#: Time limit of any single step in seconds, generous enough for a busy machine.
PATIENCE_S = 300
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PAGES = ("/", "/Explore?model=demo", "/Plan?model=demo", "/Compare?model=demo", "/SQL")
_EVALUATION = ("--corpus", "TEXT", "--max-tokens", "600")
#: The jobs to kill; TEXT and FOLDER are replaced by a file and a folder of the campaign.
COMMANDS: dict[str, tuple[str, ...]] = {
    "profile": ("--corpus", "TEXT", "--samples", "4", "--block-tokens", "64"),
    "run": (
        *("--method", "uniform", "--base", "3.51", "--quantizer", "rtn"),
        *(*_EVALUATION, "--save", "FOLDER/models/saved"),
    ),
    "sweep": (
        *("--method", "uniform", "--base", "3.51", "--base", "4.25", "--quantizer", "rtn"),
        *_EVALUATION,
    ),
}
#: Result fields that must not depend on how often a command was killed.
_FIGURES = ("scores", "perplexity", "perplexity_full", "kl", "top1", "bits_per_param", "modules")


@dataclass(frozen=True)
class Expected:
    """The figures of a command that is not killed, and its duration in seconds."""

    figures: list
    seconds: float


# --- setup ------------------------------------------------------------------------------------


def fill_database(folder: Path) -> Path:
    """Create a database with synthetic runs of the demo model, and a text next to it."""
    from lsq_core.store.store import Store
    from tests.test_compare import insert_synthetic_runs

    lines = (f"Return the {i}-th item, or raise IndexError beyond {i} of them." for i in range(400))
    (folder / "text.txt").write_text("\n".join(lines), "utf8")
    store = Store(folder / "whole.duckdb")
    insert_synthetic_runs(store, 24)
    return store.path


def command(verb: str, folder: Path, text: Path) -> list[str]:
    """Return a job's command line, using the database in ``folder``."""
    words = [word.replace("TEXT", str(text)) for word in COMMANDS[verb]]
    words = [word.replace("FOLDER", str(folder)) for word in words]
    database = str(folder / "lsq.duckdb")
    return [verb, "--model", "demo", "--device", "cpu", *words, "--db", database]


@contextmanager
def own_place(whole: Path, folder: Path) -> Iterator[Path]:
    """Create a folder with a copy of the database, and a TMPDIR for the processes started in it."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "temporary").mkdir(parents=True)
    (folder / "models").mkdir()
    shutil.copy(whole, folder / "lsq.duckdb")
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder / "temporary")
    try:
        yield folder
    finally:
        os.environ.pop("TMPDIR")
        if before is not None:
            os.environ["TMPDIR"] = before


def lsq(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command and wait for it."""
    return subprocess.run(
        [sys.executable, "-m", "lsq_core", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def figures(result: object) -> list:
    """Return every figure of a command's result, in the result's order."""
    if isinstance(result, list):
        return [figure for entry in result for figure in figures(entry)]
    if not isinstance(result, dict):
        return []
    own = [(key, result[key]) for key in _FIGURES if key in result]
    inner = [v for k, v in result.items() if k not in _FIGURES and isinstance(v, (dict, list))]
    return own + [figure for value in inner for figure in figures(value)]


def expected(verb: str, whole: Path, folder: Path) -> Expected:
    """Run a job without killing it, as the reference for the killed ones."""
    with own_place(whole, folder):
        began = time.monotonic()
        job = ended(jobs.start(folder / "jobs", command(verb, folder, whole.parent / "text.txt")))
        if job.state != "done":
            raise RuntimeError(f"{verb} ended as {job.state}: {job.message}")
        return Expected(figures(job.result()), time.monotonic() - began)


def ended(job: jobs.Job) -> jobs.Job:
    deadline = time.monotonic() + PATIENCE_S
    while (job := jobs.read(job.folder)).active and time.monotonic() < deadline:
        time.sleep(0.05)
    return job


# --- checks -----------------------------------------------------------------------------------


def faults_of_place(folder: Path, before: dict[str, list]) -> Iterator[str]:
    """Yield rows lost from the database, and processes and temporary files left over."""
    try:
        after = read_rows(folder / "lsq.duckdb")
    except Exception as error:
        yield f"lost: the database cannot be opened: {error}"
    else:
        yield from (f"lost: rows of {table}" for table in tables_missing_rows(before, after))
    deadline = time.monotonic() + 10
    while (alive := _working_in(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    yield from (f"left a process: {line}" for line in alive)
    left = sorted(path.name for path in (folder / "temporary").iterdir())
    if left:
        yield f"left temporary files: {left}"


def _working_in(folder: Path) -> list[str]:
    """Return the command lines of live processes whose TMPDIR is that of a folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            same = process.environ().get("TMPDIR") == str(folder / "temporary")
            if same and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:150])
    return found


def faults_of_message(job: jobs.Job) -> Iterator[str]:
    """Yield what is wrong with the final state, message and log of a killed job."""
    if job.state not in ("interrupted", "done"):
        yield f"the killed job is {job.state}: {job.message}"
    if not job.message.endswith(".") or "\n" in job.message:
        yield f"no sentence: {job.message!r}"
    log = job.log_tail(1000)
    if "Traceback" in log:
        yield f"traceback in the log: {log.strip().splitlines()[-1]}"


# --- jobs -------------------------------------------------------------------------------------


def kill_job(
    verb: str,
    wanted: Expected,
    whole: Path,
    folder: Path,
    rng: random.Random,
    latest: float = 0.95,
) -> tuple[list[str], str]:
    """Kill a job once or twice and resume it; return the faults and a description of the kills.

    ``latest`` is the latest moment of a kill as a fraction of the job's usual duration. If the job
    finishes before it is killed, another one is started and killed sooner.
    """
    with own_place(whole, folder):
        before = read_rows(folder / "lsq.duckdb")
        arguments = command(verb, folder, whole.parent / "text.txt")
        job, said, wrong = jobs.start(folder / "jobs", arguments), [], []
        killed = False
        for _ in range(rng.choice([1, 1, 2])):
            number = rng.choice(SIGNALS)
            moment = rng.uniform(0.02, latest) * wanted.seconds
            said.append(f"{number.name} after {moment:.1f} s")
            job = _killed(job, number, moment)
            said.append(f"{job.state} in {job.stage or 'start'}")
            wrong += faults_of_message(job)
            wrong += faults_of_place(folder, before)
            if job.state == "done":
                break
            killed, job = True, jobs.resume(job)
        wrong += _faults_of_end(ended(job), wanted)
        wrong += faults_of_place(folder, before)
        wrong += _unfinished(folder)
    if not killed and not wrong:
        return kill_job(verb, wanted, whole, folder, rng, latest / 2)
    return wrong, f"{verb}: {', '.join(said)}"


def _killed(job: jobs.Job, number: int, moment: float) -> jobs.Job:
    """Send a signal to a job's process unless it has ended; return the job once it has stopped."""
    time.sleep(moment)
    with suppress(FileNotFoundError, ProcessLookupError):
        os.kill(json.loads((job.folder / "process.json").read_text("utf8"))["pid"], number)
    deadline = time.monotonic() + PATIENCE_S
    while (job := jobs.read(job.folder)).active and time.monotonic() < deadline:
        time.sleep(0.02)
    return job


def _faults_of_end(job: jobs.Job, wanted: Expected) -> Iterator[str]:
    if job.state != "done":
        yield f"lost: resumed, it is {job.state}: {job.message}"
    elif figures(job.result()) != wanted.figures:
        yield "lost: resumed, it has other figures"


def _unfinished(folder: Path) -> list[str]:
    """Return the fault of unfinished saved models, if any are left over."""
    left = [path.name for path in (folder / "models").iterdir() if path.name != "saved"]
    return [f"left unfinished models: {left}"] if left else []


# --- the app ----------------------------------------------------------------------------------


@contextmanager
def browser(folder: Path) -> Iterator[Callable[[str], None]]:
    """Yield a function that opens an address in Chromium, or by a plain request without it."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        yield lambda url: urllib.request.urlopen(url, timeout=PATIENCE_S).close()
        return
    from tests.browser.conftest import open_browser

    with open_browser(folder) as driver:
        driver.set_page_load_timeout(PATIENCE_S)
        yield driver.get


@contextmanager
def app(folder: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """Start the app and yield its process and address, without waiting until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["app", "--port", str(port), "--db", str(folder / "lsq.duckdb")]
    with (folder / "app.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lsq_core", *arguments], cwd=ROOT, stdout=log, stderr=log
        )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/_stcore/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _wait_for(url: str, process: subprocess.Popen) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        if _answers(url):
            return True
        time.sleep(0.1)
    return False


def kill_app(
    number: signal.Signals,
    visit: Callable[[str], None],
    wanted: Expected,
    whole: Path,
    folder: Path,
    rng: random.Random,
) -> tuple[list[str], str]:
    """Kill the app while it shows a page and a job runs, then restart it."""
    with own_place(whole, folder):
        before, wrong = read_rows(folder / "lsq.duckdb"), []
        page, moment = rng.choice(PAGES), rng.uniform(0, 8)
        with app(folder) as (process, url):
            if rng.random() < 0.8 and not _wait_for(url, process):
                wrong.append("the app did not start")
            arguments = command("run", folder, whole.parent / "text.txt")
            job = jobs.start(folder / "jobs", arguments)
            with suppress(Exception):  # the app may not be up yet
                visit(url + page)
            time.sleep(moment)
            process.send_signal(number)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                wrong.append("the app goes on")
            if _answers(url):
                wrong.append("something answers on the app's port")
        wrong += _faults_of_end(ended(job), wanted)
        with app(folder) as (process, url):  # cleans up, as every start does
            if not _wait_for(url, process):
                wrong.append("the app does not start again")
            process.send_signal(signal.SIGTERM)
            process.wait(30)
        wrong += faults_of_place(folder, before)
        log = (folder / "app.txt").read_text("utf8", "replace")
        if "Traceback" in log:
            wrong.append(f"traceback in the app's log: {log.strip().splitlines()[-1]}")
    return wrong, f"app: {number.name} after {moment:.1f} s at {page}"


# --- the campaign -----------------------------------------------------------------------------


def campaign(count: int, folder: Path, seed: int, log: Callable[[str], None]) -> Tally:
    """Return the tally of ``count`` cases."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background shell jobs ignore SIGINT
    tally, whole = Tally("kills of jobs and the app", count), fill_database(folder)
    wanted = {verb: expected(verb, whole, folder / "expected") for verb in COMMANDS}
    for verb, one in wanted.items():
        log(f"{verb} takes {one.seconds:.1f} s and has {len(one.figures)} figures")
    verbs = list(COMMANDS)
    with ExitStack() as stack:
        visit = stack.enter_context(browser(folder / "chromium")) if count >= 4 else None
        for case in range(count):
            rng, place = random.Random(f"{seed}-{case}"), folder / "place"
            if case % 4 == 3:
                number = SIGNALS[case // 4 % len(SIGNALS)]
                wrong, done = kill_app(number, visit, wanted["run"], whole, place, rng)
            else:
                verb = verbs[case % 4]
                wrong, done = kill_job(verb, wanted[verb], whole, place, rng)
            log(f"{case:4} {done}: {'; '.join(wrong) or 'whole'}")
            for fault in wrong:
                tally.add(fault, f"{case} {done}")
    return tally


if __name__ == "__main__":
    sys.exit(run_campaign(campaign, 40))
