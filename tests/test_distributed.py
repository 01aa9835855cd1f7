"""Sweeps on a real local Ray cluster match sweeps without Ray, even if actors or nodes die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from lsq_core import jobs, sweep
from lsq_core.cli.program import main
from lsq_core.distributed import cluster, status
from lsq_core.distributed.executor import RayExecutor
from lsq_core.distributed.pool import MAX_MOVES
from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.files import DamagedFileError
from lsq_core.jobs import arguments
from lsq_core.jobs.folder import process_id
from lsq_core.model.source import ModelSource
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.session import Session
from lsq_core.store.store import Store
from lsq_core.ui.run import actors
from tests import failing_actors
from tests.conftest import ROOT
from tests.helpers import find_free_port, wait_for

needs_ray = pytest.mark.skipif(bool(cluster.unavailable_reason()), reason="'make ray' adds Ray")
#: Fields that differ between two measurements of the same plan.
_NO_FIGURES = ("run", "quantize_seconds", "shipped")


@pytest.fixture
def settings(small_text) -> ProfileSettings:
    return ProfileSettings("rtn", calibration=str(small_text), samples=4, block_tokens=64)


@pytest.fixture
def source(random_model) -> ModelSource:
    return ModelSource(str(random_model("llama-gqa")))


def new_session(source: ModelSource, folder: Path, **changes: object) -> Session:
    folder.mkdir(exist_ok=True)
    return Session(source, Store(folder / "lsq.duckdb"), "cpu", **changes)


def requested(*texts, budgets=("2.6bpp", "3.1bpp", "3.6bpp")) -> list[sweep.SweepItem]:
    plans = sweep.requests(PlanRequest("uniform"), ("uniform", "mxq"), (), budgets)
    return sweep.items(plans, ["rtn"], [EvaluationRequest(str(t), max_tokens=300) for t in texts])


def on_ray(settings: ProfileSettings, evaluator: str = "", cores: int = 1) -> RayExecutor:
    own = {"kind": getattr(failing_actors, evaluator)} if evaluator else {}
    return RayExecutor(cluster.LOCAL, settings, ["rtn"], cores, **own)


def figures(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in _NO_FIGURES} for row in rows]


def evaluations(store: Store) -> list[tuple]:
    """Return all stored evaluations with their method and plan size, sorted."""
    rows = store.query(
        "SELECT r.method, p.bits_per_param, e.corpus, e.perplexity, e.kl FROM evaluations e "
        "JOIN runs r ON e.run = r.id JOIN plans p ON r.plan = p.id"
    )
    return sorted(rows.itertuples(index=False, name=None))


# --- options ----------------------------------------------------------------------------------


@needs_ray
@pytest.mark.parametrize(
    "address", ["ray://host:10001", "host", "a b:1", "host:1;rm", "http://x:1"]
)
def test_address_of_no_cluster_is_bad_input(settings, address):
    with pytest.raises(InputError, match="HOST:PORT"):
        RayExecutor(address, settings, ["rtn"])


def test_missing_ray_is_said_before_any_work(settings, monkeypatch):
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="make ray"):
        RayExecutor(cluster.LOCAL, settings, ["rtn"])


@needs_ray
@pytest.mark.parametrize(
    "options",
    [
        ("--ray", "--actor-cores", "0"),
        ("--ray", "--actor-cores", "100000"),
        ("--ray", "--device", "cuda:1"),
        ("--actor-cores", "2"),
        ("--actors", "2"),
        ("--ray", "--actors", "0"),
        ("--ray", "nowhere"),
    ],
)
def test_bad_options_exit_2(options, small_text, capsys):
    argv = ["sweep", "--model", "demo", "--method", "uniform", "--budget", "3.2bpp"]
    argv += ["--quantizer", "rtn", "--corpus", str(small_text), "--max-tokens", "300", *options]
    assert main(argv) == 2
    assert capsys.readouterr().err.count("lsq: ") == 1


def test_arguments_of_ray():
    assert arguments.ray_arguments(None, 2) == []
    assert arguments.ray_arguments("local") == ["--ray", "local"]
    assert arguments.ray_arguments("h:1", 2) == ["--ray", "h:1", "--actor-cores", "2"]


def test_actor_rows_survive_a_round_trip_and_damage_is_seen(tmp_path):
    assert status.read_actors(tmp_path) == []
    rows = [status.ActorRow(1, "a", "CPU", "working", "x", "evaluate", 0.5, 3)]
    status.write_actors(tmp_path, rows)
    assert status.read_actors(tmp_path) == rows
    for damage in ('{"actors": [{}]}', '{"actors": 3}', '{"actors": [1]}', "{"):
        (tmp_path / status.ACTORS_FILE).write_text(damage)
        with pytest.raises(DamagedFileError):
            status.read_actors(tmp_path)


def test_actors_for_a_person_to_read():
    rows = [
        status.ActorRow(1, "a", "CPU", "lost", measured=2),
        status.ActorRow(2, "a", "CPU", "working", "mxq on x", "evaluate", 0.5, 3),
        status.ActorRow(3, "b", "GPU 1", "idle", measured=4),
        status.ActorRow(4, "", "", "starting"),
    ]
    shown = actors.table(rows)
    assert shown["actor"].tolist() == [2, 3, 4, 1], "those that are gone come last"
    assert shown["done"].iloc[0] == 0.5
    assert shown["done"].isna().tolist() == [False, True, True, True]
    assert "a 5, b 4" in actors.describe(rows)
    assert "1 actor died" in actors.describe(rows)


# --- on a local cluster -----------------------------------------------------------------------


@needs_ray
@pytest.mark.slow
def test_local_cluster_listens_on_loopback_alone_and_leaves_nothing(monkeypatch, tmp_path):
    """Starts a cluster."""
    monkeypatch.setenv("HOME", str(tmp_path))
    handler = signal.getsignal(signal.SIGTERM)
    before = set(psutil.Process().children(recursive=True))  # started by other tests
    with cluster.connection(cluster.LOCAL, 1, 0):
        assert [node.address for node in cluster.nodes()] == ["127.0.0.1"]
        family = set(psutil.Process().children(recursive=True)) - before
        assert any(process.name() == "raylet" for process in family)
        listening = {
            connection.laddr.ip
            for process in family
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
        assert signal.getsignal(signal.SIGTERM) is handler
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    wait_for(lambda: not any(process.is_running() for process in family), 150)
    assert list(tmp_path.iterdir()) == [], "a token was written"


@needs_ray
@pytest.mark.slow
def test_sweep_on_ray_has_the_digits_of_one_without(
    source, settings, small_text, other_text, tmp_path
):
    """Starts a cluster whose actors import torch."""
    items = requested(small_text, other_text)
    plain, job_folder = new_session(source, tmp_path / "plain"), tmp_path / "job"
    job_folder.mkdir()
    rows = sweep.sweep(plain, items, settings)
    reports = []
    there = new_session(source, tmp_path / "ray", checkpoint_folder=job_folder)
    there.report = lambda *report: reports.append(report)
    found = sweep.sweep(there, items, settings, on_ray(settings))
    assert figures(found) == figures(rows)
    assert evaluations(there.store) == evaluations(plain.store)
    profiled = [message for stage, *_, message in reports if stage == "profile"]
    assert any("actors working" in message for message in profiled), "the profile is theirs too"
    assert not any(stage == "load" and "loaded on" in text for stage, *_, text in reports)
    assert [row["state"] for row in found].count("found") == 2, "two budgets give one uniform plan"
    assert len(there.store.query("SELECT id FROM runs")) == len(items) / 2 - 1
    rows = status.read_actors(job_folder)
    assert len(rows) == len(os.sched_getaffinity(0))
    assert sum(row.measured for row in rows) == len(items) - 2
    assert os.environ.get("RAY_AUTH_TOKEN") is None
    again = sweep.sweep(there, items, settings, on_ray(settings))
    assert {row["state"] for row in again} == {"found"}


@needs_ray
@pytest.mark.slow
def test_task_of_killed_actor_is_done_by_another(source, settings, small_text, tmp_path):
    """Starts a cluster, and one of its actors twice."""
    items = requested(small_text)
    rows = sweep.sweep(new_session(source, tmp_path / "plain"), items, settings)
    there = new_session(source, tmp_path / "ray")
    found = sweep.sweep(there, items, settings, on_ray(settings, "KilledOnce"))
    assert (tmp_path / "ray" / "killed").exists()
    assert figures(found) == figures(rows)
    assert len(evaluations(there.store)) == len(items) - 1, "two budgets give one uniform plan"


@needs_ray
@pytest.mark.slow
def test_plan_that_kills_its_actors_fails_alone(source, settings, small_text, tmp_path):
    """Starts a cluster, and an actor again each time the plan kills one."""
    there = new_session(source, tmp_path / "ray")
    items = requested(small_text, budgets=("2.6bpp", "3.6bpp"))
    found = sweep.sweep(there, items, settings, on_ray(settings, "KilledByPlan"))
    assert [row["state"] for row in found] == ["done", "done", "failed", "done"]
    killed = (tmp_path / "ray" / "killed").read_text().split()
    assert len(killed) == MAX_MOVES + 1
    assert killed[-1] == "1"
    assert f"died {MAX_MOVES + 1} times" in found[2]["reason"]


@needs_ray
@pytest.mark.slow
def test_groups_shrink_where_memory_lacks(source, settings, small_text, tmp_path):
    """Starts a cluster."""
    items = requested(small_text)
    there = new_session(source, tmp_path / "ray")
    cores = len(os.sched_getaffinity(0))
    found = sweep.sweep(there, items, settings, on_ray(settings, "OnePlanAtATime", cores))
    assert {row["state"] for row in found} == {"done", "found"}
    sizes = [int(size) for size in (tmp_path / "ray" / "sizes").read_text().split()]
    assert sizes[0] > 1
    assert sizes.count(1) == len(items) - 1, "two budgets give one uniform plan"
    with pytest.raises(LsqError, match="ran out of memory"):
        sweep.sweep(
            new_session(source, tmp_path / "none"),
            items[:2],
            settings,
            on_ray(settings, "NoMemory", cores),
        )


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("evaluator", "kind", "named"),
    [
        ("OlderTorch", InputError, r"node-b has torch 2\.0\.0"),
        ("OtherModel", InputError, "node-b is not the driver's model"),
        ("NoPackage", LsqError, "No module named 'lsq_core'"),
    ],
)
def test_node_that_differs_is_refused_by_name(
    source, settings, small_text, tmp_path, evaluator, kind, named
):
    """Starts a cluster."""
    there = new_session(source, tmp_path / "ray")
    items = requested(small_text, budgets=("3.6bpp",))
    with pytest.raises(kind, match=named):
        sweep.sweep(there, items, settings, on_ray(settings, evaluator))
    assert evaluations(there.store) == []


# --- a cluster of two nodes ---------------------------------------------------------------------


def start_node(stack: ExitStack, *options: str) -> subprocess.Popen:
    """Start a node; closing the stack kills it and its child processes."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1"]
    command += ["--node-ip-address", "127.0.0.1", "--disable-usage-stats", *options]
    command += ["--include-dashboard", "false"] if "--head" in options else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    stack.callback(end_node, process)
    return process


def end_node(process: subprocess.Popen) -> None:
    """Kill a node and its child processes."""
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in family:
            with suppress(psutil.NoSuchProcess):
                child.kill()
    process.wait()


@needs_ray
@pytest.mark.slow
def test_sweep_on_a_cluster_of_two_nodes_survives_one(
    source, settings, small_text, other_text, tmp_path, monkeypatch
):
    """Starts two nodes, and kills one once every actor has measured something."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    address, items = f"127.0.0.1:{find_free_port()}", requested(small_text, other_text)
    rows = sweep.sweep(new_session(source, tmp_path / "plain"), items, settings)
    job_folder = tmp_path / "job"
    job_folder.mkdir()
    with ExitStack() as stack:
        start_node(stack, "--head", "--port", address.rpartition(":")[2])
        wait_for_nodes(address, 1)
        second = start_node(stack, "--address", address)
        there = new_session(source, tmp_path / "ray", checkpoint_folder=job_folder)

        def report(stage: str, done: int, total: int, message: str) -> None:
            measured = [row.measured for row in status.read_actors(job_folder)]
            if len(measured) > 1 and min(measured) > 0:
                end_node(second)

        there.report = report
        executor = RayExecutor(address, settings, ["rtn"], 1)
        wait_for_nodes(address, 2)
        found = sweep.sweep(there, items, settings, executor)
    assert figures(found) == figures(rows)


def wait_for_nodes(address: str, count: int) -> None:
    """Wait until a cluster has at least ``count`` live nodes."""
    script = (
        "import ray, sys, time\n"
        "while True:\n"
        "    try:\n"
        f"        ray.init(address={address!r}, log_to_driver=False)\n"
        "        break\n"
        "    except ConnectionError:\n"
        "        time.sleep(0.2)\n"
        f"while sum(node['Alive'] for node in ray.nodes()) < {count}:\n"
        "    time.sleep(0.2)\n"
    )
    subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=400, check=True)


# --- jobs ---------------------------------------------------------------------------------------


def start_job(source: ModelSource, folder: Path, text: Path) -> jobs.Job:
    argv = ["sweep", "--model", source.name, "--device", "cpu", "--quantizer", "rtn"]
    argv += ["--method", "uniform", "--budget", "2.6bpp", "--budget", "3.6bpp"]
    argv += ["--corpus", str(text), "--max-tokens", "300", "--db", str(folder / "lsq.duckdb")]
    return jobs.start(folder / "jobs", [*argv, *arguments.ray_arguments("local", 1)])


def actors_started(job: jobs.Job) -> bool:
    """Return whether the active job has requested actors, whose imports take seconds."""
    assert jobs.read(job.folder).active, jobs.read(job.folder).message
    return bool(status.read_actors(job.folder))


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("way", ["cancel", "kill"])
def test_job_on_ray_ends_with_its_processes_and_goes_on(source, small_text, tmp_path, way):
    """Starts a cluster twice."""
    Store(tmp_path / "lsq.duckdb")
    job = start_job(source, tmp_path, small_text)
    wait_for(lambda: actors_started(job), 300)
    family = psutil.Process(process_id(job.folder)).children(recursive=True)
    assert any("ray" in process.name() for process in family)
    began = time.monotonic()
    if way == "cancel":
        assert jobs.cancel(job).state == "cancelled"
        assert time.monotonic() - began < 5
    else:
        os.kill(process_id(job.folder), signal.SIGKILL)
        wait_for(lambda: jobs.read(job.folder).state == "interrupted")
    wait_for(lambda: not any(process.is_running() for process in family), 150)
    job = jobs.resume(jobs.read(job.folder))
    wait_for(lambda: not jobs.read(job.folder).active, 300)
    job = jobs.read(job.folder)
    assert job.state == "done", job.message
    assert {row["state"] for row in job.result()["items"]} <= {"done", "found"}
    assert len(evaluations(Store(tmp_path / "lsq.duckdb"))) == 2
