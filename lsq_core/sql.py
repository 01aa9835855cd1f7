"""Questions in SQL to a copy of the store that can neither be changed nor lead to another file.

``read_only`` alone lets a query read and write files. Here a query sees a copy; external access is
off and the configuration locked; it is a single SELECT; its time, memory and rows are limited.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from lsq_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

#: Seconds that a query may take.
TIME_LIMIT = 10.0
#: Rows that it gives at most.
ROW_LIMIT = 10_000
#: What a query may do; set before the copy is opened, and locked.
_LOCKED = {
    "access_mode": "READ_ONLY",
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",  # a table is never a variable of this program
    "memory_limit": "1GB",
    "threads": "2",
    "lock_configuration": "true",
}


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
    snapshot: Path, sql: str, time_limit: float = TIME_LIMIT, row_limit: int = ROW_LIMIT
) -> Answer:
    """The answer to one SELECT, from a copy that :meth:`lsq_core.store.Store.snapshot` wrote.

    Raises
    ------
    InputError
        When it is more or other than one SELECT, is wrong, would touch a file, or takes longer
        than ``time_limit`` seconds; in one sentence.
    """
    with duckdb.connect(str(snapshot), config=_LOCKED) as connection:
        timer = threading.Timer(time_limit, connection.interrupt)
        timer.start()
        try:
            statement = _only_statement(connection, sql)
            rows = connection.from_query(statement.query).limit(row_limit + 1).df()
        except duckdb.InterruptException:
            raise InputError(
                f"The query took longer than {time_limit:g} s and was stopped; narrow it with "
                "WHERE, or count in place of listing."
            ) from None
        except duckdb.PermissionException:
            raise InputError(
                "The query would read or write a file, or load an extension; here it can only "
                "read the tables of this database."
            ) from None
        except duckdb.Error as error:
            raise InputError(_sentence(error)) from None
        finally:
            timer.cancel()
    return Answer(rows.head(row_limit), cut=len(rows) > row_limit)


def _only_statement(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.Statement:
    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise InputError(
            f"There {'is no statement' if not statements else f'are {len(statements)} statements'} "
            "in the query; give a single SELECT."
        )
    if statements[0].type != duckdb.StatementType.SELECT:
        raise InputError(
            f"{statements[0].type.name} is not a question; give a single SELECT, which reads and "
            "changes nothing."
        )
    return statements[0]


def _sentence(error: duckdb.Error) -> str:
    """What DuckDB says of an error, in one sentence."""
    first = re.split(r"\n|LINE \d+:", str(error).strip())[0].strip().rstrip(".!")
    return f"{first}."
