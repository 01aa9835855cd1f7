"""Questions in SQL to a copy of the store that can neither be changed nor lead to another file.

``read_only`` alone lets a query read and write files. Here a query sees a copy; external access is
off and the configuration locked; it is a single SELECT. A process of its own answers it
(:mod:`lsq_core.store.sql_child`), held to limits of time, memory, rows and bytes, which not every
function of DuckDB would keep to by itself.
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
from lsq_core.store.sql_limits import too_long, too_much_memory

if TYPE_CHECKING:
    import pandas as pd

#: Seconds that a query may take.
TIME_LIMIT = 10.0
#: Rows that it gives at most.
ROW_LIMIT = 10_000
#: Bytes that its answer may take.
BYTE_LIMIT = 64 << 20
#: Bytes of memory that DuckDB may take for it, where there are so many.
MEMORY_LIMIT = 1 << 30
#: Seconds that its process may take to start.
_START = 60.0
#: Seconds beyond the time limit after which a process that doesn't stop by itself is killed.
_GRACE = 0.5
#: Seconds between two looks at it.
_LOOK = 0.05


@dataclass(frozen=True)
class Example:
    """A question that a person may start from."""

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
class Answer:
    """The rows of a query; ``cut`` when there were more than the limit."""

    rows: pd.DataFrame
    cut: bool


def ask(
    snapshot: Path,
    sql: str,
    time_limit: float = TIME_LIMIT,
    row_limit: int = ROW_LIMIT,
    byte_limit: int = BYTE_LIMIT,
    waiting: Callable[[], object] = lambda: None,
) -> Answer:
    """The answer to one SELECT, from a copy that :meth:`lsq_core.store.store.Store.snapshot` wrote.

    ``waiting`` is called several times a second; what it raises stops the query.

    Raises
    ------
    InputError
        When it is more or other than one SELECT, is wrong, would touch a file, or takes more than
        ``time_limit`` seconds, ``byte_limit`` bytes or too much memory; in one sentence.
    LsqError
        When its process can't be started.
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
    with _Child(request, 2 * byte_limit) as child:
        began = time.monotonic()
        while child.reading.is_alive():
            child.reading.join(_LOOK)
            waiting()
            if child.ready is None:
                if time.monotonic() - began > _START:
                    raise LsqError(f"The process for the query did not start in {_START:.0f} s.")
            elif time.monotonic() - child.ready > time_limit + _GRACE:
                raise InputError(too_long(time_limit))
    if child.ready is None:
        raise LsqError("The process for the query could not be started; try again.")
    head, _, rest = child.output.partition(b"\n")
    if not head:
        raise InputError(_ended_by(child.process.returncode, memory, time_limit))
    told = json.loads(head)
    if "error" in told:
        raise InputError(told["error"])
    if "failure" in told:
        raise LsqError(f"The process for the query failed ({told['failure']}).")
    rows = _frame(rest)
    return Answer(rows.head(row_limit), cut=len(rows) > row_limit)


def _ended_by(status: int, memory: int, seconds: float) -> str:
    """What is said of a process that a signal ended."""
    if status == -signal.SIGXCPU:
        return too_long(seconds)
    if status in (-signal.SIGKILL, -signal.SIGABRT):  # by the kernel; by an allocation that failed
        return too_much_memory(memory)
    return f"DuckDB failed at this query (exit status {status}); write it more simply."


class _Child:
    """The process of one query; it ends with the ``with``, whatever it is doing."""

    def __init__(self, request: dict, most: int) -> None:
        self.request, self.most = json.dumps(request).encode(), most
        #: When it began with the query (``time.monotonic``); None before that.
        self.ready: float | None = None
        self.output = b""

    def __enter__(self) -> _Child:
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
        self.reading = threading.Thread(target=self._read, daemon=True)
        self.reading.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.reading.is_alive() or len(self.output) == self.most:
            self.process.kill()
        self.process.wait()
        self.reading.join()
        self.process.stdout.close()

    def _read(self) -> None:
        try:
            with self.process.stdin as to:
                to.write(self.request)
        except OSError:
            return  # it ended before it read
        if self.process.stdout.readline() == b"ready\n":
            self.ready = time.monotonic()
            self.output = self.process.stdout.read(self.most)


def _frame(stream: bytes) -> pd.DataFrame:
    import pyarrow as pa

    from lsq_core.store import database

    with database.in_memory() as connection:
        return connection.from_arrow(pa.ipc.open_stream(stream).read_all()).df()
