"""The Compare page: each view shows what SQL queries on the store return."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.linalg import cho_factor, cho_solve

from lsq_core import disk
from lsq_core.bits import LADDER
from lsq_core.errors import InputError
from lsq_core.evaluation.prediction import MIN_PLANS, MeasuredPoints, fit
from lsq_core.jsontext import json_text
from lsq_core.model.loading import inspect_model
from lsq_core.model.source import ModelSource
from lsq_core.planning.make import make_plan
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.results import compare
from lsq_core.results.gains import first_pair, gain_at_equal_size
from lsq_core.store.store import Store
from tests.test_app import _array, chart, first_line, go_to_page, open_page

CORPUS, PROTOCOL = "stdlib", "strided-512/256"


def insert_synthetic_runs(
    store: Store, count: int, methods: tuple[str, ...] = ("uniform", "mxq"), first: int = 0
) -> pd.DataFrame:
    """Insert synthetic runs of the demo model, numbered ``first`` to ``count - 1``.

    Returns their id, bits, perplexity and method.
    """
    info = inspect_model(ModelSource("demo"))
    store.save_model(info)
    plans = [make_plan(Problem(info.matrices), PlanRequest("uniform", c.stop_name)) for c in LADDER]
    n = np.arange(first, count)
    own = [plans[i % len(plans)] for i in n]
    ids = [f"{i:012x}" for i in n]
    when = pd.Timestamp("2026-01-01") + pd.to_timedelta(n, "s")
    bits = np.array([plan.bits_per_param for plan in own]) + n * 1e-6
    perplexity = 58 + 200 * np.exp(-bits) + np.random.default_rng(0).random(count)[n]
    shared = {"id": ids, "fingerprint": info.fingerprint, "created": when}
    method = np.resize(np.array(methods, dtype=object), count)[n]
    texts = {id(plan): json_text(plan.to_json()) for plan in plans}
    rows = {
        "plans": shared
        | {"method": method, "bits_per_param": bits, "content": [texts[id(p)] for p in own]}
        | {"planned_bytes": [p.planned_bytes for p in own]},
        "runs": shared
        | {"plan": ids, "method": method, "quantizer": "hqq", "device": "cpu", "dtype": "float32"}
        | {"measured_bytes": [p.planned_bytes + i for i, p in enumerate(own)], "versions": "{}"},
        "evaluations": shared
        | {"run": ids, "corpus": CORPUS, "corpus_sha256": "abc", "protocol": PROTOCOL}
        | {"tokens": 51770, "perplexity": perplexity, "kl": np.exp(-bits), "truncated": False}
        | {"top1": 1 - np.exp(-bits), "provenance": '{"dtype": "float32", "max_tokens": null}'},
    }
    with store.transaction() as connection:
        for table, columns in rows.items():
            connection.register("frame", pd.DataFrame(columns))
            connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM frame")
            connection.unregister("frame")
    return pd.DataFrame({"id": ids, "bits": bits, "perplexity": perplexity, "method": method})


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def runs(store) -> pd.DataFrame:
    return insert_synthetic_runs(store, 24)


def values(app, column: str) -> list[float]:
    """Return the sorted ``x`` or ``y`` values of a chart's markers."""
    traces = [t for t in chart(app)["data"] if t.get("mode") == "markers" and "customdata" in t]
    return sorted(y for t in traces for y in _array(t[column]))


def table(app) -> pd.DataFrame:
    return next(d.value for d in app.dataframe if "Pareto front" in d.value)


def page_text(app) -> str:
    return " ".join([*(c.value for c in app.caption), *(m.value for m in app.markdown)])


# --- charts by size -------------------------------------------------------------------------


@pytest.mark.parametrize(("quality", "scale"), [("perplexity", 1), ("kl", 1), ("top1", 100)])
def test_compare_chart_by_quality_matches_store(store, runs, quality, scale):
    app = open_page("Compare")
    app.segmented_control(key="quality").set_value(quality).run()
    assert not app.exception
    stored = store.query(f"SELECT {quality} AS y FROM evaluations WHERE run IS NOT NULL")["y"]
    assert values(app, "y") == pytest.approx(sorted(stored * scale))
    title = chart(app)["layout"]["yaxis"]["title"]["text"]
    assert ("higher is better" in title) == (quality == "top1")


def test_compare_unmeasured_quality_not_offered(store, runs):
    with store.connect() as connection:
        connection.execute("UPDATE evaluations SET kl = NULL, top1 = NULL")
    app = open_page("Compare")
    assert "quality" not in {c.key for c in app.segmented_control}
    assert "Click a point" in page_text(app)


def test_compare_headline_run_open_by_default(store, runs):
    app = open_page("Compare")
    gain = gain_at_equal_size(store.results(), "measured_bytes")
    assert gain.drop > 0
    assert app.selectbox(key="opened").value == gain.evaluation
    app.selectbox(key="opened").set_value(runs["id"][3]).run()
    row = store.query("SELECT * FROM evaluations WHERE id = ?", [runs["id"][3]]).iloc[0]
    card = next(d.value for d in app.dataframe if "value" in d.value).set_index("")["value"]
    assert card["perplexity"] == f"{row['perplexity']:.4f}"
    assert card["KL divergence, nats"] == f"{row['kl']:.4f}"
    assert "--base 3.13" in app.code[0].value
    assert app.code[0].value.startswith("lsq run --model demo")


# --- gains, wins, two runs -------------------------------------------------------------------


def test_headline_is_gain_at_equal_size(store, runs):
    app = open_page("Compare")
    frame = store.results()
    gain = gain_at_equal_size(frame, "measured_bytes")
    rows = frame.set_index("evaluation")
    run, base = rows.loc[gain.evaluation], rows.loc[gain.uniform]
    assert (run["method"], base["method"]) == ("mxq", "uniform")
    share = 100 * (1 - run["perplexity"] / base["perplexity"])
    assert first_line(app).startswith(f"MXQ: {share:.1f} % lower perplexity")
    assert first_line(app).endswith(f"uniform {base['bits_per_param']:.2f}.")
    best = runs["perplexity"].min()
    assert f"perplexity {best:.2f} " in page_text(app)


def test_first_pair_is_a_run_and_its_nearest_uniform_run(store, runs):
    app = open_page("Compare")
    pair = first_pair(store.results(), "measured_bytes")
    assert (app.selectbox(key="run_a").value, app.selectbox(key="run_b").value) == pair
    uniform = store.results().set_index("evaluation").loc[pair[1]]
    assert uniform["method"] == "uniform"


def test_first_pair_without_uniform_runs_is_the_newest(store):
    insert_synthetic_runs(store, 4, ("mxq",))
    app = open_page("Compare")
    newest = store.results()["evaluation"].tolist()[:2]
    assert [app.selectbox(key=key).value for key in ("run_a", "run_b")] == newest
    assert first_line(app).startswith("Best within")


def test_ablation_is_explained_where_there_is_one(store, runs):
    assert "An ablation" not in page_text(open_page("Compare"))
    insert_synthetic_runs(store, 26, ("sensiboost-ablation", "sensiboost-rank"), first=24)
    app = open_page("Compare")
    assert page_text(app).count("An ablation") == page_text(app).count("A boost by rank") == 1
    faded = {t["name"]: t.get("opacity") for t in chart(app)["data"] if t["mode"] == "markers"}
    assert faded["SensiBoost ablation"] < 0.5 < faded["MXQ"]


def test_bits_view_gain_relative_to_uniform_base(store, runs):
    app = open_page("Compare", view="bits")
    app.toggle(key="raised").set_value(False).run()
    (stop,) = [b.value for b in app.selectbox if b.label == "Uniform base"]
    (config,) = [c for c in LADDER if c.stop_name == stop]
    same = (runs["bits"] - config.nominal_bits).abs() < 0.01
    base = runs[(runs["method"] == "uniform") & same].iloc[-1]  # the newest of several
    near = runs[(runs["bits"] / base["bits"] - 1).between(-0.001, 0.30)]
    near = near[(near["method"] != "uniform") | (near["id"] == base["id"])]
    expected = 100 * (1 - near["perplexity"] / base["perplexity"])
    assert len(near) > 2
    assert values(app, "y") == pytest.approx(sorted(expected))
    assert values(app, "x") == pytest.approx(sorted(100 * (near["bits"] / base["bits"] - 1)))


def test_bits_view_without_uniform_run_shows_info(store):
    insert_synthetic_runs(store, 3, ("mxq",))
    app = open_page("Compare", view="bits")
    assert "no uniform" in app.info[0].value
    assert not app.get("plotly_chart")


def test_wins_view_matches_figure_6(store):
    insert_synthetic_runs(store, 60, ("uniform", "sensiboost", "mxq", "uniform", "mxq"))
    app = open_page("Compare", view="wins")
    runs = Store().results()
    found = compare.figure_6(runs)
    bars = [json.loads(c.proto.spec) for c in app.get("plotly_chart")]
    assert len(bars) == 2
    for spec, (_, part) in zip(bars, found.groupby("equal"), strict=True):
        by_name = {t["name"]: _array(t["x"]) for t in spec["data"]}
        for outcome in ("wins", "ties", "losses"):
            shares = 100 * part[outcome] / part["total"]
            assert by_name[outcome] == pytest.approx(shares.tolist())


def test_two_runs_view_shows_plans_and_differences(store, runs):
    app = open_page("Compare", view="two")
    app.selectbox(key="run_a").set_value(runs["id"][0]).run()
    app.selectbox(key="run_b").set_value(runs["id"][3]).run()
    assert len(app.get("plotly_chart")) == 4
    specs = [json.loads(c.proto.spec) for c in app.get("plotly_chart")]
    rings = [s["data"][0] for s in specs if s["data"][0]["type"] == "pie"]
    assert [r["labels"] for r in rings] == [["b2g128 (2.13)"], ["b3g128 (3.13)"]]
    differing = next(d.value for d in app.dataframe if {"module", "against"} <= set(d.value))
    modules = store.query(
        "SELECT count(*) n FROM matrices m JOIN models USING (fingerprint) WHERE source = 'demo'"
    )["n"][0]
    assert len(differing) == modules
    assert set(differing["run"]) == {"b2g128"}
    settings = next(d.value for d in app.dataframe if "setting" in d.value)
    assert dict(zip(settings["setting"], settings["against"], strict=True))["base"] == "3.13"


def test_shares_of_bytes():
    modules = pd.DataFrame({"module": ["a", "b"], "config": ["b2g128", "b4g64"]})
    shares = compare.byte_shares(modules, {"a": 300, "b": 100})
    two, four = (c.nominal_bits for c in LADDER if c.name in ("b2g128", "b4g64"))
    assert shares.to_dict() == pytest.approx(
        {"b2g128": 3 * two / (3 * two + four), "b4g64": four / (3 * two + four)}
    )


# --- predictions ----------------------------------------------------------------------------


def _points(count: int = 12) -> MeasuredPoints:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(count, 2)).cumsum(axis=0)
    x[1] = x[0]  # the same plan run twice
    cost = np.exp(x.sum(axis=1) / 2 - 2 + 0.1 * rng.normal(size=count))
    full = np.full(count, 10.0)
    ids = tuple(map(str, range(count)))
    return MeasuredPoints(x, full * np.exp(cost), full, np.zeros(count, bool), evaluations=ids)


def test_leave_one_out_matches_refit():
    """It matches a process refitted without the plan, with the same length and noise."""
    predictor = fit(_points())
    mean, deviation = predictor.process.leave_one_out_moments()
    own = predictor.process
    for i in range(len(mean)):
        kept = ~(own.x == own.x[i]).all(axis=1)
        refit = type(own)(own.x[kept], own.y[kept], own.length, own.noise)
        expected, spread = refit.at(own.x[[i]])
        assert mean[i] == pytest.approx(expected[0], rel=1e-6)
        ratio = np.sqrt(own.variance / refit.variance)
        assert deviation[i] == pytest.approx(spread[0] * ratio, rel=1e-6)
    indices, predicted = predictor.leave_one_out()
    assert indices.tolist() == list(range(len(mean)))
    assert (predicted.low < predicted.perplexity).all()
    assert (predicted.perplexity < predicted.high).all()


def test_projected_kernel_inverse_orthogonal_to_constant():
    """The projected inverse has no component along the constant."""
    own = fit(_points()).process
    inverse = cho_solve(cho_factor(own._kernel(own.x) + own.noise * np.eye(len(own.x))), np.eye(12))
    projected = inverse - np.outer(own.ones, own.ones) / own.ones.sum()
    assert np.abs(projected.sum(axis=0)).max() < 1e-6 * np.abs(inverse).max()


def test_predicted_view_too_few_runs_shows_info(store):
    insert_synthetic_runs(store, MIN_PLANS - 1)
    app = open_page("Compare", view="predicted")
    assert "profile" in app.info[0].value
    assert not app.get("plotly_chart")


# --- the table ------------------------------------------------------------------------------


def test_compare_table_filters(store, runs):
    app = open_page("Compare")
    assert sorted(table(app)["perplexity"]) == pytest.approx(sorted(runs["perplexity"]))
    app.multiselect(key="table_method").set_value(["mxq"]).run()
    assert len(table(app)) == (runs["method"] == "mxq").sum()
    app.multiselect(key="table_method").set_value([]).run()
    app.text_input(key="table_text").set_value(runs["id"][5]).run()
    assert table(app)["run id"].tolist() == [runs["id"][5]]
    app.text_input(key="table_text").set_value("no such thing").run()
    assert table(app).empty
    assert "No results." in [c.value for c in app.caption]
    assert not app.exception


def test_compare_star_and_note_stored(store, runs):
    app = open_page("Compare")
    opened = app.selectbox(key="opened").value
    app.button(key="star").click().run()
    nasty = "the one'; DROP TABLE runs; --"
    app.text_input(key=f"note-{opened}").set_value(nasty).run()
    row = store.query("SELECT starred, note FROM runs WHERE id = ?", [opened]).iloc[0]
    assert (row["starred"], row["note"]) == (True, nasty)
    app.toggle(key="table_starred").set_value(True).run()
    assert table(app)["run id"].tolist() == [opened]
    assert table(app)["note"].tolist() == [nasty]
    app.button(key="star").click().run()
    assert store.query("SELECT count(*) n FROM runs WHERE starred")["n"][0] == 0


def test_compare_delete_and_undo(store, runs):
    app = open_page("Compare")
    opened = app.selectbox(key="opened").value
    app.button(key="delete").click().run()
    assert not app.exception
    assert opened not in table(app)["run id"].tolist()
    assert opened not in app.selectbox(key="opened").options
    assert len(values(app, "y")) == len(runs) - 1
    assert opened not in store.run_configs(store.model(_demo_fingerprint()).fingerprint)
    app.button(key="delete").click().run()
    assert "and 1 earlier" in page_text(app)
    app = open_page("Compare")  # deletions can be undone from another session
    app.button(key="undo").click().run()
    app.button(key="undo").click().run()
    assert sorted(table(app)["run id"]) == sorted(runs["id"])
    assert "undo" not in {b.key for b in app.button}


def _demo_fingerprint() -> str:
    return inspect_model(ModelSource("demo")).fingerprint


def test_compare_undo_after_deleting_all_runs(store):
    runs = insert_synthetic_runs(store, 2)
    store.delete_runs(list(runs["id"]))
    app = open_page("Compare")
    assert "No runs to compare" in first_line(app)
    app.button(key="undo").click().run()
    assert "perplexity" in first_line(app)


def test_delete_runs_published_raises(store, runs):
    with store.connect() as connection:
        connection.execute("UPDATE runs SET origin = 'published' WHERE id = ?", [runs["id"][0]])
    with pytest.raises(InputError, match="can't be deleted"):
        store.delete_runs(list(runs["id"][:2]))
    assert store.deleted_runs().empty, "all or nothing"


# --- many runs ------------------------------------------------------------------------------


@pytest.mark.bench
@pytest.mark.slow
def test_compare_opens_in_time_with_5000_runs(store):
    """Fills a store with 5,000 runs, which takes ten seconds; a page may take 2 s, here 3 × that.

    The first page of a process imports what all pages need, so one is opened before timing.
    """
    insert_synthetic_runs(store, 5000, ("uniform", "sensiboost", "kurtboost", "mxq"))
    app = open_page("Model")
    started = time.perf_counter()
    go_to_page(app, "Compare")
    first = time.perf_counter() - started
    assert len(values(app, "y")) == 5000
    assert len(table(app)) == 5000
    started = time.perf_counter()
    app.run()
    assert time.perf_counter() - started < 3, "drawn again"
    assert first < 6


def test_delete_runs_keeps_job_folders(store):
    """Deleting a run touches no job's folder."""
    folder = disk.jobs_folder(store)
    insert_synthetic_runs(store, 1)
    (folder / "kept").mkdir(parents=True)
    store.delete_runs(["000000000000"])
    assert (folder / "kept").is_dir()
    shutil.rmtree(Path(folder))


# --- the sidebar's model, and GGUF baselines ------------------------------------------------


def test_compare_has_the_sidebars_model(store, runs):
    app = open_page("Compare")
    assert not [box for box in app.main.selectbox if box.label == "Model"]
    with store.transaction() as connection:
        connection.execute("UPDATE models SET source = 'org/other'")
    app = open_page("Compare")
    assert "No runs of demo" in app.title[0].value
    app.button(key="compare-org/other").click().run()
    assert app.session_state["model"] == "org/other"
    assert app.query_params["model"] in ("org/other", ["org/other"])
    assert len(table(app)) == len(runs)


def test_compare_opens_on_the_newest_measurement_with_two_runs(store, runs):
    with store.transaction() as connection:
        connection.execute(
            "UPDATE evaluations SET corpus_sha256 = 'alone', created = now() WHERE id = ?",
            [runs["id"].iloc[3]],
        )
    assert len(table(open_page("Compare"))) == len(runs) - 1


@pytest.fixture
def gguf_file(store, runs) -> dict:
    """Turn the runs' model into that of a GGUF file, evaluated in the same way as the runs."""
    file = {"name": "m.gguf", "sha256": "0", "bytes": 9 * 2**20, "block_bytes": 3 * 2**20}
    file["type"] = "Q4_1"
    with store.transaction() as connection:
        connection.execute(
            "UPDATE models SET file_bytes = ?, config = json_merge_patch(config, ?)",
            [file["bytes"], json.dumps({"gguf": file})],
        )
        for id, perplexity, tokens in (("old", 70.0, 51770), ("new", 60.0, 51770), ("o", 1.0, 9)):
            connection.execute(
                "INSERT INTO evaluations BY NAME SELECT * REPLACE (? AS id, NULL AS run, "
                "? AS perplexity, ? AS tokens, created + (CASE ? WHEN 'new' THEN 1 ELSE 0 END) * "
                "INTERVAL 1 DAY AS created) FROM evaluations WHERE id = ?",
                [id, perplexity, tokens, id, runs["id"].iloc[0]],
            )
    return file


def test_gguf_file_stands_beside_the_runs(store, runs, gguf_file):
    found = store.gguf_baselines(runs["id"].iloc[0])
    assert found["perplexity"].tolist() == [60.0], "the newest as the runs were evaluated"
    assert found["block_bytes"].tolist() == [gguf_file["block_bytes"]]
    app = open_page("Compare")
    (drawn,) = [t for t in chart(app)["data"] if t.get("name") == "GGUF file"]
    assert _array(drawn["x"]) == [3.0]
    assert _array(drawn["y"]) == [60.0]
    app.segmented_control(key="quality").set_value("kl").run()
    assert not [t for t in chart(app)["data"] if t.get("name") == "GGUF file"]


def test_gguf_file_of_another_shape_does_not(store, runs, gguf_file):
    with store.transaction() as connection:
        connection.execute(
            "INSERT INTO models BY NAME SELECT * REPLACE ('other' AS fingerprint, 'big.gguf' AS "
            "source, layers + 1 AS layers) FROM models"
        )
        connection.execute(
            "INSERT INTO evaluations BY NAME SELECT * REPLACE ('x' AS id, 'other' AS fingerprint) "
            "FROM evaluations WHERE id = 'new'"
        )
    assert len(store.gguf_baselines(runs["id"].iloc[0])) == 1
