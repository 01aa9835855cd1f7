"""The SQL page: query results, one-sentence errors for attacks and typos, unchanged files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import duckdb
import pandas as pd
import psutil
import pytest

from lsq_core.errors import InputError
from lsq_core.store import sql, sql_child
from lsq_core.store.store import Store
from tests.conftest import ROOT
from tests.test_app import first_line
from tests.test_compare import insert_synthetic_runs


@pytest.fixture(scope="module")
def database_and_snapshot(tmp_path_factory) -> tuple[Path, Path]:
    """Return a database with runs, and its snapshot; each test uses copies of the files."""
    folder = tmp_path_factory.mktemp("sql")
    store = Store(folder / "lsq.duckdb")
    insert_synthetic_runs(store, 12)
    store.snapshot(folder / "copy.duckdb")
    return store.path, folder / "copy.duckdb"


@pytest.fixture
def store(database_and_snapshot) -> Store:
    return Store(Path(shutil.copy(database_and_snapshot[0], os.environ["LSQ_DB"])))


@pytest.fixture
def copy(database_and_snapshot, tmp_path) -> Path:
    return Path(shutil.copy(database_and_snapshot[1], tmp_path / "copy.duckdb"))


def test_ask_matches_store(store, copy):
    text = "SELECT method, count(*) AS n FROM results GROUP BY ALL ORDER BY method"
    answer = sql.run_query(copy, text)
    expected = store.results().groupby("method").size()
    assert dict(answer.rows.itertuples(index=False)) == expected.to_dict()
    assert not answer.truncated


def test_results_view_matches_store(store, copy):
    ordered = "SELECT * FROM results ORDER BY evaluation"
    rows = sql.run_query(copy, ordered).rows
    expected = store.results().sort_values("evaluation").reset_index(drop=True)
    pd.testing.assert_frame_equal(rows, expected)


@pytest.fixture(scope="module")
def known_snapshot(tmp_path_factory) -> Path:
    """Return a snapshot of a store of two models with known results for each example query."""
    folder = tmp_path_factory.mktemp("known")
    store = Store(folder / "known.duckdb")
    text, short = ("abc", "strided", 1000), ("abc", "strided", 100)
    runs = [  # run, model, method, bits, text, perplexity
        ("a", "one", "mxq", 3.2, text, 20.0),
        ("b", "one", "uniform", 4.1, text, 15.0),
        ("c", "one", "uniform", 3.1, text, 25.0),
        ("d", "one", "uniform", 3.1, short, 5.0),  # fewer tokens: not comparable to the others
        ("e", "one", "mxq", 3.2, ("other text", "strided", 1000), 7.0),  # same corpus name
        ("f", "one", "mxq", 3.2, ("abc", "blocks", 1000), 18.0),
        ("g", "two", "mxq", 3.4, text, 9.0),
    ]
    modules = {"l.0.q": (0, 8), "l.0.k": (0, 4), "l.1.q": (1, 3)}
    plan = {m: {"layer": layer, "bits": bits} for m, (layer, bits) in modules.items()}
    with store.transaction() as connection:
        for model in ("one", "two"):
            connection.execute(
                "INSERT INTO models (fingerprint, source) VALUES (?, ?)", [f"of {model}", model]
            )
        for second, (run, model, method, bits, (sha, protocol, tokens), perplexity) in enumerate(
            runs
        ):
            content = json.dumps({"modules": plan if run == "f" else {}})
            shared, created = f"of {model}", f"2026-01-01 00:00:{second:02d}"
            connection.execute(
                "INSERT INTO plans (id, fingerprint, bits_per_param, content, created) "
                "VALUES (?, ?, ?, ?, ?)",
                [run, shared, bits, content, created],
            )
            connection.execute(
                "INSERT INTO runs (id, plan, fingerprint, method, created) VALUES (?, ?, ?, ?, ?)",
                [run, run, shared, method, created],
            )
            connection.execute(
                "INSERT INTO evaluations (id, run, fingerprint, corpus, corpus_sha256, protocol, "
                "tokens, perplexity, created) VALUES (?, ?, ?, 'stdlib', ?, ?, ?, ?, ?)",
                [run, run, shared, sha, protocol, tokens, perplexity, created],
            )
        detail = json.dumps({"dtype": "float32", "corpus": "stdlib"})
        connection.execute(
            "INSERT INTO profiles (id, fingerprint, provenance) VALUES ('p', 'of one', ?)", [detail]
        )
        for module, metric, config, value in [
            ("l.0.q", "sensitivity", "b4g64", 0.5),
            ("l.0.k", "sensitivity", "b4g64", 0.7),
            ("l.1.q", "sensitivity", "b4g64", float("nan")),  # an expert that received no tokens
            ("l.1.q", "sensitivity", "b2g64", 9.0),
            ("l.1.q", "weight_error", "b4g64", 9.0),
        ]:
            connection.execute(
                "INSERT INTO scores (profile, module, metric, config, value) VALUES "
                "('p', ?, ?, ?, ?)",
                [module, metric, config, value],
            )
    store.snapshot(folder / "copy.duckdb")
    return folder / "copy.duckdb"


#: Expected columns and rows, in order, of each example query on :func:`known_snapshot`.
ANSWERS = {
    "Best run of each model": (
        ["model", "protocol", "tokens", "method", "bits", "perplexity"],
        [
            ("one", "blocks", 1000, "mxq", 3.2, 18.0),
            ("one", "strided", 100, "uniform", 3.1, 5.0),
            ("one", "strided", 1000, "mxq", 3.2, 7.0),
            ("one", "strided", 1000, "uniform", 4.1, 15.0),
            ("two", "strided", 1000, "mxq", 3.4, 9.0),
        ],
    ),
    "Best run under 3.3 bits": (
        ["model", "method", "bits_per_param", "perplexity", "protocol", "tokens"],
        [
            ("one", "mxq", 3.2, 7.0, "strided", 1000),
            ("one", "mxq", 3.2, 18.0, "blocks", 1000),
            ("one", "mxq", 3.2, 20.0, "strided", 1000),
            ("one", "uniform", 3.1, 5.0, "strided", 100),
        ],
    ),
    "Bits by layer of the newest plan": (["layer", "mean_bits"], [(0, 6.0), (1, 3.0)]),
    "Most sensitive modules": (
        ["model", "dtype", "module", "config", "sensitivity"],
        [("one", "float32", "l.0.k", "b4g64", 0.7), ("one", "float32", "l.0.q", "b4g64", 0.5)],
    ),
}


@pytest.mark.parametrize("example", sql.EXAMPLES, ids=lambda example: example.title)
def test_example_queries_results(known_snapshot, example):
    rows = sql.run_query(known_snapshot, example.sql).rows
    if example.title == "What there is":
        listed = set(rows["table_name"])
        assert {"models", "profiles", "scores", "plans", "runs", "evaluations", "results"} <= listed
        columns = rows.loc[rows["table_name"] == "models", "column_name"].tolist()
        assert columns[:3] == ["fingerprint", "source", "revision"]
        return
    columns, expected = ANSWERS[example.title]
    assert list(rows[columns].itertuples(index=False, name=None)) == expected


def test_snapshot_unaffected_by_later_writes(store, copy):
    with duckdb.connect(str(copy), read_only=True):
        store.delete_runs(["000000000000"])  # a write while the copy is open
        assert len(store.results()) == 11
        assert sql.run_query(copy, "SELECT count(*) FROM results").rows.iloc[0, 0] == 12


ATTACKS = [
    "COPY runs TO '{out}'",
    "COPY (SELECT 1) TO '{copy}'",
    "EXPORT DATABASE '{out}'",
    "SELECT * FROM read_csv('{secret}')",
    "SELECT * FROM read_text('{secret}')",
    "SELECT * FROM read_blob('{secret}')",
    "SELECT * FROM read_json('{secret}')",
    "SELECT * FROM read_parquet('{secret}')",
    "SELECT * FROM sniff_csv('{secret}')",
    "SELECT * FROM '{secret}'",
    "FROM '{store}'",
    "SELECT * FROM read_duckdb('{store}')",
    "SELECT * FROM glob('{folder}/*')",
    "SELECT * FROM query('COPY runs TO ''{out}''')",
    "SELECT * FROM query_table('{secret}')",
    "ATTACH '{store}' AS other",
    "ATTACH '{out}' AS other",
    "ATTACH ':memory:' AS other",
    "ATTACH '{copy}' AS other (READ_WRITE)",
    "DETACH copy",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{secret}'",
    "SET enable_external_access = true",
    "SET lock_configuration = false",
    "RESET enable_external_access",
    "PRAGMA enable_profiling",
    "PRAGMA profiling_output = '{out}'",
    "CALL enable_logging()",
    "CHECKPOINT",
    "VACUUM",
    "CREATE TABLE t (x INTEGER)",
    "CREATE TEMP TABLE t AS SELECT 1",
    "CREATE SECRET s (TYPE http)",
    "CREATE MACRO f() AS 1",
    "INSERT INTO schema_version VALUES (99)",
    "UPDATE runs SET note = 'x'",
    "DELETE FROM runs",
    "DROP TABLE runs",
    "ALTER TABLE runs ADD COLUMN x INTEGER",
    "PREPARE p AS SELECT 1",
    "EXPLAIN ANALYZE COPY runs TO '{out}'",
    "EXPLAIN COPY runs TO '{out}'",
    "WITH gone AS (DELETE FROM runs RETURNING *) SELECT * FROM gone",
    "SELECT 1; DROP TABLE runs",
    "SELECT 1;;COPY runs TO '{out}'",
    "BEGIN",
    "USE temp",
    "",
    "-- nothing",
]


def _query_output(copy: Path, text: str) -> str:
    """Return the rows or error of a query, run in this process because a new one is slower."""
    request = {"snapshot": str(copy), "sql": text, "rows": 100, "seconds": 10.0}
    try:
        answer = sql_child.execute_query(request | {"memory": 1 << 30, "bytes": 1 << 20})
        return sql._frame(answer).to_string()
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_changes_and_reads_nothing(store, copy, tmp_path, attack):
    secret, out = tmp_path / "secret.csv", tmp_path / "out.csv"
    secret.write_text("a\nverysecret\n", "utf8")
    before = copy.read_bytes(), store.path.read_bytes(), set(tmp_path.iterdir())
    paths = {"secret": secret, "out": out, "copy": copy, "store": store.path, "folder": tmp_path}
    text = attack.format(**paths)
    output = _query_output(copy, text)
    assert "verysecret" not in output
    assert "\n" not in output, "an error is a sentence"
    after = copy.read_bytes(), store.path.read_bytes(), set(tmp_path.iterdir())
    assert after == before


def test_ask_does_not_see_python_variables(copy):
    secret = pd.DataFrame({"a": [1]})
    assert len(secret)
    with pytest.raises(InputError, match="secret"):
        sql.run_query(copy, "SELECT * FROM secret")


SLOW_QUERIES = (
    "WITH RECURSIVE n AS (SELECT 1 AS x UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n",
    "SELECT count(*) FROM range(1000000000000)",
    "SELECT max(a.range * b.range) FROM range(10000000) a, range(10000000) b",
    "SELECT levenshtein(repeat('ab', 200000), repeat('ba', 200000))",  # can't be interrupted
)


@pytest.fixture
def no_leftover_processes():
    """Assert that no new child processes remain; other tests may have left a browser open."""
    before = set(psutil.Process().children())
    yield
    assert not set(psutil.Process().children()) - before


@pytest.mark.usefixtures("no_leftover_processes")
@pytest.mark.parametrize("text", SLOW_QUERIES)
def test_ask_time_limit_raises(copy, text):
    started = time.monotonic()
    with pytest.raises(InputError, match=r"longer than 0\.5 s"):
        sql.run_query(copy, text, time_limit=0.5)
    assert time.monotonic() - started < 20
    assert threading.active_count() < 20


def test_ask_row_limit_cuts_result(copy):
    answer = sql.run_query(copy, "SELECT * FROM range(1000000) ORDER BY 1 DESC", row_limit=100)
    assert answer.truncated
    assert answer.rows.iloc[:, 0].tolist() == list(range(999_999, 999_899, -1))
    uncut = sql.run_query(copy, "SELECT * FROM range(100)", row_limit=100)
    assert (len(uncut.rows), uncut.truncated) == (100, False)


@pytest.mark.parametrize("text", ["SELECT range(1000000000)", "SELECT repeat('x', 2000000000)"])
def test_ask_memory_limit_raises(copy, text):
    """DuckDB's own memory limit covers neither query."""
    with pytest.raises(InputError, match=r"memory than its limit of \d+ MiB") as detail:
        sql.run_query(copy, text, time_limit=60)
    assert "\n" not in str(detail.value)


def test_ask_byte_limit_raises(copy):
    text = "SELECT repeat('x', 10000) FROM range(1000)"
    with pytest.raises(InputError, match=r"larger than 1 MiB"):
        sql.run_query(copy, text, byte_limit=1 << 20)
    assert len(sql.run_query(copy, text, byte_limit=32 << 20).rows) == 1000


class PageChanged(Exception):
    """Stands in for the exception that ends a page's run."""


@pytest.mark.usefixtures("no_leftover_processes")
def test_ask_stops_when_page_run_ends(copy):
    polls = 0

    def change_page() -> None:
        nonlocal polls
        polls += 1
        if polls > 3:
            raise PageChanged

    with pytest.raises(PageChanged):
        sql.run_query(copy, SLOW_QUERIES[0], time_limit=60, on_wait=change_page)


def test_sql_child_imports_no_torch_or_pandas():
    code = (
        "import sys, lsq_core.store.sql_child; "
        "print(sorted({'torch', 'pandas'} & set(sys.modules)))"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert completed.stdout == "[]\n"


# --- the page -------------------------------------------------------------------------------


def open_query():
    from streamlit.testing.v1 import AppTest

    app = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    app.switch_page("pages/5_SQL.py").run()
    assert not app.exception
    return app


def test_sql_page_shows_result(store):
    app = open_query()
    assert first_line(app) == "1 row."
    app.text_area(key="sql").set_value("SELECT id FROM runs ORDER BY id").run()
    assert first_line(app) == "12 rows."
    assert app.dataframe[0].value["id"].tolist() == sorted(store.results()["run"])
    store.delete_runs(["000000000003"])
    app.text_area(key="sql").set_value("SELECT count(*) AS n FROM results").run()
    assert app.dataframe[0].value["n"].tolist() == [11], "what is asked is what is there now"


def test_sql_page_example_buttons(store):
    app = open_query()
    for example in sql.EXAMPLES:
        app.button(key=f"example-{example.title}").click().run()
        assert app.text_area(key="sql").value == example.sql
        assert not app.error


def test_sql_typo_error(store):
    app = open_query()
    app.text_area(key="sql").set_value("SELEC 1").run()
    assert "query failed" in first_line(app)
    assert len(app.error) == 1
    assert "\n" not in app.error[0].value
    assert not app.dataframe


def test_sql_page_cancelled_query_not_rerun(store):
    app = open_query()
    app.session_state["sql-cancelled"] = app.text_area(key="sql").value
    app.run()
    assert "cancelled" in first_line(app)
    assert not app.dataframe
    app.button(key="ask").click().run()
    assert first_line(app) == "1 row."
