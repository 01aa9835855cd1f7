"""Database files that are damaged, foreign, shared, read-only or on a full disk."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from lsq_core.cli import program
from lsq_core.cli.program import main
from lsq_core.errors import InputError, LsqError
from lsq_core.store import database
from lsq_core.store.repair import repair
from lsq_core.store.schema import MIGRATIONS
from lsq_core.store.store import Store
from tests.campaigns.damage_database import campaign
from tests.conftest import ROOT
from tests.helpers import mount_small_disk
from tests.test_compare import insert_synthetic_runs


@pytest.fixture(scope="module")
def populated(tmp_path_factory) -> Path:
    """A database with 12 runs; tests work on copies."""
    store = Store(tmp_path_factory.mktemp("filled") / "lsq.duckdb")
    insert_synthetic_runs(store, 12)
    return store.path


def add_wal(path: Path) -> Path:
    """Leave a write-ahead log with rows that are not yet in the database file; return the file."""
    code = (
        "import os, signal, sys\n"
        "from lsq_core.store.store import Store\n"
        "with Store(sys.argv[1]).connect() as connection:\n"
        "    for number in range(30):\n"
        "        values = [f'late{number}']\n"
        '        connection.execute("INSERT INTO runs (id) VALUES (?)", values)\n'
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
    assert database.wal_path(path).stat().st_size > 100
    return path


# --- damage ---------------------------------------------------------------------------------


def test_damaged_database_read_or_error(populated, tmp_path):
    found = campaign(populated, tmp_path, 20)
    assert found["damaged"] > 5
    assert sum(found.values()) == 20
    assert not set(found) - {"read", "damaged", "header", "empty", "newer", "foreign"}


def test_damaged_wal_read_or_error(populated, tmp_path):
    whole = add_wal(Path(shutil.copy(populated, tmp_path / "logged.duckdb")))
    found = campaign(whole, tmp_path, 10)
    assert found["log"]
    assert not set(found) - {"read", "damaged", "header", "empty", "log"}


def test_damaged_database_not_reported_as_locked(tmp_path):
    """DuckDB's error contains "block", and the path contains "lock"."""
    folder = tmp_path / "Could not set lock on file"
    folder.mkdir()
    path = folder / "locked.duckdb"
    Store(path)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(InputError, match=r"damaged .*'repair'"):
        Store(path)


@pytest.mark.parametrize("at", [20, 215], ids=["header", "entry"])
def test_store_opens_after_damaged_wal_removed(populated, tmp_path, at):
    path = add_wal(Path(shutil.copy(populated, tmp_path / "logged.duckdb")))
    log = database.wal_path(path)
    content = bytearray(log.read_bytes())
    content[at] ^= 1
    log.write_bytes(content)
    with pytest.raises(InputError, match=r"log .*\.wal is damaged: move it aside"):
        Store(path)
    log.rename(log.with_name("aside"))
    assert len(Store(path).results()) == 12


# --- foreign files --------------------------------------------------------------------------


def execute_sql(path: Path, *statements: str) -> Path:
    with duckdb.connect(str(path)) as connection:
        for statement in statements:
            connection.execute(statement)
    return path


@pytest.mark.parametrize(
    "statements",
    [
        ["DELETE FROM schema_version"],
        ["UPDATE schema_version SET version = -3"],
        ["UPDATE schema_version SET version = NULL"],
        ["DROP TABLE schema_version", "CREATE TABLE schema_version AS SELECT '4' AS version"],
        ["DROP TABLE schema_version", "CREATE TABLE schema_version (name VARCHAR)"],
        ["DROP TABLE schema_version", "CREATE VIEW schema_version AS SELECT 4 AS version"],
        ["DROP TABLE runs"],
        ["DROP TABLE runs", "CREATE TABLE runs (id INTEGER)"],
        ["ALTER TABLE plans DROP COLUMN content"],
        ["CREATE MACRO now() AS 'never'"],
        ["CREATE VIEW more AS SELECT 1"],
    ],
    ids=lambda statements: statements[-1],
)
def test_store_foreign_schema_raises(tmp_path, statements):
    path = execute_sql(Store(tmp_path / "foreign.duckdb").path, *statements)
    with pytest.raises(InputError, match="another program"):
        Store(path)


def test_store_old_schema_missing_table_raises(tmp_path):
    path = tmp_path / "old.duckdb"
    execute_sql(
        path,
        MIGRATIONS[0],
        "CREATE TABLE schema_version (version INTEGER)",
        "INSERT INTO schema_version VALUES (1)",
        "DROP TABLE runs",
    )
    with pytest.raises(InputError, match=r"table runs.*another program"):
        Store(path)


@pytest.mark.parametrize("kind", ["view", "macro"])
def test_cli_foreign_view_or_macro_reads_no_file(tmp_path, capsys, kind):
    """When ``runs`` was a view of another file, the results used to contain that file."""
    secret = tmp_path / "secret.txt"
    secret.write_text("verysecret", "utf8")
    path = Store(tmp_path / "foreign.duckdb").path
    if kind == "view":
        with duckdb.connect(str(path)) as connection:
            names = [row[0] for row in connection.execute("DESCRIBE runs").fetchall()]
        as_runs = ", ".join(
            f"(SELECT content FROM read_text('{secret}')) AS {name}" for name in names
        )
        execute_sql(path, "DROP TABLE runs", f"CREATE VIEW runs AS SELECT {as_runs}")
    else:
        execute_sql(path, f"CREATE MACRO max(x) AS (SELECT content FROM read_text('{secret}'))")
    status = program.main(["results", "--json", "--db", str(path)])
    printed = capsys.readouterr()
    assert status == 2
    assert "verysecret" not in printed.out + printed.err
    assert kind in printed.err


FORBIDDEN_SQL = [
    "SELECT * FROM read_text('{secret}')",
    "SELECT * FROM '{secret}'",
    "COPY runs TO '{out}'",
    "ATTACH '{out}' AS other",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "SET autoload_known_extensions = true",
    "SET lock_configuration = false",
]


@pytest.mark.parametrize("text", FORBIDDEN_SQL)
def test_connection_external_access_blocked(tmp_path, text):
    secret, out = tmp_path / "secret.csv", tmp_path / "out"
    secret.write_text("a\nverysecret\n", "utf8")
    text = text.format(secret=secret, out=out)
    with pytest.raises(duckdb.Error), Store().connect() as connection:
        connection.execute(text)
    with pytest.raises(duckdb.Error), database.connect_in_memory() as connection:
        connection.execute(text)
    assert not out.exists()


def test_only_database_module_calls_duckdb_connect():
    """Connections get their settings in one module; the SQL child process has its own."""
    own = {"database.py", "sql_child.py"}
    for path in (ROOT / "lsq_core").rglob("*.py"):
        if path.name not in own:
            assert "duckdb.connect(" not in path.read_text("utf8"), path


# --- sharing, disks, permissions ------------------------------------------------------------


def test_store_concurrent_creation(tmp_path):
    code = (
        "import sys\nfrom lsq_core.store.store import Store\n"
        "print(len(Store(sys.argv[1]).models()))"
    )
    path = tmp_path / "new.duckdb"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(6)
    ]
    outputs = [maker.communicate() for maker in processes]
    assert [out for out, _ in outputs] == ["0\n"] * 6, outputs
    assert os.listdir(tmp_path) == ["new.duckdb"]


@pytest.fixture
def small_disk(tmp_path):
    """A 256 KiB file system; tests are skipped if it cannot be mounted."""
    with mount_small_disk(tmp_path / "small", "256k") as folder:
        yield folder


def test_store_full_disk_leaves_no_file(small_disk):
    with pytest.raises(LsqError, match="disk is full"):
        Store(small_disk / "lsq.duckdb")
    assert os.listdir(small_disk) == []


def test_store_read_only_database(populated, tmp_path):
    folder = tmp_path / "kept"
    folder.mkdir()
    path = add_wal(Path(shutil.copy(populated, folder / "lsq.duckdb")))
    if subprocess.run(["mount", "--bind", "-o", "ro", folder, folder], check=False).returncode:
        pytest.skip("mounting a folder read-only needs root")
    try:
        store = Store(path)
        assert len(store.results()) == 12
        assert store.query("SELECT count(*) AS n FROM runs")["n"][0] == 42, "with its log"
        with pytest.raises(LsqError, match="read-only"):
            store.star("late1", True)
        store.snapshot(tmp_path / "snapshot.duckdb")
        with pytest.raises(InputError, match=r"[Rr]ead-only"):
            Store(folder / "new.duckdb")
    finally:
        subprocess.run(["umount", folder], check=True)


def test_store_empty_file_raises(tmp_path):
    path = tmp_path / "lsq.duckdb"
    path.touch()
    with pytest.raises(InputError, match="is empty"):
        Store(path)


def test_store_missing_database_with_wal_raises(populated, tmp_path):
    path = add_wal(Path(shutil.copy(populated, tmp_path / "lsq.duckdb")))
    path.unlink()
    with pytest.raises(InputError, match="its log"):
        Store(path)


def test_results_imports_pandas_before_connecting(populated):
    code = (
        "import sys\nfrom lsq_core.store import database, store\nopen = database.connect\n"
        "def connect(*given):\n"
        "    seen.append('pandas' in sys.modules)\n"
        "    return open(*given)\n"
        "database.connect, seen = connect, []\n"
        "kept = store.Store(sys.argv[1])\nseen.clear()\nkept.results()\nprint(seen)"
    )
    command = [sys.executable, "-c", code, str(populated)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout == "[True]\n"


def test_connection_progress_bar_disabled(populated):
    """DuckDB shows a progress bar by default if there is no script file, as with ``python -c``."""
    code = (
        "import sys\nfrom lsq_core.store.store import Store\n"
        "with Store(sys.argv[1]).connect() as connection:\n"
        "    asked = \"SELECT current_setting('enable_progress_bar')\"\n"
        "    print(connection.execute(asked).fetchall())"
    )
    command = [sys.executable, "-c", code, str(populated)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout == "[(False,)]\n"


# --- repair ---------------------------------------------------------------------------------


def row_counts(path: Path) -> dict[str, int]:
    tables = ("models", "matrices", "plans", "runs", "evaluations", "scores")
    store = Store(path)
    return {t: int(store.query(f"SELECT count(*) AS n FROM {t}")["n"][0]) for t in tables}


def test_repair_intact_database_copies_all_rows(populated, tmp_path):
    copied = repair(populated, tmp_path / "new.duckdb")
    assert row_counts(tmp_path / "new.duckdb") == row_counts(populated)
    assert sum(table.lost for table in copied) == 0
    assert Store(tmp_path / "new.duckdb").results().equals(Store(populated).results())


def test_repair_damaged_database_skips_unreadable_rows(populated, tmp_path, capsys):
    """One flipped bit loses rows of the damaged block only, and the lost rows are counted."""
    source, whole = random.Random(2), row_counts(populated)
    path, partial = tmp_path / "damaged.duckdb", 0
    for _ in range(8):
        content = bytearray(populated.read_bytes())
        content[source.randrange(12288, len(content))] ^= 1
        path.write_bytes(content)
        out = tmp_path / "new.duckdb"
        out.unlink(missing_ok=True)
        status = program.main(["repair", str(path), "--out", str(out), "--json"])
        printed = capsys.readouterr()
        assert path.read_bytes() == content, "the damaged file stays as it is"
        if status:
            assert printed.err.count("\n") == 1
            assert not out.exists()
            continue
        tables = {row["table"]: row for row in json.loads(printed.out)["tables"]}
        for name, number in row_counts(out).items():
            assert number == tables[name]["copied"] <= whole[name]
            assert number + tables[name]["lost"] == whole[name]
        partial += any(row["lost"] for row in tables.values())
    assert partial, "one of them lost rows of a table and kept the rest"


def test_repair_existing_output_raises(populated, tmp_path):
    out = tmp_path / "there"
    out.touch()
    with pytest.raises(InputError, match="already exists"):
        repair(populated, out)
    with pytest.raises(InputError, match="not a file"):
        repair(tmp_path / "none", tmp_path / "new")


def test_store_concurrent_threads_no_lock_error(tmp_path):
    """DuckDB may report a file as in use if another thread is just closing it."""
    import threading

    path, failed = tmp_path / "lsq.duckdb", []
    Store(path)

    def use() -> None:
        try:
            for _ in range(40):
                with Store(path).transaction() as connection:
                    connection.execute("UPDATE schema_version SET version = version WHERE false")
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.parametrize(
    "name", ["x" * 300, "~no-such-person/x", "loop/x.duckdb", "\udcff", "pipe"]
)
def test_a_path_that_no_database_can_have_is_bad_input(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    for arguments in (["results", "--db", name], ["repair", name]):
        assert main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
