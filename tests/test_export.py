"""Exports match the store, and a report needs only a browser."""

from __future__ import annotations

import json
import re
import shlex

import duckdb
import numpy as np
import pandas as pd
import pytest

from lsq_core import charts
from lsq_core.cli.parser import build_parser
from lsq_core.cli.program import main
from lsq_core.jobs import arguments
from lsq_core.results import export, report
from lsq_core.store.store import Store
from tests.browser.conftest import open_browser
from tests.test_compare import insert_synthetic_runs


@pytest.fixture
def store() -> Store:
    store = Store()
    insert_synthetic_runs(store, 13)
    return store


@pytest.fixture
def frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "run": ["a, b", 'say "x"', "é"],
            "perplexity": [1 / 3, np.nan, 2.0],
            "tokens": [1, 2, 3],
            "when": pd.to_datetime(["2026-01-01 00:00:01"] * 3),
            "starred": [True, False, True],
        }
    )


def test_csv_and_parquet_round_trip(frame, tmp_path):
    for name, data in (("t.csv", export.csv_bytes(frame)), ("t.parquet", None)):
        path = tmp_path / name
        path.write_bytes(data or export.parquet_bytes(frame))
        back = duckdb.sql(f"SELECT * FROM '{path}'").df()
        assert back["run"].tolist() == frame["run"].tolist()
        assert back["perplexity"].to_numpy() == pytest.approx(
            frame["perplexity"].to_numpy(), rel=0, abs=0, nan_ok=True
        )
        assert back["tokens"].tolist() == [1, 2, 3]
        assert back["starred"].tolist() == [True, False, True]
        assert back["when"].tolist() == frame["when"].tolist()


def test_parquet_empty_table_keeps_columns(frame, tmp_path):
    path = tmp_path / "t.parquet"
    path.write_bytes(export.parquet_bytes(frame.head(0)))
    assert duckdb.sql(f"SELECT * FROM '{path}'").columns == list(frame)


def test_bibtex_entries(store):
    row = store.results().iloc[0]
    text = export.bibtex(store.record(row["evaluation"]))
    assert {"2503.06518", "10.5220/0013159100003890", "hqq_blog"} <= set(
        re.findall(r"2503\.06518|10\.5220/\d+|hqq_blog", text)
    )
    assert f"@misc{{lsq-run-{row['run']}," in text
    assert row["fingerprint"] in text
    assert row["corpus_sha256"] in text
    assert text.count("{") == text.count("}")
    run = text[text.index("@misc{lsq-run-") :].splitlines()
    fields = [re.match(r"  (\w+) += \{.*\},$", line) for line in run[1:-1]]
    assert [field[1] for field in fields] == ["title", "year", "howpublished", "note"]


def test_tex_escapes_special_characters():
    assert export._escape_tex("a_b & 5%") == r"a\_b \& 5\%"


def test_reproducing_command_parses_back(store):
    """The command line's own parser accepts the command."""
    with store.connect() as connection:
        connection.execute("UPDATE evaluations SET provenance = '{\"max_tokens\": 4000}'")
    record = store.record("000000000003")
    words = shlex.split(arguments.reproduce_command(record))
    assert words[0] == "lsq"
    options = build_parser().parse_args(words[1:])
    content = record["plan"]["content"]
    assert (options.verb, options.method, options.base) == ("run", "uniform", content["base"])
    assert (options.quantizer, options.corpus, options.protocol) == ("hqq", "stdlib", "strided")
    assert (options.max_tokens, options.device, options.dtype) == (4000, "cpu", "float32")
    assert (options.axis, options.metadata) == (content["axis"], content["metadata"])


def test_reproducing_command_keeps_ties_and_server(store):
    record = store.record("000000000003")
    restrictions = {"ties": ["q_proj,k_proj", "gate_proj,up_proj"], "serve": "vllm"}
    record["plan"]["content"]["request"] |= restrictions
    options = build_parser().parse_args(shlex.split(arguments.reproduce_command(record))[1:])
    assert (options.tie, options.serve) == (restrictions["ties"], "vllm")


def test_reproducing_unknown_method_is_comment(store):
    with store.connect() as connection:
        connection.execute("UPDATE runs SET method = 'gptq'")
    assert arguments.reproduce_command(store.record("000000000003")).startswith("# gptq ")


# --- report pages ---------------------------------------------------------------------------

HTML_INJECTION = '<script>alert("x")</script> & <img src=http://evil.example/x>'


def render_report(store: Store, evaluation: str = "000000000003") -> str:
    store.annotate(evaluation, HTML_INJECTION)
    record = store.record(evaluation)
    info = store.model(record["run"]["fingerprint"])
    runs = charts.add_run_labels(store.results())
    size_chart = charts.perplexity_by_size(runs, [evaluation])
    return report.run_report(record, info.matrices, arguments.reproduce_command(record), size_chart)


def test_run_report_contains_run_data(store):
    text = render_report(store)
    row = store.query("SELECT * FROM evaluations WHERE id = '000000000003'").iloc[0]
    matrices = store.query("SELECT name FROM matrices")["name"]
    for expected_text in (
        f"{row['perplexity']:.4f}",
        row["corpus_sha256"],
        row["fingerprint"],
        *matrices,
    ):
        assert expected_text in text
    assert "lsq run --model demo" in text
    assert "<script>alert" not in text
    assert "<img src=http" not in text


@pytest.mark.browser
def test_run_report_offline_renders_without_requests(store, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(render_report(store), "utf8")
    with open_browser(tmp_path / "chromium") as driver:
        driver.execute_cdp_cmd("Network.enable", {})
        driver.execute_cdp_cmd(
            "Network.emulateNetworkConditions",
            {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
        )
        driver.get(path.as_uri())
        mark_counts = driver.execute_script(
            "return [...document.querySelectorAll('.js-plotly-plot')].map("
            "p => p.querySelectorAll('.point, .hm image, .hm rect, .slice').length)"
        )
        requested_urls = driver.execute_script(
            "return performance.getEntriesByType('resource').map(e => e.name)"
        )
        title = driver.find_element("css selector", "h1").text
        errors = [e for e in driver.get_log("browser") if e["level"] == "SEVERE"]
    assert len(mark_counts) == 3
    assert all(mark_counts), mark_counts
    assert [name for name in requested_urls if not name.startswith(("data:", "blob:"))] == []
    assert errors == []
    assert "3.13 bits" in title


def test_figure_html_is_self_contained():
    figure = charts.plan_ring(pd.Series({"b3g128": 1.0}), "bytes")
    text = export.figure_html(figure, "a ring")
    assert 'src="http' not in text
    assert "default-src 'none'" in text
    assert "cdn.plot.ly/plotly" not in text
    assert json.dumps("b3g128 (3.13)")[1:-1] in text
    assert '"showSendToCloud": false' in text
    assert figure.layout.font.color is None, "the page's own figure stays as it was"


def test_comparison_report_lists_runs(store):
    runs = charts.add_run_labels(store.results())
    figure = charts.perplexity_by_size(runs)
    text = report.comparison_report("Best", "under", {"By size": figure}, runs[["run", "note"]])
    assert all(run in text for run in runs["run"])


# --- the command line -----------------------------------------------------------------------


def test_cli_export(store, tmp_path, capsys):
    for kind in ("csv", "parquet"):
        path = tmp_path / f"runs.{kind}"
        assert main(["export", "--out", str(path)]) == 0
        rows = duckdb.sql(f"SELECT * FROM '{path}'").df()
        assert set(rows["run"]) == set(store.results()["run"])
    run = "000000000003"
    assert main(["export", "--run", run, "--out", str(tmp_path / "run.bib")]) == 0
    assert (tmp_path / "run.bib").read_text("utf8") == export.bibtex(store.record(run))
    assert main(["export", "--run", run, "--out", str(tmp_path / "run.html")]) == 0
    assert f"run {run}" in (tmp_path / "run.html").read_text("utf8")
    capsys.readouterr()
    for wrong in (["run.html"], ["runs.xlsx"], ["runs.csv"], ["new.csv", "--run", run]):
        assert main(["export", "--out", str(tmp_path / wrong[0]), *wrong[1:]]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["export", "--run", "none", "--out", str(tmp_path / "x.bib")]) == 2
    assert not (tmp_path / "x.bib").exists()
