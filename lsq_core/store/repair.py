"""Copying the readable part of a damaged database into a new one."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb

from lsq_core.errors import InputError, LsqError
from lsq_core.store import database
from lsq_core.store.store import Store

#: Rows read at a time if a table cannot be read in full: DuckDB's vector size, its smallest unit.
_STEP = 2048


@dataclass(frozen=True)
class CopiedTable:
    """The number of rows copied from a table, and the estimated number of rows lost."""

    table: str
    copied: int
    lost: int


def repair(path: Path, out: Path) -> list[CopiedTable]:
    """Copy each table of ``path`` into a new database ``out``; unreadable rows are left out.

    ``path`` is not modified. If its write-ahead log is damaged, the log is ignored.

    Raises
    ------
    InputError
        If ``path`` is not a file, ``out`` exists, or the database is another program's.
    LsqError
        If the database cannot be opened even without its log, or is in use.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file; give the path of a database.")
    if out.exists():
        raise InputError(f"{out} already exists; give a new file with --out.")
    with _readable_copy(path) as source:
        new = Store(out)
        try:
            return [_copy(source, new, table) for table in _shared_tables(source, new)]
        except BaseException:
            out.unlink()
            raise


@contextmanager
def _readable_copy(path: Path) -> Iterator[Path]:
    """Make a copy of the database that can be opened, without its log if that is damaged."""
    with tempfile.TemporaryDirectory(prefix="lsq-repair-") as folder:
        copy = Path(folder) / "damaged.duckdb"
        _copy_database_files(path, copy)
        if database.wal_path(copy).exists():
            try:
                _attach(copy).close()
            except LsqError:
                database.wal_path(copy).unlink()
        try:
            _attach(copy).close()
        except LsqError as error:
            raise LsqError(
                f"Nothing can be recovered from {path}: {str(error).replace(str(copy), path.name)}"
            ) from error
        yield copy


def _copy_database_files(path: Path, copy: Path) -> None:
    """Copy a database and its log, while no other process has it open."""
    with path.open("rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # the lock that DuckDB takes
        except BlockingIOError as error:
            raise LsqError(f"{path} is in use by another process; close that one.") from error
        shutil.copyfile(path, copy)
        if database.wal_path(path).exists():
            shutil.copyfile(database.wal_path(path), database.wal_path(copy))


def _attach(source: Path, *more: str) -> duckdb.DuckDBPyConnection:
    old = f"ATTACH {database.quote_sql(str(source))} AS old (READ_ONLY)"
    return database.connect_in_memory(old, *more, path=source)


def _shared_tables(source: Path, new: Store) -> list[str]:
    """Return the tables that both databases have, except ``schema_version``."""
    listed = "SELECT table_name FROM duckdb_tables() WHERE NOT internal AND schema_name = 'main'"
    with _attach(source) as connection:
        there = {row[0] for row in connection.execute(listed).fetchall()}
    if "schema_version" not in there:
        raise InputError(f"{source.name} is a database of another program.")
    with new.connect() as connection:
        ours = [row[0] for row in connection.execute(listed).fetchall()]
    return [name for name in ours if name in there and name != "schema_version"]


def _copy(source: Path, new: Store, table: str) -> CopiedTable:
    whole = _count(source, table)
    copied = _insert(source, new, table, "true")
    if copied is None:
        spans = range(0, max(whole, 1), _STEP)
        copied = sum(
            _insert(source, new, table, f"rowid >= {offset} AND rowid < {offset + _STEP}") or 0
            for offset in spans
        )
    return CopiedTable(table, copied, max(whole - copied, 0))


def _count(source: Path, table: str) -> int:
    with _attach(source) as connection:
        sql = f"SELECT estimated_size FROM duckdb_tables() WHERE table_name = '{table}'"
        return connection.execute(sql).fetchone()[0]


def _insert(source: Path, new: Store, table: str, where: str) -> int | None:
    """Copy rows and return their number, or None if they cannot be read.

    Opens a new connection, because DuckDB's connections are unusable after they hit damage.
    """
    into = f"ATTACH {database.quote_sql(str(new.path))} AS new"
    with _attach(source, into) as connection:
        shared = _shared_columns(connection, table)
        try:
            return connection.execute(
                f"INSERT INTO new.{table} ({shared}) SELECT {shared} FROM old.{table} WHERE {where}"
            ).fetchone()[0]
        except duckdb.Error as error:
            if database.is_disk_full(error, new.path):
                raise database.explain_open_error(error, new.path) from error
            return None


def _shared_columns(connection: duckdb.DuckDBPyConnection, table: str) -> str:
    """Return the names of the columns that both the old and the new table have."""
    rows = connection.execute(
        "SELECT column_name FROM duckdb_columns() WHERE table_name = ? "
        "AND database_name IN ('old', 'new') GROUP BY ALL HAVING count(*) = 2",
        [table],
    ).fetchall()
    return ", ".join(database.quote_sql(row[0], '"') for row in rows)
