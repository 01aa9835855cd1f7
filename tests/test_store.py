"""The database: storage, sharing between processes, and rejected foreign or newer files."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import duckdb
import numpy as np
import pytest

from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation.result import Evaluation
from lsq_core.model.loading import inspect_model
from lsq_core.model.source import ModelSource
from lsq_core.planning.make import make_plan
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.store import connection as store_module
from lsq_core.store.schema import MIGRATIONS
from lsq_core.store.store import Store
from tests.helpers import mount_small_disk


@pytest.fixture
def info():
    return inspect_model(ModelSource("demo"))


def evaluation(perplexity: float, corpus: str = "c", protocol: str = "strided") -> Evaluation:
    return Evaluation(
        protocol=protocol,
        nll=np.full(4, 10 * np.log(perplexity)),
        counts=np.full(4, 10),
        seconds=2.0,
        kl=0.5,
        top1=0.25,
        corpus=corpus,
        corpus_sha256=f"hash of {corpus}",
        corpus_source="somewhere",
        provenance={"device": "cpu", "dtype": "float32"},
    )


def save_test_run(store: Store, info, perplexity: float = 20.0, **more) -> str:
    plan = make_plan(Problem(info.matrices), PlanRequest("uniform", base="3.13"))
    run = store_module.new_id()
    row = {
        "plan": store.save_plan(plan, info.fingerprint, None),
        "fingerprint": info.fingerprint,
        "method": "uniform",
        "quantizer": "hqq",
        "measured_bytes": plan.planned_bytes,
        "model_bytes": plan.model_bytes,
        "quantize_seconds": 1.0,
        "saved_to": None,
        "device": "cpu",
        "machine": "m",
        "dtype": "float32",
        "seed": 0,
        "versions": "{}",
    }
    store.save_run(run, row, [evaluation(perplexity, **more)])
    return run


def test_save_model_round_trip(info):
    store = Store()
    store.save_model(info)
    store.save_model(info)
    assert store.model(info.fingerprint) == info
    assert len(store.models()) == 1
    assert store.model("unknown") is None


def test_profile_contents_of_an_empty_store():
    contents = Store().profile_contents()
    assert contents.empty
    assert {"id", "model", "metric", "config"} <= set(contents.columns)


def test_results_paired_with_full_precision(info):
    store = Store()
    store.save_model(info)
    store.save_full_precision(info.fingerprint, evaluation(10))
    store.save_full_precision(info.fingerprint, evaluation(10))
    store.save_full_precision(info.fingerprint, evaluation(15, protocol="blocks"))
    run = save_test_run(store, info)
    save_test_run(store, info, corpus="other")
    rows = Store().results().set_index("corpus")
    assert rows.loc["c", "run"] == run
    assert rows.loc["c", "perplexity"] == pytest.approx(20)
    assert rows.loc["c", "perplexity_full"] == pytest.approx(10)
    assert rows.loc["c", "increase"] == pytest.approx(1)
    assert rows.loc["c", "base"] == "3.13"
    assert np.isnan(rows.loc["other", "perplexity_full"]), "never of another corpus"
    kept = store.query("SELECT count(*) AS n FROM evaluations WHERE run IS NULL")
    assert kept["n"][0] == 2
    nll, counts = store.windows(rows.loc["c", "evaluation"])
    assert nll == pytest.approx(np.full(4, 10 * np.log(20)))
    assert counts.tolist() == [10] * 4
    with pytest.raises(InputError, match="no evaluation 'x'"):
        store.windows("x")


def test_save_run_failure_rolls_back(info):
    store = Store()
    store.save_model(info)
    with pytest.raises(duckdb.Error):
        store.save_run("r", {"no_such_column": 1, "fingerprint": "f"}, [])
    broken = evaluation(10)
    object.__setattr__(broken, "corpus", object())
    with pytest.raises(duckdb.Error):
        store.save_run("r", {"fingerprint": info.fingerprint}, [broken])
    assert store.query("SELECT count(*) n FROM runs")["n"][0] == 0


def test_store_foreign_database_raises(tmp_path):
    path = tmp_path / "other.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE theirs (x INTEGER)")
    with pytest.raises(InputError, match="another program"):
        Store(path)
    with duckdb.connect(str(path)) as connection:
        assert connection.execute("SHOW TABLES").fetchall() == [("theirs",)]


def test_store_invalid_file_or_folder_raises(tmp_path):
    path = tmp_path / "text.duckdb"
    path.write_text("not a database, and long enough to be looked at " * 200)
    with pytest.raises(InputError, match="DuckDB database"):
        Store(path)
    with pytest.raises(InputError, match="is a folder"):
        Store(tmp_path)


def test_store_newer_schema_raises(tmp_path):
    path = tmp_path / "new.duckdb"
    Store(path)
    with duckdb.connect(str(path)) as connection:
        connection.execute("INSERT INTO schema_version VALUES (999)")
    with pytest.raises(InputError, match="newer LSQ Explorer"):
        Store(path)


def test_store_migrates_older_schema(tmp_path, monkeypatch, info):
    path = tmp_path / "old.duckdb"
    Store(path).save_model(info)
    added = [*MIGRATIONS, "ALTER TABLE models ADD COLUMN starred BOOLEAN DEFAULT false"]
    monkeypatch.setattr(store_module, "MIGRATIONS", added)
    models = Store(path).models()
    assert models["starred"].tolist() == [False]
    assert models["source"].tolist() == ["demo"]


def test_store_migrates_schema_2_runs(tmp_path, monkeypatch, info):
    path = tmp_path / "old.duckdb"
    monkeypatch.setattr(store_module, "MIGRATIONS", MIGRATIONS[:2])
    old = Store(path)
    with old.connect() as connection:
        connection.execute("INSERT INTO runs (id, fingerprint, method) VALUES ('r', 'f', 'mxq')")
        connection.execute("INSERT INTO evaluations (id, run, fingerprint) VALUES ('e', 'r', 'f')")
    monkeypatch.undo()
    row = Store(path).results().iloc[0]
    assert (row["run"], bool(row["starred"]), row["note"]) == ("r", False, "")
    assert Store(path).deleted_runs().empty


def test_add_evaluation_restores_deleted_run(info):
    store = Store()
    store.save_model(info)
    run = save_test_run(store, info)
    store.delete_runs([run])
    assert store.results().empty
    assert store.run_configs(info.fingerprint) == {}
    assert store.deleted_runs()["run"].tolist() == [run]
    manifest = {"run": run, "fingerprint": info.fingerprint}
    store.add_evaluation(manifest, 1, "somewhere", evaluation(21, corpus="other"))
    assert sorted(store.results()["perplexity"]) == pytest.approx([20, 21])
    assert store.deleted_runs().empty


def test_deleted_runs_share_timestamp_per_deletion(info):
    store = Store()
    store.save_model(info)
    runs = [save_test_run(store, info) for _ in range(3)]
    store.delete_runs(runs[:1])
    store.delete_runs(runs)
    deleted_rows = store.deleted_runs()
    assert deleted_rows["deleted"].nunique() == 2
    assert set(
        deleted_rows[deleted_rows["deleted"] == deleted_rows["deleted"].iloc[0]]["run"]
    ) == set(runs[1:])


def test_record_contains_run_plan_and_model(info):
    store = Store()
    store.save_model(info)
    run = save_test_run(store, info)
    (evaluation_id,) = store.results()["evaluation"]
    record = store.record(evaluation_id)
    assert record["run"]["id"] == run
    assert record["plan"]["content"]["base"] == "3.13"
    assert record["evaluation"]["provenance"]["dtype"] == "float32"
    assert record["model"]["source"] == "demo"
    assert record["profile"] == {}
    with pytest.raises(InputError, match="'x'"):
        store.record("x")


def test_store_failed_migration_rolls_back(tmp_path, monkeypatch):
    path = tmp_path / "old.duckdb"
    Store(path)
    bad = [*MIGRATIONS, "CREATE TABLE half (x INTEGER); SELECT no_such_function()"]
    monkeypatch.setattr(store_module, "MIGRATIONS", bad)
    with pytest.raises(duckdb.Error):
        Store(path)
    monkeypatch.undo()
    tables = Store(path).query("SHOW TABLES")["name"].tolist()
    assert "half" not in tables


HOLD_SCRIPT = """
import duckdb, sys
connection = duckdb.connect(sys.argv[1])
print("held", flush=True)
sys.stdin.readline()
"""


def test_store_waits_for_locked_file(tmp_path, monkeypatch):
    path = tmp_path / "shared.duckdb"
    Store(path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_SCRIPT, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        monkeypatch.setattr(store_module, "LOCK_TIMEOUT_S", 0.2)
        with pytest.raises(LsqError, match=rf"in use .*\(process {holder.pid}\)"):
            Store(path)
        monkeypatch.setattr(store_module, "LOCK_TIMEOUT_S", 30)
        opened = threading.Thread(target=Store, args=[path])
        opened.start()
        holder.communicate(b"\n")
        opened.join(30)
        assert not opened.is_alive()
    finally:
        holder.kill()


COUNT_SCRIPT = """
import sys
from lsq_core.store import connection, store
connection.LOCK_TIMEOUT_S = 0.1
print(len(store.Store(sys.argv[1]).models()))
"""


def test_held_store_blocks_other_processes(tmp_path, info):
    store = Store(tmp_path / "shared.duckdb")
    command = [sys.executable, "-c", COUNT_SCRIPT, str(store.path)]
    with store.held():
        store.save_model(info)
        assert store.model(info.fingerprint) == info
        early = subprocess.run(command, capture_output=True, text=True, check=False)
    late = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "in use" in early.stderr
    assert late.stdout == "1\n"


WRITE_SCRIPT = """
import sys
from lsq_core.store.store import Store
from lsq_core.store.connection import new_id
store = Store(sys.argv[1])
for i in range(20):
    with store.transaction() as connection:
        connection.execute("INSERT INTO runs (id, method) VALUES (?, ?)", [new_id(), sys.argv[2]])
"""


def test_store_concurrent_writers(tmp_path):
    path = tmp_path / "shared.duckdb"
    Store(path)
    writers = [subprocess.Popen([sys.executable, "-c", WRITE_SCRIPT, str(path), n]) for n in "ab"]
    counts = []
    while any(w.poll() is None for w in writers):
        counts.append(Store(path).query("SELECT count(*) n FROM runs")["n"][0])
    assert [w.returncode for w in writers] == [0, 0]
    assert counts == sorted(counts)
    rows = Store(path).query("SELECT method, count(*) n FROM runs GROUP BY ALL ORDER BY method")
    assert rows["n"].tolist() == [20, 20]


KILL_SCRIPT = """
import os, signal, sys
from lsq_core.store.store import Store
from lsq_core.store.connection import new_id
store = Store(sys.argv[1])
with store.transaction() as connection:
    connection.execute("INSERT INTO runs (id, method) VALUES (?, 'kept')", [new_id()])
with store.transaction() as connection:
    connection.execute("INSERT INTO runs (id, method) VALUES (?, 'torn')", [new_id()])
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_store_readable_after_killed_writer(tmp_path):
    path = tmp_path / "shared.duckdb"
    for round in range(3):
        killed = subprocess.run([sys.executable, "-c", KILL_SCRIPT, str(path)], check=False)
        assert killed.returncode == -9
        rows = Store(path).query("SELECT method FROM runs")
        assert rows["method"].tolist() == ["kept"] * (round + 1)


def test_store_concurrent_reads(info):
    """Like sessions of the app, each thread opens and closes the file while others use it."""
    store = Store()
    store.save_model(info)

    def read_model(_: int) -> list:
        return [store.model(info.fingerprint) for _ in range(25)]

    with ThreadPoolExecutor(8) as pool:
        models_read = [known for looked in pool.map(read_model, range(8)) for known in looked]
    assert len(models_read) == 200
    assert all(known == info for known in models_read)


def test_store_parameters_are_not_interpolated(info):
    store = Store()
    store.save_model(info)
    sql_injection = "'; DROP TABLE runs; --"
    assert store.results(sql_injection).empty
    assert store.model(sql_injection) is None
    assert store.query("SELECT count(*) n FROM runs")["n"][0] == 0


def test_store_full_disk_raises_and_keeps_data(tmp_path, info):
    """Uses a real 2 MiB file system; needs permission to mount it."""
    with mount_small_disk(tmp_path / "small", "2m") as small_disk:
        store = Store(small_disk / "lsq.duckdb")
        store.save_model(info)
        large_evaluation = evaluation(10)
        object.__setattr__(large_evaluation, "nll", np.random.default_rng(0).random(20_000))
        kept = 0

        def fill_the_disk() -> None:
            nonlocal kept
            for kept in range(100):
                store.save_run(f"run {kept}", {"fingerprint": info.fingerprint}, [large_evaluation])

        with pytest.raises(LsqError, match="disk is full"):
            fill_the_disk()
        assert kept > 0
        reopened = Store(small_disk / "lsq.duckdb")
        assert reopened.query("SELECT count(*) n FROM runs")["n"][0] == kept
        assert reopened.query("SELECT count(*) n FROM evaluations")["n"][0] == kept
        assert reopened.model(info.fingerprint) == info
