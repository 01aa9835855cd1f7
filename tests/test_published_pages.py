"""The pages show the published measurements in the store, and nothing else."""

from __future__ import annotations

import functools
import json
import re
import socket
from pathlib import Path

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from lsq_core import charts
from lsq_core.bits import LADDER
from lsq_core.errors import InputError
from lsq_core.model.source import ModelSource
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.reference.importing import import_download, import_reference
from lsq_core.results.compare import win_tie_loss, win_tie_loss_at_equal_bytes
from lsq_core.store.store import Store
from lsq_core.ui import cached, cached_plans
from tests.test_app import _array, chart, first_line, go_to_page, open_page
from tests.test_reference_download import write_toolkit

SEVEN, EIGHT, SEVENTY, CHAT = (
    "published:Llama-2-7b-hf",
    "published:Meta-Llama-3-8B",
    "published:Llama-2-70b-hf",
    "published:Llama-2-7b-chat-hf",
)
MODELS = [SEVEN, EIGHT, SEVENTY, CHAT]


@pytest.fixture
def store(published: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The imported measurements, set as the database of this test's pages."""
    monkeypatch.setenv("LSQ_DB", str(published))
    return Store(published)


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A small made-up checkout, so that no published file is needed."""
    write_toolkit(tmp_path / "toolkit")
    return tmp_path / "toolkit"


def select_box(app: AppTest, label: str):
    """Return the select box with the given label outside the sidebar."""
    return next(b for b in app.main.selectbox if b.label == label)


def figures(app: AppTest) -> dict[str, str]:
    return {metric.label: metric.value for metric in app.metric}


def page_text(app: AppTest) -> str:
    return " ".join([*(c.value for c in app.caption), *(m.value for m in app.markdown)])


# --- the Model page and the sidebar -----------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_model_page_published_model_facts(store, model):
    app = open_page("Model", model=model)
    row = store.query("SELECT * FROM models WHERE fingerprint = ?", [model]).iloc[0]
    profiles, runs = (
        store.query(sql, [model]).iloc[0, 0]
        for sql in (
            "SELECT count(*) FROM profiles WHERE fingerprint = ?",
            "SELECT count(DISTINCT run) FROM evaluations WHERE fingerprint = ?",
        )
    )
    shown = figures(app)
    assert shown["Layers"] == str(row["layers"])
    assert shown["Linear parameters"] == f"{row['linear_parameters']:,}"
    assert (shown["Published profiles"], shown["Published runs"]) == (str(profiles), str(runs))
    if row["file_bytes"]:
        assert shown["Parameters"] == f"{row['parameters']:,}"
    else:
        assert (shown["Parameters"], shown["Quantizable weights"]) == ("not published", "unknown")
        assert any("without embeddings" in line.value for line in app.subheader)
    assert "no local weights" in page_text(app)
    figures_drawn = [json.loads(c.proto.spec)["data"] for c in app.get("plotly_chart")]
    linear = _array(next(data for data in figures_drawn if data[0]["type"] == "bar")[0]["y"])
    assert len(linear) == len(LADDER) + bool(row["file_bytes"])
    smallest = row["linear_parameters"] * LADDER[0].nominal_bits / 8 / 2**30
    assert linear[-len(LADDER)] == pytest.approx(smallest, rel=1e-3)


def test_model_page_lists_published_models(store):
    app = open_page("Model")
    published = set(store.models("published")["source"])
    assert published < set(app.sidebar.selectbox(key="model").options)
    assert {b.key.removeprefix("known-") for b in app.button if b.key} >= published
    app.button(key=f"known-{SEVENTY}").click().run()
    assert app.session_state["model"] == SEVENTY
    assert app.query_params["model"] in (SEVENTY, [SEVENTY])
    assert figures(app)["Layers"] == "80"


@pytest.mark.parametrize("title", ["Model", "Explore", "Run", "Compare"])
def test_published_model_name_without_prefix(store, title):
    whole, bare = (
        open_page(title, model=name) for name in (SEVEN, SEVEN.removeprefix("published:"))
    )
    assert first_line(bare) == first_line(whole)
    assert not bare.error


def test_model_page_unimported_model_shows_error(store):
    app = open_page("Model", model="published:nothing")
    assert "'nothing'" in app.error[0].value.replace("\\", "")


# --- the import -----------------------------------------------------------------------------


def test_model_page_import_folder_lists_missing(toolkit):
    app = open_page("Model")
    assert app.button(key="import").disabled
    app.text_input(key="toolkit").set_value(str(toolkit)).run()
    app.button(key="import").click().run()
    assert not app.exception
    message = app.success[0].value.replace("\\", "")
    assert message.startswith("1 model, 3 profiles, 2 plans and 1 run ")
    assert str(toolkit) in message
    missing = next(d.value for d in app.dataframe if "skipped, with the reason" in d.value)
    expected = import_reference(toolkit, Store())["missing"]
    assert missing["skipped, with the reason"].tolist() == expected
    assert "published:tiny" in app.sidebar.selectbox(key="model").options


def test_model_page_import_non_checkout_shows_error(tmp_path):
    app = open_page("Model")
    app.text_input(key="toolkit").set_value(str(tmp_path)).run()
    app.button(key="import").click().run()
    assert "not a checkout" in app.error[0].value
    assert not app.success
    assert Store().models("published").empty


def test_model_page_import_damaged_file_shows_error(toolkit):
    runs = toolkit / "data-vis/endeavors/boost/data/combined.csv"
    runs.write_text(runs.read_text("utf8").replace(",6.0,", ",six,"), "utf8")
    app = open_page("Model")
    app.text_input(key="toolkit").set_value(str(toolkit)).run()
    app.button(key="import").click().run()
    message = app.error[0].value.replace("\\", "")
    assert re.search("combined.csv, row 3: ppl_wikitext .*'six'", message)
    assert Store().models("published").empty


def test_model_page_download_offline_shows_error(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/toolkit"
        offline = functools.partial(import_download, url=url)
        monkeypatch.setattr("lsq_core.reference.importing.import_download", offline)
        app = open_page("Model")
        app.button(key="download").click().run()
    assert "cannot be reached" in app.error[0].value
    assert len(app.error) == 1
    assert not app.success


# --- Explore --------------------------------------------------------------------------------


def lines_chart(app: AppTest) -> dict:
    """Return the line chart over layers, which is below the heatmap if there is one."""
    charts_shown = [json.loads(c.proto.spec) for c in app.get("plotly_chart")]
    return next(spec for spec in charts_shown if spec["data"][0]["type"] == "scatter")


def drawn_lines(app: AppTest) -> dict[str, list[tuple[str, list[float]]]]:
    """Return each panel's lines by its title, as (name, values)."""
    spec = lines_chart(app)
    titles = [note["text"] for note in spec["layout"]["annotations"]]
    panels: dict[str, list] = {title: [] for title in titles}
    for trace in spec["data"]:
        if trace["mode"] == "lines+markers":
            number = int(trace["yaxis"][1:] or 1)
            panels[titles[number - 1]].append((trace["name"], _array(trace["y"])))
    return panels


@pytest.mark.parametrize(
    ("model", "panels"),
    [
        (
            SEVEN,
            ["Activation sensitivity by part at b4g64", "Weight kurtosis", "Weight error at b4g64"],
        ),
        (
            EIGHT,
            ["Activation sensitivity by part at b4g64", "Weight kurtosis", "Weight error at b4g64"],
        ),
        (SEVENTY, ["Weight kurtosis", "Weight error at b4g64"]),
        (CHAT, ["Activation sensitivity by part at b4g64"]),
    ],
)
def test_explore_published_metrics(store, model, panels):
    app = open_page("Explore", model=model)
    shown = drawn_lines(app)
    assert list(shown) == panels
    for title, lines in shown.items():
        assert lines, title
        metric = next(m for m, t in metric_titles().items() if title.startswith(t))
        for name, values in lines:
            kind = name.split(",")[0]
            assert values == pytest.approx(scores(store, app, model, metric, kind), rel=1e-12)
    if model == SEVENTY:
        assert first_line(app).startswith("Highest kurtosis: layers")
    missing = next(d.value for d in app.dataframe if "published" in d.value)["metric"].tolist()
    assert ("Activation sensitivity by part" in missing) == (model == SEVENTY) or model == CHAT
    assert ("Weight kurtosis" in missing) == (model == CHAT)
    assert not [b for b in app.button if b.label == "Profile"]


def metric_titles() -> dict[str, str]:
    from lsq_core.profiling.metrics import METRICS

    return {metric: title.title for metric, title in METRICS.items()}


def scores(store: Store, app: AppTest, model: str, metric: str, kind: str) -> list[float]:
    """Return a line's values directly from the tables."""
    chosen = app.session_state["calibration"], app.session_state["profile_quantizer"]
    config = "" if metric == "kurtosis" else app.session_state["shown"]
    return store.query(
        "SELECT s.value FROM scores s JOIN profiles p ON s.profile = p.id "
        "WHERE p.fingerprint = ? AND p.settings ->> '$.calibration' = ? "
        "AND p.settings ->> '$.quantizer' = ? AND metric = ? AND config = ? AND type LIKE ? "
        "ORDER BY layer",
        [model, *chosen, metric, config, f"%.{kind}"],
    )["value"].tolist()


@pytest.mark.parametrize("model", MODELS)
def test_explore_published_profile_choices(store, model):
    app = open_page("Explore", model=model)
    stored_profiles = store.query(
        "SELECT settings ->> '$.calibration' AS text, settings ->> '$.quantizer' AS quantizer "
        "FROM profiles WHERE fingerprint = ?",
        [model],
    )
    texts = select_box(app, "Calibration corpus")
    assert len(texts.options) == stored_profiles["text"].nunique()
    for text in sorted(set(stored_profiles["text"])):
        select_box(app, "Calibration corpus").set_value(text).run()
        assert not app.exception
        quantizers = select_box(app, "Quantizer").options
        assert set(quantizers) == set(
            stored_profiles.loc[stored_profiles["text"] == text, "quantizer"]
        )


def test_explore_change_corpus_and_quantizer(store):
    app = open_page("Explore", model=SEVEN)
    select_box(app, "Calibration corpus").set_value("c4").run()
    select_box(app, "Quantizer").set_value("rtn").run()
    shown = drawn_lines(app)
    assert list(shown) == ["Activation sensitivity by part at b4g64", "Weight kurtosis"]
    (line,) = [v for name, v in shown["Activation sensitivity by part at b4g64"] if name[0] == "d"]
    assert line == pytest.approx(scores(store, app, SEVEN, "sensitivity", "down_proj"))
    assert "b2g128" not in select_box(app, "Configuration shown").options[0]
    # a text without RTN falls back to a quantizer it has
    select_box(app, "Calibration corpus").set_value("c4@variant-sensi").run()
    assert app.session_state["profile_quantizer"] == "hqq"
    assert not app.exception
    select_box(app, "Configuration shown").set_value("b2g128").run()
    assert re.search("no activation sensitivity by part at b2g128", page_text(app))
    assert first_line(app).startswith("No sensitivity by part at b2g128.")
    assert len(app.get("plotly_chart")) == 1, "no heatmap of what is not there"
    assert list(drawn_lines(app)) == ["Weight kurtosis", "Weight error at b2g128"]


def test_explore_lists_unpublished_metrics(store):
    missing = {}
    for model in (SEVENTY, CHAT):
        app = open_page("Explore", model=model)
        table = next(d.value for d in app.dataframe if "published" in d.value)
        missing[model] = dict(zip(table["metric"], table["published"], strict=True))
    assert "Activation sensitivity by part" in missing[SEVENTY]
    assert "Weight error" not in missing[SEVENTY]
    assert "SensiBoost" in missing[SEVENTY]["Plans that need them"]
    assert {"Weight kurtosis", "Weight error"} < set(missing[CHAT])
    assert "b2g128" in missing[CHAT]["Activation sensitivity by part"]
    assert "KurtBoost" in missing[CHAT]["Plans that need them"]


def test_explore_sparse_published_profiles(toolkit):
    """One profile has only kurtosis; another lacks every part."""
    for path in toolkit.rglob("*.csv"):
        path.write_text(path.read_text("utf8").replace("tiny", "Llama-2-7b-hf"), "utf8")
    errors = toolkit / "src/data/fnorm-tiny.csv"
    errors.rename(errors.with_name("fnorm-Llama-2-7b-hf.csv"))
    by_method, variants = (
        toolkit / f"data-vis/data/{name}.csv" for name in ("qnt-mtd-sensi", "variant-sensi")
    )
    by_method.write_text(by_method.read_text("utf8").replace("hqq", "rtn"), "utf8")
    variants.write_text(variants.read_text("utf8").replace("7b-hf", "7b-chat-hf"), "utf8")
    import_reference(toolkit, Store())
    app = open_page("Explore", model=SEVEN)
    select_box(app, "Quantizer").set_value("rtn").run()
    assert not app.exception
    assert list(drawn_lines(app)) == ["Weight kurtosis"]
    app = open_page("Explore", model=CHAT)
    assert re.search("sensitivity nor kurtosis .*b4g64", first_line(app))
    assert not app.get("plotly_chart")
    assert not app.error


def test_explore_demo_after_published_model_resets_settings(store):
    app = open_page("Explore", model=SEVEN)
    select_box(app, "Calibration corpus").set_value("c4@variant-sensi").run()
    app.sidebar.selectbox(key="model").set_value("demo").run()
    assert first_line(app).startswith("demo has not been profiled")
    assert app.session_state["calibration"] == ProfileSettings().calibration
    assert not app.error


# --- Plan and Run ---------------------------------------------------------------------------


def test_plan_matches_published_sensiboost(store):
    info = cached.model_info(store, ModelSource("Llama-2-7b-hf"))
    settings = next(iter(cached.published_settings(store, info)))
    found = cached.profile(store, info, settings)
    request = PlanRequest("sensiboost", "3.13", boost_stop=2)
    plan = cached_plans.plan(info, found, request, settings)
    (content,) = store.query(
        "SELECT content FROM plans WHERE fingerprint = ? AND method = 'sensiboost' "
        "AND content ->> '$.published.attempt' = 'sensi-boost-2-0' "
        "AND content ->> '$.base' = '3.13'",
        [SEVEN],
    )["content"]
    published = json.loads(content)["modules"]
    ours = plan.to_json()["modules"]
    assert len(ours) == 224
    assert {name: c["config"] if isinstance(c, dict) else c for name, c in ours.items()} == {
        name: c["config"] if isinstance(c, dict) else c for name, c in published.items()
    }


def test_plan_without_published_sensitivity_raises(store):
    info = cached.model_info(store, ModelSource(SEVENTY))
    settings = next(iter(cached.published_settings(store, info)))
    found = cached.profile(store, info, settings)
    with pytest.raises(InputError, match=r"sensitivity.* SensiBoost .*kurtboost"):
        cached_plans.plan(info, found, PlanRequest("sensiboost", "3.13"), settings)
    assert cached_plans.plan(info, found, PlanRequest("mxq", budget="3.2bpp"), settings).matrices


@pytest.mark.parametrize("model", [SEVEN, SEVENTY])
def test_run_page_published_model_has_no_weights(store, model):
    app = open_page("Run", model=model)
    assert first_line(app).startswith(f"{model} has no local weights")
    assert not app.main.button
    assert not app.error


# --- Compare --------------------------------------------------------------------------------


def runs_of(store: Store, model: str, corpus: str) -> pd.DataFrame:
    """Return runs with their figures directly from the tables."""
    return store.query(
        "SELECT e.id, r.method, p.bits_per_param AS bits, r.model_bytes, e.perplexity "
        "FROM evaluations e JOIN runs r ON e.run = r.id JOIN plans p ON r.plan = p.id "
        "WHERE r.fingerprint = ? AND e.corpus = ? AND r.origin = 'published'",
        [model, corpus],
    )


def table(app: AppTest) -> pd.DataFrame:
    return next(d.value for d in app.dataframe if "perplexity" in d.value)


def points(app: AppTest) -> list[tuple[float, float]]:
    traces = [t for t in chart(app)["data"] if t["mode"] == "markers" and "customdata" in t]
    return sorted(pair for t in traces for pair in zip(_array(t["x"]), _array(t["y"]), strict=True))


@pytest.mark.parametrize("model", [SEVEN, EIGHT])
@pytest.mark.parametrize("corpus", ["wikitext2", "c4"])
def test_compare_shows_all_published_runs(store, model, corpus):
    app = open_page("Compare", model=model)
    measured = select_box(app, "Measurement")
    assert {option.split(",")[0] for option in measured.options} == {"wikitext2", "c4"}
    measured.select(next(o for o in measured.options if o.startswith(corpus))).run()
    runs = runs_of(store, model, corpus)
    assert len(runs) > 300
    assert f"perplexity {runs['perplexity'].min():.2f} " in page_text(app)
    shown = table(app)
    assert sorted(shown["perplexity"]) == sorted(runs["perplexity"])
    assert sorted(shown["bits"]) == sorted(runs["bits"])
    assert shown["perplexity"].is_monotonic_increasing
    linear = store.model(model).linear_parameters
    nominal = runs["bits"] * linear / 8 / 2**30
    expected = sorted(zip(nominal, runs["perplexity"], strict=True))
    assert [x for x, _ in points(app)] == pytest.approx([x for x, _ in expected])
    assert [y for _, y in points(app)] == [y for _, y in expected]
    assert "nominal size" in chart(app)["layout"]["xaxis"]["title"]["text"]
    assert "No interval" in page_text(app)


def test_compare_size_axis_choices(store):
    app = open_page("Compare", model=SEVEN)
    runs = runs_of(store, SEVEN, app_corpus(app))
    sizes = select_box(app, "Size")
    for option, column, scale in (("bits", "bits", 1), ("on disk", "model_bytes", 2**30)):
        select_box(app, "Size").select(next(o for o in sizes.options if option in o)).run()
        known_runs = runs.dropna(subset=[column])
        assert [x for x, _ in points(app)] == pytest.approx(sorted(known_runs[column] / scale))
        assert option in chart(app)["layout"]["xaxis"]["title"]["text"]


def app_corpus(app: AppTest) -> str:
    value = select_box(app, "Measurement").value
    return value.split("|")[1].removeprefix("published:")


def test_compare_two_runs_shows_paper_headline(store):
    app = open_page("Compare", model=EIGHT)
    measured = select_box(app, "Measurement")
    measured.select(next(o for o in measured.options if o.startswith("wikitext2"))).run()
    (boosted, uniform) = (
        store.query(
            "SELECT e.id FROM evaluations e JOIN plans p ON e.run = p.id WHERE p.method = ? "
            "AND e.fingerprint = ? AND e.corpus = 'wikitext2' AND p.content ->> '$.base' = '3.13' "
            "AND coalesce(p.content ->> '$.published.attempt', '') = ?",
            [method, EIGHT, attempt],
        )["id"].item()
        for method, attempt in (("sensiboost", "sensi-boost-3-0"), ("uniform", ""))
    )
    message = (
        "Perplexity **−9.4 %** (8.4326 against 9.3077) for **+1.8 %** bits "
        "(3.1834 against 3.1270). No interval: published without windows."
    )
    assert message in page_text(app), "the run that gains most is there from the start"
    other = app.session_state["run_a"]
    app.selectbox(key="run_a").set_value(uniform).run()
    assert "two different runs" in page_text(app)
    app.selectbox(key="run_a").set_value(boosted).run()
    app.selectbox(key="run_b").set_value(uniform).run()
    assert message in page_text(app)
    assert other == boosted


def test_wins_view_matches_paper_and_equal_bytes(store):
    app = open_page("Compare", model=SEVEN, view="wins")
    shown = next(d.value for d in app.dataframe if d.value.columns.nlevels == 2)
    label, equal = dict.fromkeys(column[0] for column in shown.columns)
    assert shown.loc["SensiBoost against Uniform", label].tolist() == [98, 1, 1, 96]
    assert shown.loc["SensiBoost against KurtBoost", label].tolist() == [19, 25, 56, 96]
    runs = store.results(SEVEN, origin="published")
    for pair, names in (
        (("sensiboost", "mxq"), "SensiBoost against MXQ"),
        (("kurtboost", "uniform"), "KurtBoost against Uniform"),
    ):
        for how, count in ((label, win_tie_loss), (equal, win_tie_loss_at_equal_bytes)):
            found = count(runs, *pair)
            assert shown.loc[names, how].tolist() == [*found.percentages, found.total]


def test_compare_method_filter(store):
    app = open_page("Compare", model=SEVEN)
    methods = next(g for g in app.get("button_group") if g.key == f"methods-{SEVEN}")
    methods.set_value(["uniform", "sensiboost"]).run()
    runs = runs_of(store, SEVEN, app_corpus(app))
    expected_runs = runs[runs["method"].isin(["uniform", "sensiboost"])]
    assert sorted(table(app)["perplexity"]) == sorted(expected_runs["perplexity"])
    assert not app.exception


@pytest.mark.parametrize("model", [SEVENTY, CHAT, "demo"])
def test_compare_model_without_runs_shows_message(store, model):
    app = open_page("Compare", model=model)
    assert f"No runs of {model}" in first_line(app)
    assert not app.get("plotly_chart")
    app.button(key=f"compare-{SEVEN}").click().run()
    assert "lower perplexity" in first_line(app)
    assert app.sidebar.selectbox(key="model").value == SEVEN


def test_compare_overlay_of_measured_runs(published, tmp_path, monkeypatch):
    path = tmp_path / "both.duckdb"
    path.write_bytes(published.read_bytes())
    monkeypatch.setenv("LSQ_DB", str(path))
    with Store(path).connect() as connection:
        connection.execute(
            """
            INSERT INTO models (fingerprint, source, layers, left_out, config, created)
                VALUES ('mine', 'org/mine', 2, [], '{}', now());
            INSERT INTO plans (id, fingerprint, method, bits_per_param, planned_bytes, content)
                VALUES ('p', 'mine', 'mxq', 3.5, 700, '{"method": "mxq"}');
            INSERT INTO runs (id, plan, fingerprint, method, quantizer, measured_bytes, created)
                VALUES ('r', 'p', 'mine', 'mxq', 'hqq', 700, now());
            INSERT INTO evaluations (id, run, fingerprint, corpus, corpus_sha256, truncated,
                protocol, tokens, perplexity, created)
            VALUES ('near', 'r', 'mine', 'wikitext2', 'abc', false, 'strided', 9, 7.125, now()),
                   ('far', 'r', 'mine', 'wikitext2', 'abc', false, 'blocks', 9, 7.25, now());
            """
        )
    app = open_page("Compare", model=SEVEN)
    select_box(app, "Measurement").select(
        next(o for o in select_box(app, "Measurement").options if o.startswith("wikitext2"))
    ).run()
    before_overlay = points(app)
    assert 7.125 not in {y for _, y in before_overlay}
    overlay = select_box(app, "Overlay your own runs")
    assert overlay.options == ["none", "org/mine"]
    overlay.select("org/mine").run()
    after_overlay = points(app)
    assert len(after_overlay) == len(before_overlay) + 1
    assert (3.5, 7.125) in after_overlay, "by the bits that both have"
    names = [t["name"] for t in chart(app)["data"] if t["mode"] == "markers"]
    assert "MXQ (measured)" in names
    assert re.search("1 run of org/mine", page_text(app))
    assert 7.125 not in set(table(app)["perplexity"])
    # and the other way round
    app = open_page("Compare", model="org/mine")
    assert len(points(app)) == 1
    strided = next(o for o in select_box(app, "Measurement").options if "strided" in o)
    select_box(app, "Measurement").select(strided).run()
    assert [y for _, y in points(app)] == [7.125]
    select_box(app, "Overlay published runs").select(SEVEN).run()
    assert len(points(app)) == len(after_overlay)
    # runs of another protocol are never overlaid
    blocks = next(o for o in select_box(app, "Measurement").options if "blocks" in o)
    select_box(app, "Measurement").select(blocks).run()
    assert [y for _, y in points(app)] == [7.25]
    assert "Overlay published runs" not in {b.label for b in app.selectbox}


# --- the chart ------------------------------------------------------------------------------


def many_runs(count: int = 100) -> pd.DataFrame:
    sizes = [2.0 + i / 100 for i in range(count)]
    return pd.DataFrame(
        {
            "evaluation": [str(i) for i in range(count)],
            "method": ["uniform", *["mxq"] * (count - 1)],
            "quantizer": "hqq",
            "label": "x",
            "bits_per_param": sizes,
            "perplexity": [900.0, 800.0, *[7.0 - i / 100 for i in range(count - 2)]],
            "perplexity_full": 5.0,
        }
    )


def test_perplexity_by_size_limits_view_of_many_runs():
    frame = many_runs()
    figure = charts.perplexity_by_size(frame, size=charts.BITS)
    low, high = figure.layout.yaxis.range
    assert low < 5.0
    assert 7.0 < high < 8.0
    assert charts.inlier_range(frame["perplexity"])[1] == 7.0
    view = charts.size_view(frame, charts.BITS)
    assert (view.outside, view.low, view.high) == (2, 800.0, 900.0)
    assert sum(len(t.x) for t in figure.data if t.mode == "markers") == 100
    (front,) = [t for t in figure.data if t.name == "Pareto front"]
    assert list(front.y)[:2] == [900.0, 800.0]
    assert list(front.x) == sorted(front.x)


def test_perplexity_by_size_overlay_markers():
    frame = many_runs(3)
    overlay_runs = frame.iloc[:1].assign(origin="measured", evaluation="o", perplexity=6.5)
    figure = charts.perplexity_by_size(frame, size=charts.BITS, overlay=overlay_runs)
    (trace,) = [t for t in figure.data if t.name == "Uniform (measured)"]
    assert trace.marker.symbol == "circle-open"
    assert list(trace.y) == [6.5]


def test_size_bars_large_model_in_gib():
    frame = pd.DataFrame(
        {"name": ["16 bits"], "config": [""], "linear_bytes": [8 * 2**30], "other_bytes": [2**30]}
    )
    figure = charts.size_bars(frame)
    assert list(figure.data[0].y) == [8]
    assert figure.layout.yaxis.title.text == "GiB"


def test_page_navigation_published_model(store):
    """Navigate from page to page in one session."""
    app = open_page("Model", model=EIGHT)
    for title in ("Explore", "Run", "Compare", "Model"):
        app = go_to_page(app, title)
        assert not app.error
