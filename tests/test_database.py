"""Database files that are damaged, foreign, shared, full or read-only: a sentence each, or rows."""

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

from lsq_core import cli, database
from lsq_core.cli import main
from lsq_core.errors import InputError, LsqError
from lsq_core.repair import repair
from lsq_core.store import MIGRATIONS, Store
from tests.campaigns.damage_database import campaign
from tests.conftest import ROOT
from tests.test_compare import fill


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """A database with runs; tests work on copies."""
    store = Store(tmp_path_factory.mktemp("filled") / "lsq.duckdb")
    fill(store, 12)
    return store.path


def with_log(path: Path) -> Path:
    """A database with a log that was not written into it yet."""
    code = (
        "import os, signal, sys\n"
        "from lsq_core.store import Store\n"
        "with Store(sys.argv[1]).connect() as connection:\n"
        "    for number in range(30):\n"
        "        values = [f'late{number}']\n"
        '        connection.execute("INSERT INTO runs (id) VALUES (?)", values)\n'
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
    assert database.log_of(path).stat().st_size > 100
    return path


# --- damage ---------------------------------------------------------------------------------


def test_a_damaged_database_is_read_or_told(filled, tmp_path):
    found = campaign(filled, tmp_path, 20)
    assert found["damaged"] > 5
    assert sum(found.values()) == 20
    assert not set(found) - {"read", "damaged", "header", "empty", "newer", "foreign"}


def test_a_database_with_a_damaged_log_is_read_or_told(filled, tmp_path):
    whole = with_log(Path(shutil.copy(filled, tmp_path / "logged.duckdb")))
    found = campaign(whole, tmp_path, 10)
    assert found["log"]
    assert not set(found) - {"read", "damaged", "header", "empty", "log"}


def test_damage_in_a_folder_of_any_name_is_no_lock(tmp_path):
    """The error says "block", and the path says "lock"."""
    folder = tmp_path / "Could not set lock on file"
    folder.mkdir()
    path = folder / "locked.duckdb"
    Store(path)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(InputError, match=r"damaged .*'repair'"):
        Store(path)


@pytest.mark.parametrize("at", [20, 215], ids=["header", "entry"])
def test_a_damaged_log_moved_aside_opens_what_was_there(filled, tmp_path, at):
    path = with_log(Path(shutil.copy(filled, tmp_path / "logged.duckdb")))
    log = database.log_of(path)
    content = bytearray(log.read_bytes())
    content[at] ^= 1
    log.write_bytes(content)
    with pytest.raises(InputError, match=r"log .*\.wal is damaged: move it aside"):
        Store(path)
    log.rename(log.with_name("aside"))
    assert len(Store(path).results()) == 12


# --- strangers' files -----------------------------------------------------------------------


def changed(path: Path, *statements: str) -> Path:
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
def test_a_foreign_schema_is_one_sentence(tmp_path, statements):
    path = changed(Store(tmp_path / "foreign.duckdb").path, *statements)
    with pytest.raises(InputError, match="another program"):
        Store(path)


def test_an_older_schema_that_lacks_a_table_is_foreign(tmp_path):
    path = tmp_path / "old.duckdb"
    changed(
        path,
        MIGRATIONS[0],
        "CREATE TABLE schema_version (version INTEGER)",
        "INSERT INTO schema_version VALUES (1)",
        "DROP TABLE runs",
    )
    with pytest.raises(InputError, match=r"table runs.*another program"):
        Store(path)


@pytest.mark.parametrize("kind", ["view", "macro"])
def test_a_foreign_database_reads_no_file(tmp_path, capsys, kind):
    """With ``runs`` a view of a file, the results held it."""
    secret = tmp_path / "secret.txt"
    secret.write_text("verysecret", "utf8")
    path = Store(tmp_path / "foreign.duckdb").path
    if kind == "view":
        with duckdb.connect(str(path)) as connection:
            names = [row[0] for row in connection.execute("DESCRIBE runs").fetchall()]
        as_runs = ", ".join(
            f"(SELECT content FROM read_text('{secret}')) AS {name}" for name in names
        )
        changed(path, "DROP TABLE runs", f"CREATE VIEW runs AS SELECT {as_runs}")
    else:
        changed(path, f"CREATE MACRO max(x) AS (SELECT content FROM read_text('{secret}'))")
    status = cli.main(["results", "--json", "--db", str(path)])
    printed = capsys.readouterr()
    assert status == 2
    assert "verysecret" not in printed.out + printed.err
    assert kind in printed.err


REACHING = [
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


@pytest.mark.parametrize("text", REACHING)
def test_no_connection_reaches_another_file(tmp_path, text):
    secret, out = tmp_path / "secret.csv", tmp_path / "out"
    secret.write_text("a\nverysecret\n", "utf8")
    text = text.format(secret=secret, out=out)
    with pytest.raises(duckdb.Error), Store().connect() as connection:
        connection.execute(text)
    with pytest.raises(duckdb.Error), database.in_memory() as connection:
        connection.execute(text)
    assert not out.exists()


def test_no_other_module_opens_a_database():
    """Every connection has the settings of one function."""
    own = {"database.py", "sql_child.py"}
    for path in (ROOT / "lsq_core").rglob("*.py"):
        if path.name not in own:
            assert "duckdb.connect(" not in path.read_text("utf8"), path


# --- sharing, disks, rights -----------------------------------------------------------------


def test_several_processes_make_a_new_database_at_once(tmp_path):
    code = "import sys\nfrom lsq_core.store import Store\nprint(len(Store(sys.argv[1]).models()))"
    path = tmp_path / "new.duckdb"
    makers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(6)
    ]
    said = [maker.communicate() for maker in makers]
    assert [out for out, _ in said] == ["0\n"] * 6, said
    assert os.listdir(tmp_path) == ["new.duckdb"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB; needs the right to mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_left_without_half_a_database(small_disk):
    with pytest.raises(LsqError, match="disk is full"):
        Store(small_disk / "lsq.duckdb")
    assert os.listdir(small_disk) == []


def test_a_read_only_database_is_read(filled, tmp_path):
    folder = tmp_path / "kept"
    folder.mkdir()
    path = with_log(Path(shutil.copy(filled, folder / "lsq.duckdb")))
    if subprocess.run(["mount", "--bind", "-o", "ro", folder, folder], check=False).returncode:
        pytest.skip("mounting a folder read-only needs root")
    try:
        store = Store(path)
        assert len(store.results()) == 12
        assert store.query("SELECT count(*) AS n FROM runs")["n"][0] == 42, "with its log"
        with pytest.raises(LsqError, match="can only be read"):
            store.star("late1", True)
        store.snapshot(tmp_path / "snapshot.duckdb")
        with pytest.raises(InputError, match=r"[Rr]ead-only"):
            Store(folder / "new.duckdb")
    finally:
        subprocess.run(["umount", folder], check=True)


def test_an_empty_file_is_told(tmp_path):
    path = tmp_path / "lsq.duckdb"
    path.touch()
    with pytest.raises(InputError, match="is empty"):
        Store(path)


def test_a_database_that_is_gone_is_not_made_again_without_its_log(filled, tmp_path):
    path = with_log(Path(shutil.copy(filled, tmp_path / "lsq.duckdb")))
    path.unlink()
    with pytest.raises(InputError, match="its log"):
        Store(path)


def test_pandas_is_there_before_the_file_is_opened(filled):
    code = (
        "import sys\nfrom lsq_core import database, store\nopen = database.connect\n"
        "def connect(*given):\n"
        "    seen.append('pandas' in sys.modules)\n"
        "    return open(*given)\n"
        "database.connect, seen = connect, []\n"
        "kept = store.Store(sys.argv[1])\nseen.clear()\nkept.results()\nprint(seen)"
    )
    command = [sys.executable, "-c", code, str(filled)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout == "[True]\n"


def test_no_progress_bar_goes_to_standard_output(filled):
    """DuckDB shows one where there is no script file, as in ``python -c``."""
    code = (
        "import sys\nfrom lsq_core.store import Store\n"
        "with Store(sys.argv[1]).connect() as connection:\n"
        "    asked = \"SELECT current_setting('enable_progress_bar')\"\n"
        "    print(connection.execute(asked).fetchall())"
    )
    command = [sys.executable, "-c", code, str(filled)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout == "[(False,)]\n"


# --- repair ---------------------------------------------------------------------------------


def rows_of(path: Path) -> dict[str, int]:
    tables = ("models", "matrices", "plans", "runs", "evaluations", "scores")
    store = Store(path)
    return {t: int(store.query(f"SELECT count(*) AS n FROM {t}")["n"][0]) for t in tables}


def test_repair_copies_a_whole_database_whole(filled, tmp_path):
    copied = repair(filled, tmp_path / "new.duckdb")
    assert rows_of(tmp_path / "new.duckdb") == rows_of(filled)
    assert sum(table.lost for table in copied) == 0
    assert Store(tmp_path / "new.duckdb").results().equals(Store(filled).results())


def test_repair_leaves_out_what_cannot_be_read(filled, tmp_path, capsys):
    """A table's block is damaged, the others are whole."""
    source, whole = random.Random(2), rows_of(filled)
    path, partial = tmp_path / "damaged.duckdb", 0
    for _ in range(8):
        content = bytearray(filled.read_bytes())
        content[source.randrange(12288, len(content))] ^= 1
        path.write_bytes(content)
        out = tmp_path / "new.duckdb"
        out.unlink(missing_ok=True)
        status = cli.main(["repair", str(path), "--out", str(out), "--json"])
        printed = capsys.readouterr()
        assert path.read_bytes() == content, "the damaged file stays as it is"
        if status:
            assert printed.err.count("\n") == 1
            assert not out.exists()
            continue
        tables = {row["table"]: row for row in json.loads(printed.out)["tables"]}
        for name, number in rows_of(out).items():
            assert number == tables[name]["copied"] <= whole[name]
            assert number + tables[name]["lost"] == whole[name]
        partial += any(row["lost"] for row in tables.values())
    assert partial, "one of them lost rows of a table and kept the rest"


def test_repair_writes_over_nothing(filled, tmp_path):
    out = tmp_path / "there"
    out.touch()
    with pytest.raises(InputError, match="there already"):
        repair(filled, out)
    with pytest.raises(InputError, match="no file"):
        repair(tmp_path / "none", tmp_path / "new")


def test_threads_that_open_and_close_one_file_wait_for_each_other(tmp_path):
    """One that opens a file just as another closes it is told "in use", which is no damage."""
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
