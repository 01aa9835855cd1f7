"""The Explore page's views show the data of the store and the weight files."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch
from scipy.stats import spearmanr

from lsq_core import charts
from lsq_core.bits import LADDER, QuantConfig
from lsq_core.errors import InputError
from lsq_core.model.architecture import get_weight
from lsq_core.model.info import Matrix
from lsq_core.model.loading import load_model
from lsq_core.model.source import DEMO_FOLDER, ModelSource
from lsq_core.planning.detection import detect_outliers
from lsq_core.planning.methods.boost import detect_by_type, flagged_layers
from lsq_core.planning.ranking import (
    FlaggedLayers,
    flagged_by_direction,
    flags_by_module,
    rank_layers,
)
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling import weights
from lsq_core.profiling.agreement import (
    lowest_correlation,
    pattern_correlations,
    proxy_agreement,
    rank_correlation,
    ranks,
)
from lsq_core.profiling.metrics import METRICS, default_metrics, proxies, weight_metrics
from lsq_core.profiling.profile import missing_metrics
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.profiling.weights import WeightReader
from lsq_core.quantization.base import to_groups
from lsq_core.quantization.registry import get_quantizer
from lsq_core.session import Session
from lsq_core.stages.plan import build_problem
from lsq_core.stages.profile import measure_here
from lsq_core.store.store import Store
from lsq_core.ui.explore.detection import run_detection
from tests.test_app import (  # noqa: F401 - fixtures
    Filled,
    _array,
    chart,
    filled,
    filled_once,
    first_line,
    open_page,
)
from tests.test_published_pages import CHAT, SEVEN, SEVENTY, page_text, store  # noqa: F401


def figure(app, number: int) -> dict:
    return json.loads(app.get("plotly_chart")[number].proto.spec)


# --- measuring in parts ---------------------------------------------------------------------


@pytest.fixture
def session(random_model, small_text) -> tuple[Session, ProfileSettings]:
    settings = ProfileSettings("rtn", calibration=str(small_text), samples=8, block_tokens=48)
    return Session(ModelSource(str(random_model("llama-gqa"))), Store(), "cpu"), settings


def interrupt_in(stage: str):
    """Return a report function that raises ``KeyboardInterrupt`` partway through a stage."""

    def report(at, done, total, message):
        if at == stage and 0 < done < total:
            raise KeyboardInterrupt

    return report


def test_profile_interrupted_keeps_weight_metrics(session):
    session, settings = session
    session.report = interrupt_in("profile")
    with pytest.raises(KeyboardInterrupt):
        session.profile(settings)
    stored_profile = session.find_profile(settings)
    assert set(stored_profile.metrics) == set(weight_metrics())
    assert missing_metrics(stored_profile) == ["sensitivity", "sensitivity_module"]
    assert len(stored_profile.values) == len(session.info.matrices) * (1 + len(LADDER))


def test_profile_resumes_missing_metrics_only(session):
    session, settings = session
    session.report = interrupt_in("profile")
    with pytest.raises(KeyboardInterrupt):
        session.profile(settings)
    early = session.find_profile(settings)
    session.report = lambda *_: None
    measured = []

    def measure(model, settings, metrics):
        measured.extend(metrics)
        return measure_here(model, settings, metrics)

    whole = session.profile(settings, measure=measure)
    assert measured == ["sensitivity", "sensitivity_module"], "what was there is not redone"
    assert set(whole.metrics) == set(default_metrics())
    assert whole.id == early.id
    np.testing.assert_array_equal(whole.scores("kurtosis"), early.scores("kurtosis"))
    assert session.profile(settings, measure=measure).values.equals(whole.values)
    assert len(measured) == 2, "a whole profile is found"


def test_scores_by_an_earlier_definition_are_measured_again(session, monkeypatch):
    """After a metric's definition changes, its stored scores are not mixed with new ones."""
    session, settings = session
    before = session.profile(settings, ["loss_impact"])
    monkeypatch.setattr(METRICS["loss_impact"], "definition", "the first 4 tokens")
    assert set(session.find_profile(settings).metrics) == set(default_metrics())
    after = session.profile(settings, ["loss_impact"])
    assert set(after.metrics) == set(before.metrics)
    facts = after.provenance["added"]["loss_impact"]
    assert facts["definitions"] == {"loss_impact": "the first 4 tokens"}
    assert facts["created"] > before.provenance["added"]["loss_impact"]["created"]


def test_profile_interrupted_in_weights_stores_nothing(session):
    session, settings = session
    session.report = interrupt_in("weights")
    with pytest.raises(KeyboardInterrupt):
        session.profile(settings)
    assert session.find_profile(settings) is None


def test_profile_concurrent_measurements_are_merged(session, monkeypatch):
    """The second starts before the first has stored anything, and ends after it."""
    first, settings = session
    late = Session(first.source, first.store, "cpu")
    whole = first.profile(settings)
    monkeypatch.setattr("lsq_core.stages.profile.find_profile", lambda model, settings: None)
    late.report = interrupt_in("profile")
    with pytest.raises(KeyboardInterrupt):
        late.profile(settings)
    monkeypatch.undo()
    assert set(first.find_profile(settings).metrics) == set(whole.metrics)


def test_profile_in_parts_matches_single_pass(session):
    from lsq_core.profiling.measure import measure_profile

    session, settings = session
    stored_profile = session.profile(settings)
    at_once = measure_profile(session.loaded, settings, stored_profile.id)
    for metric in ("weight_error", "sensitivity", "sensitivity_module"):
        np.testing.assert_allclose(
            stored_profile.by_config(metric), at_once.by_config(metric), rtol=1e-6
        )
    np.testing.assert_array_equal(stored_profile.scores("kurtosis"), at_once.scores("kurtosis"))


def leave_partial_profile(filled: Filled) -> Store:  # noqa: F811
    """Return the database as left by a job that was killed after its first part."""
    found = Store(filled.path)
    with found.connect() as connection:
        connection.execute("DELETE FROM scores WHERE metric LIKE 'sensitivity%'")
    return found


def test_explore_partial_profile_shown_as_incomplete(filled):  # noqa: F811
    leave_partial_profile(filled)
    app = open_page("Explore", model=filled.model)
    assert first_line(app).endswith("is incomplete.")
    assert re.search("lacks .*by part .*by module", page_text(app))
    assert app.button(key="profile").label == "Measure the rest"
    titles = [note["text"] for note in figure(app, 1)["layout"]["annotations"]]
    assert titles == ["Weight kurtosis", "Weight error at b4g64"]
    assert chart(app)["data"][0]["type"] == "heatmap"
    for see in ("algorithm", "overlay", "ranks", "weights"):
        app = open_page("Explore", model=filled.model, see=see)
        assert not app.error
        assert first_line(app).endswith("is incomplete.")


# --- heatmap and headline -------------------------------------------------------------------


def select_metric(app, metric: str) -> None:
    next(g for g in app.get("button_group") if g.key == "layers_view").set_value(metric).run()


@pytest.mark.parametrize("metric", ["sensitivity", "kurtosis", "weight_error"])
def test_heatmap_cells_match_store(store, metric):  # noqa: F811
    app = open_page("Explore", model=SEVEN)
    select_metric(app, metric)
    stored = store.query(
        "SELECT s.type, s.layer, s.value FROM scores s JOIN profiles p ON s.profile = p.id "
        "WHERE fingerprint = ? AND settings ->> '$.calibration' = 'pileval' "
        "AND settings ->> '$.quantizer' = 'hqq' AND metric = ? AND config = ?",
        [SEVEN, metric, "" if metric == "kurtosis" else "b4g64"],
    ).pivot(index="type", columns="layer", values="value")
    heat = chart(app)["data"][0]
    values = np.array(_array(heat["customdata"]))
    assert values.shape == (4 if metric == "sensitivity" else 7, 32)
    for row, names in zip(values, heat["y"], strict=True):
        kind = next(k for k in stored.index if k.endswith(f".{names.split(',')[0]}_proj"))
        assert row.tolist() == pytest.approx(stored.loc[kind].tolist())
    log = stored.to_numpy().max() / stored.to_numpy().min() >= 10
    shown = np.log10(values) if log else values
    np.testing.assert_allclose(np.array(_array(heat["z"])), shown)
    by_layer = stored.max().sort_values(ascending=False)
    top, _, jumps = first_line(app).partition(". ")
    assert [int(n) for n in re.findall(r"\d+", top)] == by_layer.index[:3].tolist()
    assert ("Algorithm 1" in jumps) == (metric != "weight_error")


def test_headline_names_sensitive_and_flagged_layers_apart(store):  # noqa: F811
    """Llama-2-7B's kurtosis is highest in layer 0, which Algorithm 1 cannot flag."""
    app = open_page("Explore", model=SEVEN)
    select_metric(app, "kurtosis")
    top, _, jumps = first_line(app).partition(". ")
    assert re.findall(r"\d+", top)[0] == "0"
    session = Session(ModelSource(SEVEN), store)
    problem = build_problem(session.info, session.find_profile(session.default_settings))
    flagged = flagged_by_direction(detect_by_type(problem, "kurtosis", 0))
    assert flagged.falls == (2,)
    assert [int(n) for n in re.findall(r"\d+", jumps)[1:]] == list(flagged.jumps)
    assert 0 not in flagged.jumps
    caption = next(c.value for c in app.caption if "z > 3" in c.value)
    assert "Layer 0 has no layer before it" in caption
    assert "Layer 2 is flagged only because the score drops" in caption


def test_metric_follows_what_is_measured_unless_chosen(store):  # noqa: F811
    """Llama-2-70B has no sensitivity: its kurtosis is shown, but not for the next model."""
    app = open_page("Explore", model=SEVENTY)
    assert app.session_state["layers_view"] == "kurtosis"
    app.sidebar.selectbox(key="model").set_value(SEVEN).run()
    assert app.session_state["layers_view"] == "sensitivity"
    select_metric(app, "weight_error")
    app.sidebar.selectbox(key="model").set_value(SEVENTY).run()
    assert app.session_state["layers_view"] == "weight_error"
    app.sidebar.selectbox(key="model").set_value(SEVEN).run()
    assert first_line(app).startswith("Highest weight error")


def test_headline_does_not_mention_first_layer_below_the_top(store):  # noqa: F811
    app = open_page("Explore", model=SEVEN)
    assert "31" in first_line(app).partition(". ")[0]
    assert "no layer before it" not in page_text(app)


def test_flags_by_direction_of_a_spike():
    spike = np.r_[np.ones(15), 9, np.ones(14)]
    found = {"q": (list(range(30)), detect_outliers(spike, ratios=False))}
    assert flagged_by_direction(found) == FlaggedLayers(jumps=(15,), falls=(16,))
    assert {cell: rises for cell, (_, rises) in flags_by_module(found).items()} == {
        ("q", 15): True,
        ("q", 16): False,
    }
    start = np.r_[9, np.ones(29)]
    found = {"q": (list(range(30)), detect_outliers(start, ratios=False))}
    assert flagged_by_direction(found) == FlaggedLayers(jumps=(), falls=(1,)), "never layer 0"
    both = found | {"k": (list(range(30)), detect_outliers(start[::-1], ratios=False))}
    assert flagged_by_direction(both) == FlaggedLayers(jumps=(29,), falls=(1,))


def test_rank_layers_by_largest_module():
    scores = pd.DataFrame(
        {"layer": [0, 0, 1, 1, 2], "type": ["q", "k", "q", "k", "q"]}
        | {"value": [1.0, 5.0, 9.0, np.nan, 2.0]}
    )
    ranked = rank_layers(scores)
    assert ranked["layer"].tolist() == [1, 0, 2]
    assert ranked["type"].tolist() == ["q", "k", "q"]


# --- Algorithm 1 ----------------------------------------------------------------------------


def traces(spec: dict, axis: str) -> list[dict]:
    return [t for t in spec["data"] if t.get("yaxis", "y") == axis]


def steps_shown(app) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the drawn scores, differences by layer, and z-scores."""
    spec = chart(app)
    scores = next(t for t in traces(spec, "y") if t["mode"] == "lines+markers")
    points = [t for t in traces(spec, "y2") if "trimmed" in t["name"] and t["mode"] == "markers"]
    pairs = sorted(
        (x, y) for t in points for x, y in zip(_array(t["x"]), _array(t["y"]), strict=True)
    )
    z = next(t for t in spec["data"] if t["type"] == "bar")
    return np.array(_array(scores["y"])), np.array([y for _, y in pairs]), np.array(_array(z["y"]))


@pytest.mark.parametrize(("metric", "ratios"), [("sensitivity", True), ("kurtosis", False)])
def test_algorithm_view_matches_detect_outliers(store, metric, ratios):  # noqa: F811
    app = open_page("Explore", model=SEVEN, see="algorithm")
    next(g for g in app.get("button_group") if g.key == "detect").set_value(metric).run()
    app.selectbox(key="detect_type").set_value("mlp.down_proj").run()
    config = "b4g64" if ratios else ""
    series = store.query(
        "SELECT s.value FROM scores s JOIN profiles p ON s.profile = p.id WHERE fingerprint = ? "
        "AND settings ->> '$.calibration' = 'pileval' AND settings ->> '$.quantizer' = 'hqq' "
        "AND metric = ? AND config = ? AND type = 'mlp.down_proj' ORDER BY layer",
        [SEVEN, metric, config],
    )["value"].to_numpy()
    scores, differences, z = steps_shown(app)
    np.testing.assert_allclose(scores, series)
    expected = series[1:] / series[:-1] if ratios else np.diff(series)
    np.testing.assert_allclose(differences, expected)
    found = detect_outliers(series, ratios=ratios)
    np.testing.assert_allclose(z, found.z)
    band = next(t for t in chart(app)["data"] if t.get("name", "").startswith("z ≤"))
    assert max(_array(band["y"])) == pytest.approx(found.mean + 3 * found.deviation)
    assert found.flagged
    named = {int(number) for number in re.findall(r"\d+", first_line(app).partition(" at ")[0])}
    assert set(found.flagged) <= named


def test_algorithm_view_tells_falls_and_first_layer(store):  # noqa: F811
    """The kurtosis of Llama-2-7B's q_proj is highest in layer 0, then falls twice."""
    app = open_page("Explore", model=SEVEN, see="algorithm")
    next(g for g in app.get("button_group") if g.key == "detect").set_value("kurtosis").run()
    app.selectbox(key="detect_type").set_value("self_attn.q_proj").run()
    flags = next(d.value for d in app.dataframe if "flagged (z)" in d.value)
    row = flags.set_index("module").loc["q", "flagged (z)"]
    assert [part.endswith("fall)") for part in re.findall(r"\d+ \([^)]*\)", row)] == [True, True]
    text = page_text(app)
    assert "Layers 1 and 2 are flagged only because" in text
    assert "Layer 0 has no layer before it" in text


def test_algorithm_view_threshold_and_m_change_flags(store):  # noqa: F811
    app = open_page("Explore", model=SEVEN, see="algorithm")
    app.selectbox(key="detect_type").set_value("mlp.down_proj").run()
    session = Session(ModelSource(SEVEN), store)
    settings = session.default_settings
    problem = build_problem(session.info, session.find_profile(settings))
    whole = flagged_layers(problem, "sensitivity", 0)["mlp.down_proj"]
    assert len(whole) > 1
    assert all(str(layer) in first_line(app) for layer in whole)
    app.number_input(key="detect_m").set_value(1).run()
    (strongest,) = list(whole)[:1]
    assert first_line(app).startswith(f"Layer {strongest} ")
    assert "down_proj" in first_line(app)
    app.number_input(key="detect_m").set_value(0).run()
    app.slider(key="detect_threshold").set_value(6.0).run()
    still = sorted(layer for layer, z in whole.items() if z > 6)
    assert still != sorted(whole)
    flags = next(d.value for d in app.dataframe if "flagged (z)" in d.value)
    row = flags.set_index("module").loc["down", "flagged (z)"]
    assert [int(layer) for layer in re.findall(r"(\d+) \(", row)] == [
        layer for layer, z in whole.items() if z > 6
    ]
    app.slider(key="detect_threshold").set_value(0.5).run()
    lower = next(d.value for d in app.dataframe if "flagged (z)" in d.value)
    assert len(lower.set_index("module").loc["down", "flagged (z)"]) > len(row)


def test_steps_of_trimmed_values_excluded_from_mean():
    series = np.cumsum(np.r_[1.0, np.random.default_rng(0).uniform(1, 2, 40)])
    steps = run_detection(list(range(41)), series, False, 0, 3.0)
    assert steps.trimmed.sum() == 4, "5 % of 40 at each end"
    assert steps.differences[~steps.trimmed].mean() == pytest.approx(steps.mean)
    assert steps.differences[steps.trimmed].max() == steps.differences.max()


# --- overlay --------------------------------------------------------------------------------


def overlay_lines(app) -> dict[tuple[str, str], list[float]]:
    """Return the drawn values by (line, part)."""
    spec = figure(app, 0)
    parts = [note["text"] for note in spec["layout"]["annotations"]]
    return {(t["name"], parts[int(t["yaxis"][1:] or 1) - 1]): _array(t["y"]) for t in spec["data"]}


def test_overlay_texts_and_spearman_match_store(store):  # noqa: F811
    app = open_page("Explore", model=SEVEN, see="overlay")
    shown = overlay_lines(app)
    texts = {line for line, _ in shown}
    stored_texts = store.query(
        "SELECT DISTINCT settings ->> '$.calibration' AS text FROM profiles p "
        "JOIN scores s ON s.profile = p.id WHERE fingerprint = ? AND metric = 'sensitivity' "
        "AND config = 'b4g64' AND settings ->> '$.quantizer' = 'hqq'",
        [SEVEN],
    )["text"]
    assert texts == {text for text in stored_texts if "@" not in text}
    table = store.query(
        "SELECT settings ->> '$.calibration' AS text, s.part, s.layer, any_value(s.value) AS value "
        "FROM scores s JOIN profiles p ON s.profile = p.id WHERE fingerprint = ? "
        "AND settings ->> '$.quantizer' = 'hqq' AND metric = 'sensitivity' AND config = 'b4g64' "
        "GROUP BY ALL ORDER BY s.layer",
        [SEVEN],
    )
    down = table[table["part"] == "mlp_down"]
    for text in texts:
        assert shown[text, "down_proj"] == pytest.approx(
            down.loc[down["text"] == text, "value"].tolist()
        )
    heat = figure(app, 1)["data"][0]
    names = figure(app, 1)["layout"]["xaxis"]["ticktext"]
    values = np.array(_array(heat["z"]))
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            each = [
                spearmanr(*(rows.loc[rows["text"] == t, "value"].to_numpy() for t in (a, b)))[0]
                for _, rows in table.groupby("part")
            ]
            assert values[i, j] == pytest.approx(np.mean(each), abs=1e-9)
    least = values.min()
    assert f"lowest rank correlation {least:.2f}" in first_line(app)


def test_overlay_config_colors_and_model_selection(store):  # noqa: F811
    app = open_page("Explore", model=SEVEN, see="overlay")
    app.multiselect(key="overlay_calibration").set_value(["pileval"]).run()
    app.multiselect(key="overlay_config").set_value(["b2g64", "b4g64", "b8g64"]).run()
    colors = {t["name"]: t["line"]["color"] for t in figure(app, 0)["data"]}
    assert colors == {
        name: charts.config_color(QuantConfig.parse(name)) for name in ("b2g64", "b4g64", "b8g64")
    }
    assert not any(name.startswith("published") for name, _ in overlay_lines(app))
    app.multiselect(key="overlay_config").set_value(["b4g64"]).run()
    app.multiselect(key="overlay_model").set_value([SEVEN, CHAT]).run()
    lines = overlay_lines(app)
    assert {line for line, _ in lines} == {"Llama-2-7b-hf", "Llama-2-7b-chat-hf"}
    chat = store.query(
        "SELECT s.value FROM scores s JOIN profiles p ON s.profile = p.id WHERE fingerprint = ? "
        "AND settings ->> '$.calibration' = 'pileval' AND metric = 'sensitivity' "
        "AND config = 'b4g64' AND type = 'mlp.down_proj' ORDER BY layer",
        [CHAT],
    )["value"].tolist()
    assert lines["Llama-2-7b-chat-hf", "down_proj"] == pytest.approx(chat)
    app.selectbox(key="overlay_part").set_value("o_proj").run()
    assert set(overlay_lines(app)) == {(line, "o_proj") for line, _ in lines}
    app.multiselect(key="overlay_model").set_value([]).run()
    assert "Nothing" in first_line(app)
    assert not app.get("plotly_chart")


def test_pattern_correlations_computed_per_part():
    """Lines that are opposite within each part disagree, even if the parts differ in scale."""
    frame = pd.DataFrame(
        [
            (line, part, layer, base + sign * layer)
            for part, base in (("a", 10.0), ("b", 1000.0))
            for line, sign in (("up", 1), ("down", -1))
            for layer in range(6)
        ],
        columns=["line", "part", "layer", "value"],
    )
    found = pattern_correlations(frame)
    assert found.loc["up", "down"] == -1
    assert lowest_correlation(found).value == -1
    short = frame[(frame["line"] == "up") | (frame["layer"] < 5)]
    assert np.isnan(pattern_correlations(short).loc["up", "down"]), "models of other depths"
    assert lowest_correlation(pattern_correlations(short)) is None


def test_rank_correlation_constant_or_short_is_nan():
    assert np.isnan(rank_correlation(np.ones(9), np.arange(9.0)))
    assert np.isnan(rank_correlation(np.arange(3.0), np.arange(3.0)))
    assert ranks(np.array([1.0, 5.0, np.nan, 5.0])).tolist()[:2] == [3.0, 1.5]


# --- where metrics disagree -----------------------------------------------------------------


def test_ranks_view_offers_proxies_and_shows_agreement(filled, monkeypatch):  # noqa: F811
    started = []
    monkeypatch.setattr("lsq_core.jobs.start", lambda folder, words: started.append(words))
    app = open_page("Explore", model=filled.model, see="ranks")
    app.button(key="proxies").click().run()
    (words,) = started
    assert words[-4:] == ["--metric", "gram_diagonal", "--metric", "fisher_diagonal"]

    session = Session(ModelSource(filled.model), Store(filled.path), "cpu")
    profile = session.profile(filled.settings, list(proxies()))
    table = proxy_agreement(profile)
    gram, fisher = table[table["config"] == "b4g64"]["rank_correlation"]
    app = open_page("Explore", model=filled.model, see="ranks")
    expected = f"Gram diagonal {gram:.3f} and diagonal Fisher {fisher:.3f}.".replace("-", "−")
    assert expected in page_text(app)
    assert "b4g64" in page_text(app)
    assert not [button for button in app.button if button.key == "proxies"]
    assert any("Gram diagonal" in option for option in app.selectbox(key="ranks_x").options)


def test_ranks_view_matches_store_and_selected_module(store):  # noqa: F811
    app = open_page("Explore", model=SEVEN, see="ranks")
    table = store.query(
        "SELECT module, max(s.value) FILTER (metric = 'kurtosis') AS k, "
        "max(s.value) FILTER (metric = 'sensitivity' AND config = 'b4g64') AS s "
        "FROM scores s JOIN profiles p ON s.profile = p.id WHERE fingerprint = ? "
        "AND settings ->> '$.calibration' = 'pileval' AND settings ->> '$.quantizer' = 'hqq' "
        "GROUP BY module",
        [SEVEN],
    ).set_index("module")
    rho = spearmanr(table["s"], table["k"])[0]
    assert f"{rho:.2f}".replace("-", "−") in first_line(app)
    expected = table.rank(ascending=False)
    seen = 0
    for trace in chart(app)["data"]:
        if trace["mode"] != "markers" or trace["name"] == "selected":
            continue
        for (module, *_), x, y in zip(
            _array(trace["customdata"]), _array(trace["x"]), _array(trace["y"]), strict=True
        ):
            assert (x, y) == tuple(expected.loc[module, ["s", "k"]])
            seen += 1
    assert seen == len(table)
    module = "model.layers.30.mlp.down_proj"
    app.selectbox(key="ranked").set_value(module).run()
    shown = next(d.value for d in app.dataframe if "metric" in d.value).set_index("metric")
    assert shown.loc["kurtosis", "value"] == pytest.approx(table.loc[module, "k"])
    ring = next(t for t in chart(app)["data"] if t["name"] == "selected")
    assert _array(ring["x"]) == [expected.loc[module, "s"]]


def test_ranks_view_single_metric_shows_message(store):  # noqa: F811
    app = open_page("Explore", model=CHAT, see="ranks")
    assert "so there is nothing to compare" in first_line(app)
    assert not app.get("plotly_chart")


# --- weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2-conv1d", "opt", "gpt-oss-moe"])
def test_weights_region_matches_loaded_model(random_model, architecture):
    folder = random_model(architecture)
    loaded = load_model(ModelSource(str(folder)), "cpu")
    opened = WeightReader(folder, loaded.info.matrices)
    assert opened.matrices == loaded.info.matrices
    for matrix in opened.matrices:
        expected = get_weight(loaded.model, matrix).numpy()
        np.testing.assert_array_equal(opened.region(matrix), expected)
        part = opened.region(matrix, slice(3, 9), slice(5, 6))
        np.testing.assert_array_equal(part, expected[3:9, 5:6])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_region_dtypes_exact(tmp_path, dtype):
    matrix = Matrix("model.layers.0.mlp.up_proj", 0, "mlp.up_proj", 6, 4)
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_torch({f"{matrix.name}.weight": weight}, tmp_path / "model.safetensors")
    read = WeightReader(tmp_path, [matrix]).region(matrix)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, weight.float().numpy())


def test_weights_region_missing_tensor_raises(tmp_path):
    save_file({"other.weight": np.zeros((4, 4), np.float32)}, tmp_path / "model.safetensors")
    matrix = Matrix("model.layers.0.mlp.up_proj", 0, "mlp.up_proj", 6, 4)
    opened = WeightReader(tmp_path, [matrix])
    assert opened.matrices == ()
    with pytest.raises(InputError, match="another name or shape"):
        opened.region(matrix)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("quantizer", ["rtn", "hqq"])
def test_grid_values_match_quantizer(quantizer, axis):
    weight = np.random.default_rng(0).normal(0, 0.05, (64, 128)).astype(np.float32)
    config = QuantConfig(3, 64)
    groups = weights.split_into_groups(weight, config, axis)
    tensor = torch.from_numpy(weight)
    np.testing.assert_array_equal(groups, to_groups(tensor, 64, axis).numpy())
    found = weights.grid_values(groups, config, quantizer)
    grid = get_quantizer(quantizer).solve(tensor, config, axis)
    codes = np.arange(8)
    expected = (codes - grid.zero.numpy()[:, None]) * grid.scale.numpy()[:, None]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_groups_of_indivisible_raises():
    with pytest.raises(InputError, match="groups of 128"):
        weights.split_into_groups(np.zeros((3, 32), np.float32), QuantConfig(2, 128), 1)


def test_coarse_keeps_outliers():
    weight = np.zeros((1000, 300), np.float32)
    weight[777, 123] = -5
    cells, down, across = weights.downsample_max(weight)
    assert max(cells.shape) <= weights.MAX_CELLS
    assert cells[777 // down, 123 // across] == 5
    assert np.count_nonzero(cells) == 1


def demo_weight(name: str) -> np.ndarray:
    return load_file(DEMO_FOLDER / "model.safetensors")[f"{name}.weight"].float().numpy()


def test_weights_view_histogram_matches_checkpoint():
    app = open_page("Explore", model="demo", see="weights")
    app.selectbox(key="weights_type").set_value("mlp.down_proj").run()
    app.selectbox(key="weights_layer").set_value(3).run()
    weight = demo_weight("model.layers.3.mlp.down_proj")
    bars, normal, grid = chart(app)["data"]
    counts, edges = np.histogram(weight, 240)
    assert _array(bars["y"]) == counts.tolist()
    drawn = np.array(_array(normal["y"]), dtype=float)
    assert np.nanmax(drawn) == pytest.approx(
        weight.size * np.diff(edges)[0] / (weight.std() * np.sqrt(2 * np.pi)), rel=0.01
    )
    groups = weight.reshape(-1, 64)
    middle = np.argsort(np.ptp(groups, axis=1), kind="stable")[len(groups) // 2]
    lines = np.array(_array(grid["x"]), dtype=float)[::3]
    np.testing.assert_allclose(
        lines, np.linspace(groups[middle].min(), groups[middle].max(), 16), rtol=1e-5
    )
    out = np.abs(weight - weight.mean()).max() / weight.std()
    assert f"lies {out:.1f} standard deviations from the mean" in first_line(app)


def test_weights_view_percentiles_match_checkpoint():
    app = open_page("Explore", model="demo", see="weights")
    app.session_state["weights_show"] = "bands"
    for _ in range(20):
        app.run()
        if app.get("plotly_chart"):
            break
    markers = [t for t in chart(app)["data"] if "markers" in t["mode"]]
    shown = np.array([_array(t["y"]) for t in markers]).T
    assert shown.shape == (24, len(weights.PERCENTILES))
    weight = demo_weight("model.layers.23.self_attn.q_proj")
    np.testing.assert_allclose(shown[23], np.percentile(weight, weights.PERCENTILES), rtol=1e-5)


def test_weights_view_surface_region():
    app = open_page("Explore", model="demo", see="weights")
    app.session_state["weights_show"] = "surface"
    app.run()
    assert np.array(_array(chart(app)["data"][0]["z"])).shape == (128, 128)
    app.number_input(key="weights_row").set_value(7).run()
    app.number_input(key="weights_rows").set_value(5).run()
    weight = np.abs(demo_weight("model.layers.0.self_attn.q_proj"))[7:12]
    (surface,) = chart(app)["data"]
    assert surface["type"] == "surface"
    np.testing.assert_array_equal(np.array(_array(surface["z"])), weight)
    assert _array(surface["y"]) == [7, 8, 9, 10, 11]
    assert "Rows 7 to 11" in page_text(app)


def test_weights_view_published_model_shows_message(store):  # noqa: F811
    app = open_page("Explore", model=SEVENTY, see="weights")
    assert f"weights of {SEVENTY}" in first_line(app)
    assert not app.get("plotly_chart")
    assert not app.error


# --- a quantizer with few stops -------------------------------------------------------------


@pytest.fixture
def nf4_profile(filled: Filled) -> tuple[Session, ProfileSettings]:  # noqa: F811
    """The model of the other tests, also profiled with NF4."""
    settings = replace(filled.settings, quantizer="nf4")
    session = Session(ModelSource(filled.model), Store(filled.path), "cpu")
    session.profile(settings)
    return session, settings


def test_nf4_profile_has_only_4_bit_stops(nf4_profile):
    session, settings = nf4_profile
    found = session.profile(settings)
    by_metric = found.values.groupby("metric")["config"].unique()
    assert set(by_metric.index) == set(default_metrics())
    for metric in ("weight_error", "sensitivity", "sensitivity_module"):
        assert set(by_metric[metric]) == {"b4g128", "b4g64", "b4g32"}
    rtn = session.find_profile(replace(settings, quantizer="rtn"))
    ratio = found.scores("weight_error", QuantConfig(4, 64)) / rtn.scores(
        "weight_error", QuantConfig(4, 64)
    )
    assert np.all((ratio > 0.5) & (ratio < 1.5)), "normal weights suit NF4 about as well"
    plan = session.plan(PlanRequest("mxq", budget="4.3bpp"), settings)
    assert {config.bits for config in plan.configs} == {4}, "no stop that wasn't measured"
    with pytest.raises(InputError, match=r"b2g32.* NF4"):
        session.plan(PlanRequest("loss-aware", budget="4.3bpp"), settings)
    with pytest.raises(InputError, match="axis 1"):
        session.profile(replace(settings, axis=0))


def test_explore_nf4_profile_lists_its_stops(nf4_profile):
    session, _ = nf4_profile
    app = open_page("Explore", model=session.source.name)
    app.selectbox(key="profile_quantizer").set_value("nf4").run()
    assert not app.exception
    assert "b4g128, b4g64 and b4g32" in " ".join(c.value for c in app.caption)
    assert not any("8-bit metadata" in s.value for s in app.subheader), "NF4 keeps its own"
    app.selectbox(key="axis").set_value(0).run()
    assert not app.exception
    assert app.button(key="profile").disabled
    assert any("NF4" in c.value and "along rows" in c.value for c in app.caption)
