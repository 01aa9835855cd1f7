"""Opening DuckDB files: settings, locking, and error messages.

Every connection of this project is opened here, so that none of them can access a file other than
its own, load an extension, or be reconfigured to do so. Failures are distinguished by the error's
type and the file's header; each kind has its own message.
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

#: Settings of every connection. A process can open a file twice only with the same settings.
CONFIG = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",  # a table name never refers to a Python variable
    "allowed_configs": ["enable_progress_bar"],  # a setting of a connection, not of the database
    "lock_configuration": "true",
}
#: A DuckDB file starts with a checksum of 8 bytes, followed by these.
_MAGIC = b"DUCK"
#: Errors that DuckDB raises for unreadable files. A bare ``Error`` means a wrong checksum.
_STORAGE_ERRORS = (
    duckdb.IOException,
    duckdb.InternalException,
    duckdb.FatalException,
    duckdb.SerializationException,
)
T = TypeVar("T")
#: Held while a connection is opened or closed: DuckDB refuses to open a file that another thread is
#: closing, and if many threads do both, one could be refused again and again.
FILE_HANDLES = threading.Lock()
_OTHER_PATH_HINT = "give another path with --db or LSQ_DB"


def wal_path(path: Path) -> Path:
    """Return the path of a database's write-ahead log."""
    return path.with_name(f"{path.name}.wal")


def resolve_database_path(path: str | Path) -> Path:
    """Return the absolute path of a database given by the user.

    Raises
    ------
    InputError
        If no file can have this path, it is a device or a pipe, or DuckDB cannot open such a path.
    """
    whole = resolve_path(path)
    utf8 = str(whole).encode("utf8", "replace").decode("utf8")
    if utf8 != str(whole) or "\\" in utf8:  # DuckDB reads a backslash as a slash
        raise InputError(
            f"DuckDB cannot open a path that has a backslash or is not UTF-8: {str(whole)!a}."
        )
    if whole.exists() and not (whole.is_file() or whole.is_dir()):
        raise InputError(f"{whole} is a device or a pipe; give the path of a database file.")
    return whole


def is_read_only(path: Path) -> bool:
    """Return whether a database can only be read: its file or its folder is not writable."""
    return not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK))


# --- connections ----------------------------------------------------------------------------


def connect(path: Path, wait: float) -> duckdb.DuckDBPyConnection:
    """Open a connection to an existing database, read-only if it is not writable.

    Waits up to ``wait`` seconds while another process holds the file.

    Raises
    ------
    InputError
        If the file does not exist or is not a database that can be opened.
    LsqError
        If another process holds the file for longer.
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
    """Open an in-memory connection that can access only the files of ``attach_clauses``.

    It may also read and write in the folder ``files``. While ``path``, the attached file, is locked
    by another process, waits as :func:`connect` does.
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
    """Return ``open()``, retrying while another process holds the file; explain other errors."""
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
    """Create a database whose tables ``fill`` writes; an existing one is left unchanged.

    It is written under a temporary name and then moved into place, so that other processes see
    either the complete database or none, and no partial file remains if the disk is full.
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
            with suppress(OSError):  # it does not exist, or the folder is read-only
                left.unlink()


def _link_into_place(draft: Path, path: Path) -> None:
    with suppress(FileExistsError):  # another process was first
        try:
            os.link(draft, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if not path.exists():
                draft.replace(path)


def quote_sql(text: str, mark: str = "'") -> str:
    """Quote an SQL string, or with ``"`` an identifier, where a parameter is not allowed."""
    return mark + text.replace(mark, 2 * mark) + mark


# --- error messages -------------------------------------------------------------------------


@contextmanager
def translate_duckdb_errors(path: Path) -> Iterator[None]:
    """Translate DuckDB's errors about full disks and damaged or read-only files into LsqError."""
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
    """Return the error to show the user if a database cannot be opened or read."""
    text = _error_text(error, path)
    if is_disk_full(error, path):
        return LsqError(
            f"The disk is full, so the result could not be stored in {path}: make room and try "
            "again; its earlier content is intact."
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
    """Return the error for a file that is not a DuckDB database, or None if it is one.

    Call this only for a file that could not be opened: closing it releases this process's locks.
    """
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError as error:
        return InputError(f"{path} cannot be read: {error.strerror}; {_OTHER_PATH_HINT}.")
    if not head:
        return InputError(
            f"{path} is empty, not a DuckDB database: delete it to have it created again, or "
            f"{_OTHER_PATH_HINT}."
        )
    if head[8:12] != _MAGIC:
        return InputError(
            f"{path} cannot be opened as a DuckDB database: it is another kind of file, or its "
            f"beginning is damaged; {_OTHER_PATH_HINT}."
        )
    return None


def _is_lock_error(error: duckdb.Error) -> bool:
    """Return whether another process, or another thread with other settings, holds the file."""
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
    """Return whether a write, or the commit it was part of, failed for lack of disk space."""
    text = _error_text(error, path)
    full = "No space left on device" in text or "Disk quota exceeded" in text
    return full and (_is_storage_error(error) or isinstance(error, duckdb.TransactionException))


def _error_text(error: duckdb.Error, path: Path) -> str:
    """Return DuckDB's message without the path, whose folders may have any name."""
    return str(error).replace(str(path), "").strip()


# --- schema ---------------------------------------------------------------------------------


def schema_version(connection: duckdb.DuckDBPyConnection, path: Path, latest: int) -> int:
    """Return the version of a database's schema; 0 if it is empty.

    Raises
    ------
    InputError
        If it was written by another program or a newer version of this one, or contains views or
        macros, which could replace a table.
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
            f"{path} was written by a newer LSQ Explorer (schema {max(versions)}, this one "
            f"supports up to {latest}); update, or {_OTHER_PATH_HINT}."
        )
    return max(versions)


def check_schema(
    connection: duckdb.DuckDBPyConnection, path: Path, migrations: Sequence[str]
) -> None:
    """Raise :class:`InputError` if a database lacks a column that these migrations create."""
    missing_columns = _expected_columns(tuple(migrations)) - _columns(connection)
    if missing_columns:
        table, column, type = min(missing_columns)
        raise InputError(
            f"{path} lacks the column {column} ({type}) of the table {table}: it was made or "
            f"changed by another program; {_OTHER_PATH_HINT}."
        )


@lru_cache(maxsize=8)
def _expected_columns(migrations: tuple[str, ...]) -> frozenset[tuple[str, str, str]]:
    """Return table, column and type of every column that the migrations create."""
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
