"""How a DuckDB file is opened: with which settings, by whom, and what is said when it can't be.

Every connection of this project is made here, so that none of them reaches a file other than its
own, loads an extension or can be told to. Failures are distinguished by the error's type and the
file's header; each way has a sentence of its own.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import duckdb

from lsq_core.errors import InputError, LsqError, exception_reason
from lsq_core.files import resolve_path

#: Settings of every connection. One process can open a file twice only with the same settings.
CONFIG = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",  # a table is never a variable of this program
    "allowed_configs": ["enable_progress_bar"],  # of a connection, not of the database
    "lock_configuration": "true",
}
#: A file of DuckDB begins with a checksum of 8 bytes and this.
_MAGIC = b"DUCK"
#: What DuckDB raises for what it can't read. A bare ``Error`` is a checksum that doesn't match.
_STORAGE_ERRORS = (
    duckdb.IOException,
    duckdb.InternalException,
    duckdb.FatalException,
    duckdb.SerializationException,
)
T = TypeVar("T")
#: Held while a connection is opened or closed: DuckDB refuses to open a file that another thread is
#: just closing, and where many threads do both, one could be refused again and again.
FILE_HANDLES = threading.Lock()
_OTHER_PATH_HINT = "give another path with --db or LSQ_DB"


def wal_path(path: Path) -> Path:
    """DuckDB's write-ahead log of a database."""
    return path.with_name(f"{path.name}.wal")


def resolve_database_path(path: str | Path) -> Path:
    """The absolute path of a database that a person gave.

    Raises
    ------
    InputError
        When no file can have it, there is a device or a pipe, or DuckDB can't take the name.
    """
    whole = resolve_path(path)
    utf8 = str(whole).encode("utf8", "replace").decode("utf8")
    if utf8 != str(whole) or "\\" in utf8:  # DuckDB reads a backslash as a slash
        raise InputError(
            f"DuckDB opens no path with a backslash, nor one that isn't UTF-8: {str(whole)!a}."
        )
    if whole.exists() and not (whole.is_file() or whole.is_dir()):
        raise InputError(f"{whole} is a device or a pipe; give the path of a database file.")
    return whole


def is_read_only(path: Path) -> bool:
    """Whether a database can only be read: its file or its folder can't be written."""
    return not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK))


# --- connections ----------------------------------------------------------------------------


def connect(path: Path, wait: float) -> duckdb.DuckDBPyConnection:
    """A connection to an existing database, read-only where it can't be written.

    Waits ``wait`` seconds while another process has the file.

    Raises
    ------
    InputError
        When it isn't there, or isn't a database that can be opened.
    LsqError
        When another process keeps it for longer.
    """
    if not path.exists():
        raise InputError(f"{path} no longer exists; {_OTHER_PATH_HINT}.")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} cannot be read: permission denied; {_OTHER_PATH_HINT}.")
    read_only = is_read_only(path)

    def open_file() -> duckdb.DuckDBPyConnection:
        with FILE_HANDLES:
            return duckdb.connect(str(path), read_only=read_only, config=CONFIG)

    connection = retry_while_locked(path, wait, open_file)
    connection.execute("SET enable_progress_bar = false")  # it would go to standard output
    return connection


def connect_in_memory(
    *attach_clauses: str, files: Path | None = None, path: Path | None = None, wait: float = 0.0
) -> duckdb.DuckDBPyConnection:
    """A connection to no file but those of ``attach_clauses``.

    It may read and write in the folder ``files``. Waits for ``path`` as :func:`connect` does.
    """
    connection = duckdb.connect(config={"python_enable_replacements": "false"})
    try:
        connection.execute("SET enable_progress_bar = false")
        connection.execute("SET autoinstall_known_extensions = false")
        connection.execute("SET autoload_known_extensions = false")
        for clause in attach_clauses:
            retry_while_locked(
                path or Path(), wait, lambda clause=clause: connection.execute(clause)
            )
        if files is not None:
            connection.execute(f"SET allowed_directories = [{quote_sql(str(files))}]")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
    except BaseException:
        connection.close()
        raise
    return connection


def retry_while_locked(path: Path, wait: float, open: Callable[[], T]) -> T:
    """What ``open`` gives, once no other process has the file; its errors in sentences."""
    deadline = time.monotonic() + wait
    while True:
        try:
            return open()
        except duckdb.Error as error:
            if not _is_lock_error(error):
                raise explain_open_error(error, path) from error
            if time.monotonic() > deadline:
                holder = re.search(r"\(PID (\d+)\)", _error_text(error, path))
                who = f" (process {holder[1]})" if holder else ""
                raise LsqError(
                    f"{path} has been in use by another process{who} for {wait:.0f} s; "
                    f"close that one or {_OTHER_PATH_HINT}."
                ) from error
            time.sleep(random.uniform(0.01, 0.06))


def create(path: Path, fill: Callable[[duckdb.DuckDBPyConnection], None]) -> None:
    """Make a database and have ``fill`` write its tables; one that is there already stays.

    It is written under another name and then given its own, so that other processes see it whole
    or not at all, and nothing is left of it on a full disk.
    """
    if wal_path(path).exists():
        raise InputError(
            f"{path} is missing and its log {wal_path(path)} is there: bring the database back, or "
            "move the log away."
        )
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.new")
    try:
        connection = retry_while_locked(
            path, 0.0, lambda: duckdb.connect(str(draft), config=CONFIG)
        )
        with translate_duckdb_errors(path):
            try:
                fill(connection)
                connection.execute("CHECKPOINT")
            finally:
                connection.close()
        _link_into_place(draft, path)
    finally:
        for left in (draft, wal_path(draft)):
            with suppress(OSError):  # not there, or the folder can only be read
                left.unlink()


def _link_into_place(draft: Path, path: Path) -> None:
    with suppress(FileExistsError):  # another process was first
        try:
            os.link(draft, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            if not path.exists():
                draft.replace(path)


def quote_sql(text: str, mark: str = "'") -> str:
    """A string in SQL, or with ``"`` a name, where a parameter is not allowed."""
    return mark + text.replace(mark, 2 * mark) + mark


# --- what is said of errors -----------------------------------------------------------------


@contextmanager
def translate_duckdb_errors(path: Path) -> Iterator[None]:
    """Turn what a disk, a damaged file or a read-only one raises into a sentence."""
    try:
        yield
    except duckdb.Error as error:
        text = _error_text(error, path)
        if isinstance(error, duckdb.InvalidInputException) and "read-only mode" in text:
            raise LsqError(
                f"{path} is read-only, so nothing can be stored in it: make it and its folder "
                f"writable, or {_OTHER_PATH_HINT}."
            ) from error
        if _is_storage_error(error) or is_disk_full(error, path):
            raise explain_open_error(error, path) from error
        raise


def explain_open_error(error: duckdb.Error, path: Path) -> LsqError:
    """What to tell a person when a database can't be opened or read."""
    text = _error_text(error, path)
    if is_disk_full(error, path):
        return LsqError(
            f"The disk is full, so {path} could not take the result: make room and try again; "
            "what it held before is whole."
        )
    if isinstance(error, duckdb.IOException):
        for reason in ("Permission denied", "Read-only file system"):
            if reason in text:
                return InputError(
                    f"{path} cannot be used: {reason.lower()}; make it and its folder writable, "
                    f"or {_OTHER_PATH_HINT}."
                )
        if "Trying to read a database file with version number" in text:
            return InputError(
                f"{path} was written by a newer DuckDB than {duckdb.__version__}; update, or "
                f"{_OTHER_PATH_HINT}."
            )
    if text.removeprefix("IO Error: ").startswith("Failure while replaying WAL"):
        log = wal_path(path)
        return InputError(
            f"The log {log} is damaged: move it aside (mv {log.name} {log.name}.damaged) and "
            f"{path.name} opens as it was before the log."
        )
    return _diagnose_header(path) or InputError(
        f"{path} is damaged ({exception_reason(error)}): 'repair' copies what can be read of it "
        "into a "
        f"new file; or {_OTHER_PATH_HINT}."
    )


def _diagnose_header(path: Path) -> InputError | None:
    """What a file is that isn't a database of DuckDB, or None.

    Only read when it couldn't be opened: closing a file lets go of this process's locks on it.
    """
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError as error:
        return InputError(f"{path} cannot be read: {error.strerror}; {_OTHER_PATH_HINT}.")
    if not head:
        return InputError(
            f"{path} is empty and no DuckDB database: delete it and it is made anew, or "
            f"{_OTHER_PATH_HINT}."
        )
    if head[8:12] != _MAGIC:
        return InputError(
            f"{path} cannot be opened as a DuckDB database: it is another kind of file, or its "
            f"beginning is damaged; {_OTHER_PATH_HINT}."
        )
    return None


def _is_lock_error(error: duckdb.Error) -> bool:
    """Whether another process, or another thread with other settings, has the file."""
    text = str(error)
    return (
        (
            isinstance(error, duckdb.IOException)
            and text.startswith("IO Error: Could not set lock on file")
        )
        or isinstance(error, (duckdb.ResourceInUseException, duckdb.ConnectionException))
        or (
            isinstance(error, duckdb.BinderException)
            and text.startswith("Binder Error: Unique file handle conflict")
        )
    )


def _is_storage_error(error: duckdb.Error) -> bool:
    return type(error) is duckdb.Error or isinstance(error, _STORAGE_ERRORS)


def is_disk_full(error: duckdb.Error, path: Path) -> bool:
    """Whether a write, or the commit that it was part of, found no room."""
    text = _error_text(error, path)
    full = "No space left on device" in text or "Disk quota exceeded" in text
    return full and (_is_storage_error(error) or isinstance(error, duckdb.TransactionException))


def _error_text(error: duckdb.Error, path: Path) -> str:
    """What DuckDB says, without the path: a folder may be called anything."""
    return str(error).replace(str(path), "").strip()


# --- schema ---------------------------------------------------------------------------------


def schema_version(connection: duckdb.DuckDBPyConnection, path: Path, latest: int) -> int:
    """Which of our schemas a database has; 0 for one that is empty.

    Raises
    ------
    InputError
        When it is another program's or a newer one's, or holds views or macros, which could
        stand for anything where a table is expected.
    """
    objects = connection.execute(
        "SELECT view_name, 'view' FROM duckdb_views() WHERE NOT internal UNION ALL "
        "SELECT function_name, 'macro' FROM duckdb_functions() WHERE NOT internal UNION ALL "
        "SELECT schema_name || '.' || table_name, 'table' FROM duckdb_tables() "
        "WHERE NOT internal AND NOT temporary"
    ).fetchall()
    for name, kind in objects:
        if kind != "table":
            raise InputError(
                f"{path} holds the {kind} {name!r}, which no database of LSQ Explorer has: it was "
                f"made or changed by another program; {_OTHER_PATH_HINT}."
            )
    if not objects:
        return 0
    foreign_error = InputError(f"{path} is a database of another program; {_OTHER_PATH_HINT}.")
    if ("main.schema_version", "table") not in objects:
        raise foreign_error
    try:
        rows = connection.execute("SELECT version FROM main.schema_version").fetchall()
    except duckdb.BinderException as error:
        raise foreign_error from error
    versions = [row[0] for row in rows]
    if not versions or not all(type(v) is int and v > 0 for v in versions):
        raise foreign_error
    if max(versions) > latest:
        raise InputError(
            f"{path} was written by a newer LSQ Explorer (schema {max(versions)}, this one knows "
            f"{latest}); update, or {_OTHER_PATH_HINT}."
        )
    return max(versions)


def check_schema(
    connection: duckdb.DuckDBPyConnection, path: Path, migrations: Sequence[str]
) -> None:
    """Raise :class:`InputError` when a database lacks a column that these migrations make."""
    missing_columns = _expected_columns(tuple(migrations)) - _columns(connection)
    if missing_columns:
        table, column, type = min(missing_columns)
        raise InputError(
            f"{path} lacks the column {column} ({type}) of the table {table}: it was made or "
            f"changed by another program; {_OTHER_PATH_HINT}."
        )


@lru_cache(maxsize=8)
def _expected_columns(migrations: tuple[str, ...]) -> frozenset[tuple[str, str, str]]:
    """Table, column and type of all that the migrations make."""
    with duckdb.connect(config=CONFIG) as connection:
        for script in migrations:
            connection.execute(script)
        return frozenset(_columns(connection))


def _columns(connection: duckdb.DuckDBPyConnection) -> set[tuple[str, str, str]]:
    return set(
        connection.execute(
            "SELECT table_name, column_name, data_type FROM duckdb_columns() "
            "WHERE NOT internal AND schema_name = 'main'"
        ).fetchall()
    )
