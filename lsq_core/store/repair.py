"""Copy what can be read of a damaged database into a new one."""

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

#: Rows that are read at once where a table can't be read whole: DuckDB's vector, its smallest unit.
_STEP = 2048


@dataclass(frozen=True)
class CopiedTable:
    """How many rows of a table were copied, and how many there were as far as is known."""

    table: str
    copied: int
    lost: int


def repair(path: Path, out: Path) -> list[CopiedTable]:
    """Copy each table of ``path`` into a new database ``out``; what can't be read is left out.

    ``path`` stays as it is. Where its log is damaged, it is read as it was before the log.

    Raises
    ------
    InputError
        When there is nothing at ``path``, something at ``out``, or it isn't one of ours.
    LsqError
        When not even its list of tables can be read.
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
    """A copy of the database that opens: with its log, or else without."""
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
    """Copy a database and its log while no other process has it."""
    with path.open("rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as DuckDB does
        except BlockingIOError as error:
            raise LsqError(f"{path} is in use by another process; close that one.") from error
        shutil.copyfile(path, copy)
        if database.wal_path(path).exists():
            shutil.copyfile(database.wal_path(path), database.wal_path(copy))


def _attach(source: Path, *more: str) -> duckdb.DuckDBPyConnection:
    old = f"ATTACH {database.quote_sql(str(source))} AS old (READ_ONLY)"
    return database.connect_in_memory(old, *more, path=source)


def _shared_tables(source: Path, new: Store) -> list[str]:
    """Tables that both have, but for the number of the schema, which the new one has by itself."""
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
    """Rows that were copied, or None when they can't be read.

    A connection of its own: DuckDB uses none again that found damage.
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
    """The columns that the old and the new table have by the same name."""
    rows = connection.execute(
        "SELECT column_name FROM duckdb_columns() WHERE table_name = ? "
        "AND database_name IN ('old', 'new') GROUP BY ALL HAVING count(*) = 2",
        [table],
    ).fetchall()
    return ", ".join(database.quote_sql(row[0], '"') for row in rows)
