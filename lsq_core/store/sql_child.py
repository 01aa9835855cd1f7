"""The process that runs one query for :func:`lsq_core.store.sql.run_query` under resource limits.

It reads a JSON request from standard input. To standard output it writes a line as soon as it is
ready, a line of JSON, and the result as an Arrow stream. It imports neither torch nor pandas.
"""

from __future__ import annotations

import io
import json
import re
import resource
import sys
import threading
from contextlib import suppress
from pathlib import Path

import duckdb
import pyarrow as pa

from lsq_core.errors import InputError
from lsq_core.store.database import CONFIG
from lsq_core.store.sql_limits import memory_message, timeout_message

#: Rows per batch of the result, whose size is checked after each batch.
_BATCH = 2048
_THREADS = 2


def main() -> None:
    """Answer the request on standard input."""
    request = json.load(sys.stdin)
    _limit(request["memory"], request["seconds"])
    out = sys.stdout.buffer
    out.write(b"ready\n")
    out.flush()
    try:
        head, rows = {}, execute_query(request)
    except InputError as error:
        head, rows = {"error": str(error)}, b""
    except MemoryError:
        head, rows = {"error": memory_message(request["memory"])}, b""
    except Exception as error:
        head, rows = {"failure": f"{type(error).__name__}: {error}"}, b""
    out.write(json.dumps(head).encode() + b"\n" + rows)
    out.flush()


def _limit(memory: int, seconds: float) -> None:
    """Limit this process's memory and CPU time, and forbid it to write files.

    It also becomes the process that the kernel kills first if memory runs out.
    """
    used = int(Path("/proc/self/statm").read_text("utf8").split()[0]) * resource.getpagesize()
    # DuckDB does not count all the memory it uses, so the process may use more than DuckDB's limit.
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * memory, used + 2 * memory))
    time = int(seconds * _THREADS) + 5
    resource.setrlimit(resource.RLIMIT_CPU, (time, time))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", "utf8")


def execute_query(request: dict) -> bytes:
    settings = CONFIG | {
        "access_mode": "READ_ONLY",
        "memory_limit": f"{request['memory']}B",
        "threads": str(_THREADS),
        "temp_directory": "",
    }
    seconds = request["seconds"]
    with duckdb.connect(request["snapshot"], config=settings) as connection:
        connection.execute("SET enable_progress_bar = false")
        timer = threading.Timer(seconds, connection.interrupt)
        timer.daemon = True
        timer.start()
        try:
            statement = _parse_single_select(connection, request["sql"])
            rows = connection.from_query(statement.query).limit(request["rows"] + 1)
            return _stream(rows.to_arrow_reader(_BATCH), request["bytes"])
        except duckdb.InterruptException:
            raise InputError(timeout_message(seconds)) from None
        except duckdb.PermissionException:
            raise InputError(
                "The query would access a file or load an extension; it may only "
                "read the tables of this database."
            ) from None
        except duckdb.OutOfMemoryException:
            raise InputError(memory_message(request["memory"])) from None
        except (duckdb.Error, pa.ArrowException, ValueError) as error:
            if "bad_alloc" in str(error) or "Failed to allocate" in str(error):
                raise InputError(memory_message(request["memory"])) from None
            raise InputError(_first_sentence(error)) from None
        finally:
            timer.cancel()


def _stream(reader: pa.RecordBatchReader, max_bytes: int) -> bytes:
    buffer, size = io.BytesIO(), 0
    with pa.ipc.new_stream(buffer, reader.schema) as writer:
        for batch in reader:
            size += batch.nbytes
            if size > max_bytes:
                raise InputError(
                    f"The result is larger than {max_bytes >> 20} MiB; select only the columns "
                    "that you need, or count rows instead of listing them."
                )
            writer.write_batch(batch)
    return buffer.getvalue()


def _parse_single_select(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.Statement:
    statements = connection.extract_statements(sql)
    if not statements:
        raise InputError("The query is empty; give a single SELECT.")
    if len(statements) != 1:
        raise InputError(f"The query has {len(statements)} statements; give a single SELECT.")
    if statements[0].type != duckdb.StatementType.SELECT:
        raise InputError(
            f"{statements[0].type.name} is not a query; give a single SELECT, which reads and "
            "changes nothing."
        )
    return statements[0]


def _first_sentence(error: Exception) -> str:
    """Return the first sentence of DuckDB's message about an error."""
    first = re.split(r"\n|LINE \d+:", str(error).strip())[0].strip().rstrip(".!")
    return f"{first}."


if __name__ == "__main__":
    main()
