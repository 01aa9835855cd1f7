"""The query page: questions are answered, attacks and slips are one sentence, files are safe."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import duckdb
import pandas as pd
import pytest

from lsq_core import sql
from lsq_core.errors import InputError
from lsq_core.store import Store
from tests.test_app import first_line
from tests.test_compare import fill


@pytest.fixture(scope="module")
def made_once(tmp_path_factory) -> tuple[Path, Path]:
    """A database with runs and its snapshot; each test has a copy of both files."""
    folder = tmp_path_factory.mktemp("sql")
    store = Store(folder / "lsq.duckdb")
    fill(store, 12)
    store.snapshot(folder / "copy.duckdb")
    return store.path, folder / "copy.duckdb"


@pytest.fixture
def store(made_once) -> Store:
    return Store(Path(shutil.copy(made_once[0], os.environ["LSQ_DB"])))


@pytest.fixture
def copy(made_once, tmp_path) -> Path:
    return Path(shutil.copy(made_once[1], tmp_path / "copy.duckdb"))


def test_an_answer_is_what_the_store_says(store, copy):
    text = "SELECT method, count(*) AS n FROM results GROUP BY ALL ORDER BY method"
    answer = sql.ask(copy, text)
    expected = store.results().groupby("method").size()
    assert dict(answer.rows.itertuples(index=False)) == expected.to_dict()
    assert not answer.cut


def test_the_view_is_the_results_of_the_store(store, copy):
    ordered = "SELECT * FROM results ORDER BY evaluation"
    rows = sql.ask(copy, ordered).rows
    expected = store.results().sort_values("evaluation").reset_index(drop=True)
    pd.testing.assert_frame_equal(rows, expected)


@pytest.mark.parametrize("example", sql.EXAMPLES, ids=lambda example: example.title)
def test_examples_are_right(store, copy, example):
    answer = sql.ask(copy, example.sql)
    if "sensitive" not in example.title:  # the store of this test has no profile
        assert len(answer.rows)


def test_a_copy_is_of_one_moment_and_nobody_waits_for_it(store, copy):
    with duckdb.connect(str(copy), config=sql._LOCKED):
        store.delete_runs(["000000000000"])  # a writer, while the copy is open
        assert len(store.results()) == 11
        assert sql.ask(copy, "SELECT count(*) FROM results").rows.iloc[0, 0] == 12


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


def _said(copy: Path, text: str) -> str:
    """What is shown for a query: its rows, or its error."""
    try:
        return sql.ask(copy, text).rows.to_string()
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_changed_or_reached(store, copy, tmp_path, attack):
    secret, out = tmp_path / "secret.csv", tmp_path / "out.csv"
    secret.write_text("a\nverysecret\n", "utf8")
    before = copy.read_bytes(), store.path.read_bytes(), set(tmp_path.iterdir())
    places = {"secret": secret, "out": out, "copy": copy, "store": store.path, "folder": tmp_path}
    text = attack.format(**places)
    said = _said(copy, text)
    assert "verysecret" not in said
    assert "\n" not in said, "an error is a sentence"
    after = copy.read_bytes(), store.path.read_bytes(), set(tmp_path.iterdir())
    assert after == before


def test_a_variable_of_the_program_is_no_table(copy):
    secret = pd.DataFrame({"a": [1]})
    assert len(secret)
    with pytest.raises(InputError, match="secret"):
        sql.ask(copy, "SELECT * FROM secret")


ENDLESS = (
    "WITH RECURSIVE n AS (SELECT 1 AS x UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n",
    "SELECT count(*) FROM range(1000000000000)",
    "SELECT max(a.range * b.range) FROM range(10000000) a, range(10000000) b",
)


@pytest.mark.parametrize("text", ENDLESS)
def test_a_long_query_is_stopped(copy, text):
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"longer than 0\.5 s"):
        sql.ask(copy, text, time_limit=0.5)
    assert time.monotonic() - begin < 5
    assert threading.active_count() < 20


def test_a_long_answer_is_cut_and_says_so(copy):
    answer = sql.ask(copy, "SELECT * FROM range(1000000) ORDER BY 1 DESC", row_limit=100)
    assert answer.cut
    assert answer.rows.iloc[:, 0].tolist() == list(range(999_999, 999_899, -1))
    whole = sql.ask(copy, "SELECT * FROM range(100)", row_limit=100)
    assert (len(whole.rows), whole.cut) == (100, False)


def test_too_much_memory_is_one_sentence(copy):
    with pytest.raises(InputError, match=r"[Mm]emory") as told:
        sql.ask(copy, "SELECT list(range) FROM range(2000000000)", time_limit=60)
    assert "\n" not in str(told.value)


# --- the page -------------------------------------------------------------------------------


def open_query():
    from streamlit.testing.v1 import AppTest

    from tests.conftest import ROOT

    app = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    app.switch_page("pages/5_SQL.py").run()
    assert not app.exception
    return app


def test_the_page_answers(store):
    app = open_query()
    assert first_line(app) == "1 row found."
    app.text_area(key="sql").set_value("SELECT id FROM runs ORDER BY id").run()
    assert first_line(app) == "12 rows found."
    assert app.dataframe[0].value["id"].tolist() == sorted(store.results()["run"])
    store.delete_runs(["000000000003"])
    app.text_area(key="sql").set_value("SELECT count(*) AS n FROM results").run()
    assert app.dataframe[0].value["n"].tolist() == [11], "what is asked is what is there now"


def test_every_example_has_a_button(store):
    app = open_query()
    for example in sql.EXAMPLES:
        app.button(key=f"example-{example.title}").click().run()
        assert app.text_area(key="sql").value == example.sql
        assert not app.error


def test_a_slip_is_one_sentence(store):
    app = open_query()
    app.text_area(key="sql").set_value("SELEC 1").run()
    assert "no answer" in first_line(app)
    assert len(app.error) == 1
    assert "\n" not in app.error[0].value
    assert not app.dataframe
