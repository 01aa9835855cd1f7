"""The pages on published measurements: what they show is what the store holds, and no more."""

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
from lsq_core.reference import import_download, import_reference
from lsq_core.results.compare import win_tie_loss, win_tie_loss_at_equal_bytes
from lsq_core.store.store import Store
from lsq_core.ui import cached
from tests.test_app import _array, chart, first_line, go, open_page
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
    """The imported measurements, where this test's pages look."""
    monkeypatch.setenv("LSQ_DB", str(published))
    return Store(published)


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A small made-up checkout: these tests need no published file."""
    write_toolkit(tmp_path / "toolkit")
    return tmp_path / "toolkit"


def box(app: AppTest, label: str):
    """The page's box of that name; the sidebar has one named Model too."""
    return next(b for b in app.main.selectbox if b.label == label)


def figures(app: AppTest) -> dict[str, str]:
    return {metric.label: metric.value for metric in app.metric}


def told(app: AppTest) -> str:
    return " ".join([*(c.value for c in app.caption), *(m.value for m in app.markdown)])


# --- the first page, the sidebar --------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_the_first_page_tells_what_is_published(store, model):
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
        assert (shown["Parameters"], shown["Covered"]) == ("not published", "not known")
        assert "without embeddings" in first_line(app)
    assert "no weights here" in told(app)
    linear = _array(chart(app)["data"][0]["y"])
    assert len(linear) == len(LADDER) + bool(row["file_bytes"])
    smallest = row["linear_parameters"] * LADDER[0].nominal_bits / 8 / 2**30
    assert linear[-len(LADDER)] == pytest.approx(smallest, rel=1e-3)


def test_published_models_are_in_the_picker_and_have_a_button(store):
    app = open_page("Model")
    published = set(store.models("published")["source"])
    assert published < set(app.sidebar.selectbox(key="model").options)
    assert {b.key.removeprefix("known-") for b in app.button if b.key} >= published
    app.button(key=f"known-{SEVENTY}").click().run()
    assert app.session_state["model"] == SEVENTY
    assert app.query_params["model"] in (SEVENTY, [SEVENTY])
    assert figures(app)["Layers"] == "80"


@pytest.mark.parametrize("title", ["Model", "Explore", "Run", "Compare"])
def test_the_bare_name_is_the_same_model(store, title):
    whole, bare = (
        open_page(title, model=name) for name in (SEVEN, SEVEN.removeprefix("published:"))
    )
    assert first_line(bare) == first_line(whole)
    assert not bare.error


def test_a_model_that_was_not_imported_is_one_sentence(store):
    app = open_page("Model", model="published:nothing")
    assert "'nothing'" in app.error[0].value.replace("\\", "")


# --- the import -----------------------------------------------------------------------------


def test_a_folder_is_imported_and_what_it_lacks_is_told(toolkit):
    app = open_page("Model")
    assert app.button(key="import").disabled
    app.text_input(key="toolkit").set_value(str(toolkit)).run()
    app.button(key="import").click().run()
    assert not app.exception
    said = app.success[0].value.replace("\\", "")
    assert said.startswith("1 model, 3 profiles, 2 plans and 1 run ")
    assert str(toolkit) in said
    lacks = next(d.value for d in app.dataframe if "not offered, and why" in d.value)
    expected = import_reference(toolkit, Store())["missing"]
    assert lacks["not offered, and why"].tolist() == expected
    assert "published:tiny" in app.sidebar.selectbox(key="model").options


def test_a_folder_that_is_no_checkout_is_one_sentence(tmp_path):
    app = open_page("Model")
    app.text_input(key="toolkit").set_value(str(tmp_path)).run()
    app.button(key="import").click().run()
    assert "not a checkout" in app.error[0].value
    assert not app.success
    assert Store().models("published").empty


def test_a_damaged_file_imports_nothing(toolkit):
    runs = toolkit / "data-vis/endeavors/boost/data/combined.csv"
    runs.write_text(runs.read_text("utf8").replace(",6.0,", ",six,"), "utf8")
    app = open_page("Model")
    app.text_input(key="toolkit").set_value(str(toolkit)).run()
    app.button(key="import").click().run()
    said = app.error[0].value.replace("\\", "")
    assert re.search("combined.csv, row 3: ppl_wikitext .*'six'", said)
    assert Store().models("published").empty


def test_a_download_without_a_network_is_one_sentence(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/toolkit"
        offline = functools.partial(import_download, url=url)
        monkeypatch.setattr("lsq_core.reference.import_download", offline)
        app = open_page("Model")
        app.button(key="download").click().run()
    assert "cannot be reached" in app.error[0].value
    assert len(app.error) == 1
    assert not app.success


# --- Explore --------------------------------------------------------------------------------


def drawn(app: AppTest) -> dict[str, list[tuple[str, list[float]]]]:
    """Panel title to the lines in it: name and values."""
    spec = chart(app)
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
def test_explore_shows_the_metrics_that_are_published(store, model, panels):
    app = open_page("Explore", model=model)
    shown = drawn(app)
    assert list(shown) == panels
    for title, lines in shown.items():
        assert lines, title
        metric = next(m for m, t in charts_titles().items() if title.startswith(t))
        for name, values in lines:
            kind = name.split(",")[0]
            assert values == pytest.approx(scores(store, app, model, metric, kind), rel=1e-12)
    if model == SEVENTY:
        assert "No activation sensitivity" in told(app)
        assert "Flagged by kurtosis" in told(app)
    if model == CHAT:
        assert "No kurtosis" in told(app)
    assert not [b for b in app.button if b.label == "Profile"]


def charts_titles() -> dict[str, str]:
    from lsq_core.profiling.metrics import TITLES

    return {metric: title.title for metric, title in TITLES.items()}


def scores(store: Store, app: AppTest, model: str, metric: str, kind: str) -> list[float]:
    """A line's values, straight from the tables."""
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
def test_explore_offers_the_profiles_that_are_there(store, model):
    app = open_page("Explore", model=model)
    there = store.query(
        "SELECT settings ->> '$.calibration' AS text, settings ->> '$.quantizer' AS quantizer "
        "FROM profiles WHERE fingerprint = ?",
        [model],
    )
    texts = box(app, "Calibration text")
    assert len(texts.options) == there["text"].nunique()
    for text in sorted(set(there["text"])):
        box(app, "Calibration text").set_value(text).run()
        assert not app.exception
        offered = box(app, "Quantizer").options
        assert set(offered) == set(there.loc[there["text"] == text, "quantizer"])


def test_another_text_and_quantizer_are_drawn(store):
    app = open_page("Explore", model=SEVEN)
    box(app, "Calibration text").set_value("c4").run()
    box(app, "Quantizer").set_value("rtn").run()
    shown = drawn(app)
    assert list(shown) == ["Activation sensitivity by part at b4g64", "Weight kurtosis"]
    (line,) = [v for name, v in shown["Activation sensitivity by part at b4g64"] if name[0] == "d"]
    assert line == pytest.approx(scores(store, app, SEVEN, "sensitivity", "down_proj"))
    assert "b2g128" not in box(app, "Configuration shown").options[0]
    # a text that has no RTN falls back to a quantizer that it has
    box(app, "Calibration text").set_value("c4@variant-sensi").run()
    assert app.session_state["profile_quantizer"] == "hqq"
    assert not app.exception
    box(app, "Configuration shown").set_value("b2g128").run()
    assert re.search("no activation sensitivity by part at b2g128", told(app))
    assert list(drawn(app)) == ["Weight kurtosis", "Weight error at b2g128"]


def test_what_is_not_published_is_listed(store):
    lacks = {}
    for model in (SEVENTY, CHAT):
        app = open_page("Explore", model=model)
        table = next(d.value for d in app.dataframe if "published" in d.value)
        lacks[model] = dict(zip(table["metric"], table["published"], strict=True))
    assert "Activation sensitivity by part" in lacks[SEVENTY]
    assert "Weight error" not in lacks[SEVENTY]
    assert "SensiBoost" in lacks[SEVENTY]["Plans that need them"]
    assert {"Weight kurtosis", "Weight error"} < set(lacks[CHAT])
    assert "b2g128" in lacks[CHAT]["Activation sensitivity by part"]
    assert "KurtBoost" in lacks[CHAT]["Plans that need them"]


def test_profiles_that_hold_next_to_nothing_are_shown_for_what_they_are(toolkit):
    """One of kurtosis alone, and one of which every part was left out."""
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
    box(app, "Quantizer").set_value("rtn").run()
    assert not app.exception
    assert list(drawn(app)) == ["Weight kurtosis"]
    app = open_page("Explore", model=CHAT)
    assert re.search("sensitivity nor kurtosis .*b4g64", first_line(app))
    assert not app.get("plotly_chart")
    assert not app.error


def test_the_demo_after_a_published_model_has_its_own_settings(store):
    app = open_page("Explore", model=SEVEN)
    box(app, "Calibration text").set_value("c4@variant-sensi").run()
    app.sidebar.selectbox(key="model").set_value("demo").run()
    assert first_line(app).startswith("demo has not been profiled")
    assert app.session_state["calibration"] == ProfileSettings().calibration
    assert not app.error


# --- Plan and Run ---------------------------------------------------------------------------


def test_a_plan_is_the_published_one(store):
    info = cached.model_info(store, ModelSource("Llama-2-7b-hf"))
    settings = next(iter(cached.published_settings(store, info)))
    found = cached.profile(store, info, settings)
    request = PlanRequest("sensiboost", "3.13", boost_stop=2)
    plan = cached.plan(info, found, request, settings)
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


def test_a_plan_that_the_measurements_cannot_give_is_refused(store):
    info = cached.model_info(store, ModelSource(SEVENTY))
    settings = next(iter(cached.published_settings(store, info)))
    found = cached.profile(store, info, settings)
    with pytest.raises(InputError, match=r"sensitivity.* SensiBoost .*kurtboost"):
        cached.plan(info, found, PlanRequest("sensiboost", "3.13"), settings)
    assert cached.plan(info, found, PlanRequest("mxq", budget="3.2bpp"), settings).matrices


@pytest.mark.parametrize("model", [SEVEN, SEVENTY])
def test_there_is_nothing_to_run(store, model):
    app = open_page("Run", model=model)
    assert first_line(app).startswith(f"{model} has no weights")
    assert not app.main.button
    assert not app.error


# --- Compare --------------------------------------------------------------------------------


def runs_of(store: Store, model: str, corpus: str) -> pd.DataFrame:
    """Runs with their figures, straight from the tables."""
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
def test_compare_shows_every_published_run(store, model, corpus):
    app = open_page("Compare", model=model)
    measured = box(app, "Measured on")
    assert {option.split(",")[0] for option in measured.options} == {"wikitext2", "c4"}
    measured.select(next(o for o in measured.options if o.startswith(corpus))).run()
    runs = runs_of(store, model, corpus)
    assert len(runs) > 300
    assert f"{runs['perplexity'].min():.2f}." in first_line(app)
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
    assert "No interval" in told(app)


def test_each_account_of_size_has_an_axis_of_its_own(store):
    app = open_page("Compare", model=SEVEN)
    runs = runs_of(store, SEVEN, app_corpus(app))
    sizes = box(app, "Size")
    for option, column, scale in (("bits", "bits", 1), ("on disk", "model_bytes", 2**30)):
        box(app, "Size").select(next(o for o in sizes.options if option in o)).run()
        known_runs = runs.dropna(subset=[column])
        assert [x for x, _ in points(app)] == pytest.approx(sorted(known_runs[column] / scale))
        assert option in chart(app)["layout"]["xaxis"]["title"]["text"]


def app_corpus(app: AppTest) -> str:
    value = box(app, "Measured on").value
    return value.split("|")[1].removeprefix("published:")


def test_the_headline_of_the_paper_is_read_from_two_runs(store):
    app = open_page("Compare", model=EIGHT)
    measured = box(app, "Measured on")
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
    said = (
        "Perplexity **−9.4 %** (8.4326 against 9.3077) for **+1.8 %** bits "
        "(3.1834 against 3.1270). No interval: published without windows."
    )
    assert said in told(app), "the run that gains most is there from the start"
    other = app.session_state["run_a"]
    app.selectbox(key="run_a").set_value(uniform).run()
    assert "two different runs" in told(app)
    app.selectbox(key="run_a").set_value(boosted).run()
    app.selectbox(key="run_b").set_value(uniform).run()
    assert said in told(app)
    assert other == boosted


def test_win_tie_loss_is_the_papers_with_equal_bytes_beside_it(store):
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


def test_methods_can_be_left_out(store):
    app = open_page("Compare", model=SEVEN)
    methods = next(g for g in app.get("button_group") if g.key == f"methods-{SEVEN}")
    methods.set_value(["uniform", "sensiboost"]).run()
    runs = runs_of(store, SEVEN, app_corpus(app))
    kept = runs[runs["method"].isin(["uniform", "sensiboost"])]
    assert sorted(table(app)["perplexity"]) == sorted(kept["perplexity"])
    assert not app.exception


@pytest.mark.parametrize("model", [SEVENTY, CHAT, "demo"])
def test_no_other_models_published_runs_stand_in(store, model):
    app = open_page("Compare", model=model)
    assert f"no runs of {model}" in first_line(app)
    assert not app.get("plotly_chart")
    box(app, "Model").select(SEVEN).run()
    assert first_line(app).startswith("Best within")


def test_measured_runs_are_overlaid_only_by_choice(published, tmp_path, monkeypatch):
    path = tmp_path / "both.duckdb"
    path.write_bytes(published.read_bytes())
    monkeypatch.setenv("LSQ_DB", str(path))
    with Store(path).connect() as connection:
        connection.execute(
            """
            INSERT INTO models (fingerprint, source, layers, created)
                VALUES ('mine', 'org/mine', 2, now());
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
    box(app, "Measured on").select(
        next(o for o in box(app, "Measured on").options if o.startswith("wikitext2"))
    ).run()
    alone = points(app)
    assert 7.125 not in {y for _, y in alone}
    overlay = box(app, "Overlay your own runs")
    assert overlay.options == ["none", "org/mine"]
    overlay.select("org/mine").run()
    both = points(app)
    assert len(both) == len(alone) + 1
    assert (3.5, 7.125) in both, "by the bits that both have"
    names = [t["name"] for t in chart(app)["data"] if t["mode"] == "markers"]
    assert "MXQ (measured)" in names
    assert re.search("1 run of org/mine", told(app))
    assert 7.125 not in set(table(app)["perplexity"])
    # and the other way round
    app = open_page("Compare", model="org/mine")
    assert len(points(app)) == 1
    strided = next(o for o in box(app, "Measured on").options if "strided" in o)
    box(app, "Measured on").select(strided).run()
    assert [y for _, y in points(app)] == [7.125]
    box(app, "Overlay published runs").select(SEVEN).run()
    assert len(points(app)) == len(both)
    # a protocol of another name is never beside
    blocks = next(o for o in box(app, "Measured on").options if "blocks" in o)
    box(app, "Measured on").select(blocks).run()
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


def test_many_runs_are_seen_up_to_where_they_can_be_told_apart():
    frame = many_runs()
    figure = charts.perplexity_by_size(frame, size=charts.BITS)
    low, high = figure.layout.yaxis.range
    assert low < 5.0
    assert 7.0 < high < 8.0
    assert charts.view_limit(frame["perplexity"]) == pytest.approx(7.0, abs=0.1)
    assert sum(len(t.x) for t in figure.data if t.mode == "markers") == 100
    (front,) = [t for t in figure.data if t.name == "best for its size"]
    assert list(front.y)[:2] == [900.0, 800.0]
    assert list(front.x) == sorted(front.x)


def test_an_overlay_is_hollow_and_says_where_it_is_from():
    frame = many_runs(3)
    over = frame.iloc[:1].assign(origin="measured", evaluation="o", perplexity=6.5)
    figure = charts.perplexity_by_size(frame, size=charts.BITS, overlay=over)
    (trace,) = [t for t in figure.data if t.name == "Uniform (measured)"]
    assert trace.marker.symbol == "circle-open"
    assert list(trace.y) == [6.5]


def test_sizes_of_large_models_are_in_gib():
    frame = pd.DataFrame(
        {"name": ["16 bits"], "config": [""], "linear_bytes": [8 * 2**30], "other_bytes": [2**30]}
    )
    figure = charts.size_bars(frame)
    assert list(figure.data[0].y) == [8]
    assert figure.layout.yaxis.title.text == "GiB"


def test_going_from_page_to_page(store):
    """The person's way through, in one session."""
    app = open_page("Model", model=EIGHT)
    for title in ("Explore", "Run", "Compare", "Model"):
        app = go(app, title)
        assert not app.error
