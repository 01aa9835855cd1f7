"""The database file: connections, transactions, migrations.

Connections are short-lived so that the app, jobs and the command line can share the file: DuckDB
allows only one process at a time to write, and other processes wait for it to finish.
"""

from __future__ import annotations

import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from lsq_core import paths
from lsq_core.errors import InputError
from lsq_core.store import database
from lsq_core.store.schema import MIGRATIONS

if TYPE_CHECKING:
    import pandas as pd


#: Seconds to wait for another process to release the file.
LOCK_TIMEOUT_S = 20.0
#: Attempts at a transaction that may conflict with another thread's.
_ATTEMPTS = 20


def database_path() -> Path:
    """Return the default path of the database: ``LSQ_DB``, or a file in the data folder."""
    path = os.environ.get("LSQ_DB") or paths.data_folder() / "lsq.duckdb"
    return database.resolve_database_path(path)


class DatabaseFile:
    """One DuckDB file. Every method opens it, does its work and closes it again.

    Use :meth:`held` to open it only once for several calls.

    Raises
    ------
    InputError
        If the file is not a database of this project, or was written by a newer version.
    LsqError
        If another process holds it for longer than ``LOCK_TIMEOUT_S`` seconds, or the disk is full.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = database.resolve_database_path(path) if path else database_path()
        if self.path.is_dir():
            raise InputError(f"{self.path} is a folder; give the path of a database file.")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"The database's folder {self.path.parent} cannot be created: {error.strerror}. "
                "Set LSQ_HOME to a writable folder, or name a database by --db or LSQ_DB."
            ) from error
        if not self.path.exists():
            database.create(self.path, self._migrate)
        with self.connect() as connection:
            self._migrate(connection)

    @contextmanager
    def connect(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """Open a connection for a ``with`` block; wait while another process holds the file."""
        connection = database.connect(self.path, LOCK_TIMEOUT_S)
        try:
            with database.translate_duckdb_errors(self.path):
                yield connection
        finally:
            with database.FILE_HANDLES:
                connection.close()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the file open for a ``with`` block, so that methods called in it need not open it.

        Opening takes forty times as long as a short query. Other processes have to wait, so the
        block must take less time than they are willing to wait (``LOCK_TIMEOUT_S``).
        """
        import_pandas()
        with self.connect():
            yield

    @contextmanager
    def transaction(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """Open a connection whose changes are committed together, or not at all on an error."""
        with self.connect() as connection:
            connection.begin()
            try:
                yield connection
                connection.commit()
            except BaseException:
                # A failed commit, for example on a full disk, has already been rolled back.
                with suppress(duckdb.TransactionException):
                    connection.rollback()
                raise

    def _retry_transaction(self, work: Callable[[duckdb.DuckDBPyConnection], None]) -> None:
        """Do work in a transaction; retry if it conflicts with another thread of this process."""
        for attempt in range(_ATTEMPTS):
            try:
                with self.transaction() as connection:
                    return work(connection)
            except (duckdb.TransactionException, duckdb.ConstraintException):
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(random.uniform(0.01, 0.06))
        return None

    def _migrate(self, connection: duckdb.DuckDBPyConnection) -> None:
        version = database.schema_version(connection, self.path, len(MIGRATIONS))
        database.check_schema(connection, self.path, MIGRATIONS[:version])
        if version == len(MIGRATIONS):
            return
        if version and database.is_read_only(self.path):
            raise InputError(
                f"{self.path} was written by an older LSQ Explorer (schema {version}) and is "
                "read-only, so it cannot be upgraded: make it and its folder writable."
            )
        connection.begin()
        try:
            connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER)")
            for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
                connection.execute(script)
                connection.execute("INSERT INTO schema_version VALUES (?)", [number])
            connection.commit()
        except BaseException:
            # A failed commit, for example on a full disk, has already been rolled back.
            with suppress(duckdb.TransactionException):
                connection.rollback()
            raise

    def query(self, sql: str, parameters: list | None = None) -> pd.DataFrame:
        """Return the rows of a SELECT as a data frame."""
        import_pandas()
        with self.connect() as connection:
            return connection.execute(sql, parameters or []).df()

    def _fetch_row(self, sql: str, parameters: list) -> dict[str, Any] | None:
        with self.connect() as connection:
            cursor = connection.execute(sql, parameters)
            names = [column[0] for column in cursor.description]
            row = cursor.fetchone()
        return None if row is None else dict(zip(names, row, strict=True))

    def _execute(self, sql: str, parameters: list) -> None:
        with self.transaction() as connection:
            connection.execute(sql, parameters)


def insert_row(
    connection: duckdb.DuckDBPyConnection, table: str, replace: bool = False, **values: object
) -> None:
    """Insert one row; ``table`` and the column names are trusted, values are bound parameters."""
    marks = ", ".join("?" for _ in values)
    verb = "INSERT OR REPLACE" if replace else "INSERT"
    connection.execute(
        f"{verb} INTO {table} ({', '.join(values)}) VALUES ({marks})", list(values.values())
    )


def new_id() -> str:
    """Return a new id for a plan, a run or an evaluation: 12 hexadecimal digits."""
    return uuid.uuid4().hex[:12]


def import_pandas() -> None:
    """Import pandas before the file is opened, so that other processes need not wait for that."""
    import pandas  # noqa: F401
