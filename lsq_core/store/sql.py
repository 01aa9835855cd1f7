"""SQL queries on a copy of the store that can neither change anything nor access other files.

``read_only`` alone would let a query read and write files. Here a query must be a single SELECT on
a copy, with external access disabled and the configuration locked. It runs in a separate process
(:mod:`lsq_core.store.sql_child`) with limits on time, memory, rows and bytes, because not every
DuckDB function respects such limits by itself.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lsq_core import paths
from lsq_core.errors import InputError, LsqError
from lsq_core.memory import available_memory
from lsq_core.store.sql_limits import memory_message, timeout_message

if TYPE_CHECKING:
    import pandas as pd

#: Seconds that a query may take.
TIME_LIMIT = 10.0
#: Maximum number of rows that it returns.
ROW_LIMIT = 10_000
#: Maximum size of its result in bytes.
BYTE_LIMIT = 64 << 20
#: Bytes of memory that DuckDB may use for it, or half of the available memory if that is less.
MEMORY_LIMIT = 1 << 30
#: Seconds that its process may take to start.
_START_TIMEOUT_S = 60.0
#: Seconds beyond the time limit after which a process that does not stop by itself is killed.
_GRACE_S = 0.5
#: Seconds between two checks on the process.
_POLL_INTERVAL_S = 0.05


@dataclass(frozen=True)
class Example:
    """An example query for users to start from."""

    title: str
    sql: str


EXAMPLES = (
    Example(
        "Best run of each model",
        """SELECT model, corpus, protocol, tokens, method, bits_per_param AS bits, perplexity
FROM results
-- only the same tokens, cut the same way, can be compared
QUALIFY row_number() OVER (
    PARTITION BY fingerprint, corpus_sha256, protocol, tokens ORDER BY perplexity, bits) = 1
ORDER BY ALL""",
    ),
    Example(
        "Best run under 3.3 bits",
        """SELECT model, method, bits_per_param, perplexity, corpus, protocol, tokens
FROM results
WHERE bits_per_param < 3.3
QUALIFY row_number() OVER (
    PARTITION BY fingerprint, corpus_sha256, protocol, tokens ORDER BY perplexity) = 1
ORDER BY ALL""",
    ),
    Example(
        "Bits by layer of the newest plan",
        """SELECT module.layer::INTEGER AS layer, avg(module.bits::DOUBLE) AS mean_bits
FROM (SELECT * FROM plans WHERE len(json_keys(content, '$.modules')) > 0
      ORDER BY created DESC LIMIT 1) p,
     json_each(p.content, '$.modules') m,
     LATERAL (SELECT m.value ->> '$.layer' AS layer, m.value ->> '$.bits' AS bits) module
GROUP BY ALL
ORDER BY layer""",
    ),
    Example(
        "Most sensitive modules",
        """SELECT m.source AS model, p.provenance ->> '$.dtype' AS dtype,
       p.provenance ->> '$.corpus' AS calibration, s.module, s.config, s.value AS sensitivity
FROM scores s
JOIN profiles p ON s.profile = p.id
JOIN models m ON p.fingerprint = m.fingerprint
WHERE s.metric = 'sensitivity' AND s.config = 'b4g64' AND NOT isnan(s.value)
ORDER BY sensitivity DESC
LIMIT 20""",
    ),
    Example(
        "What there is",
        """SELECT table_name, column_name, data_type
FROM duckdb_columns()
WHERE NOT internal
ORDER BY table_name, column_index""",
    ),
)


@dataclass(frozen=True, eq=False)
class QueryResult:
    """The rows of a query; ``truncated`` if there were more than the limit."""

    rows: pd.DataFrame
    truncated: bool


def run_query(
    snapshot: Path,
    sql: str,
    time_limit: float = TIME_LIMIT,
    row_limit: int = ROW_LIMIT,
    byte_limit: int = BYTE_LIMIT,
    on_wait: Callable[[], object] = lambda: None,
) -> QueryResult:
    """Run one SELECT on a copy written by :meth:`lsq_core.store.store.Store.snapshot`.

    ``on_wait`` is called several times a second; if it raises, the query is stopped.

    Raises
    ------
    InputError
        If the query is not a single SELECT, is invalid, would access a file, or takes more than
        ``time_limit`` seconds, ``byte_limit`` bytes or too much memory; the message is one
        sentence.
    LsqError
        If its process cannot be started or fails.
    """
    memory = min(MEMORY_LIMIT, available_memory() // 2)
    request = {
        "snapshot": str(snapshot),
        "sql": sql,
        "seconds": time_limit,
        "rows": row_limit,
        "bytes": byte_limit,
        "memory": memory,
    }
    with _QueryProcess(request, 2 * byte_limit) as child:
        start_time = time.monotonic()
        while child.reader.is_alive():
            child.reader.join(_POLL_INTERVAL_S)
            on_wait()
            if child.ready is None:
                if time.monotonic() - start_time > _START_TIMEOUT_S:
                    raise LsqError(
                        f"The process for the query did not start in {_START_TIMEOUT_S:.0f} s."
                    )
            elif time.monotonic() - child.ready > time_limit + _GRACE_S:
                raise InputError(timeout_message(time_limit))
    if child.ready is None:
        raise LsqError("The process for the query could not be started; try again.")
    head, _, rest = child.output.partition(b"\n")
    if not head:
        raise InputError(_explain_exit(child.process.returncode, memory, time_limit))
    header = json.loads(head)
    if "error" in header:
        raise InputError(header["error"])
    if "failure" in header:
        raise LsqError(f"The process for the query failed ({header['failure']}).")
    rows = _frame(rest)
    return QueryResult(rows.head(row_limit), truncated=len(rows) > row_limit)


def _explain_exit(status: int, memory: int, seconds: float) -> str:
    """Return the message for a process that ended without a result."""
    if status == -signal.SIGXCPU:
        return timeout_message(seconds)
    if status in (-signal.SIGKILL, -signal.SIGABRT):  # by the kernel; by a failed allocation
        return memory_message(memory)
    return f"DuckDB failed at this query (exit status {status}); write it more simply."


class _QueryProcess:
    """The process of one query; it is killed at the end of the ``with`` block if still running."""

    def __init__(self, request: dict, max_output_bytes: int) -> None:
        self.request, self.max_output_bytes = json.dumps(request).encode(), max_output_bytes
        #: When it started the query (``time.monotonic``); None before that.
        self.ready: float | None = None
        self.output = b""

    def __enter__(self) -> _QueryProcess:
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lsq_core.store.sql_child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=paths.IMPORT_FOLDER,
            )
        except OSError as error:
            raise LsqError(
                f"The process for the query could not be started ({error.strerror})."
            ) from error
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.reader.is_alive() or len(self.output) == self.max_output_bytes:
            self.process.kill()
        self.process.wait()
        self.reader.join()
        self.process.stdout.close()

    def _read(self) -> None:
        try:
            with self.process.stdin as to:
                to.write(self.request)
        except OSError:
            return  # the process ended before it read the request
        if self.process.stdout.readline() == b"ready\n":
            self.ready = time.monotonic()
            self.output = self.process.stdout.read(self.max_output_bytes)


def _frame(stream: bytes) -> pd.DataFrame:
    import pyarrow as pa

    from lsq_core.store import database

    with database.connect_in_memory() as connection:
        return connection.from_arrow(pa.ipc.open_stream(stream).read_all()).df()
