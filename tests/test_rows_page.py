"""The Plan page with high-impact rows: measuring missing data and showing the plan."""

from __future__ import annotations

import re
from base64 import b64decode
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lsq_core import charts
from lsq_core.bits import RATIOS, mixed_rows
from lsq_core.cli.parser import build_parser
from lsq_core.cli.program import execute
from lsq_core.cli.requests import plan_request
from lsq_core.evaluation.prediction import load_measured_points
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.jobs import arguments
from lsq_core.model.source import ModelSource
from lsq_core.planning.make import make_frontier, make_plan
from lsq_core.planning.methods.high_impact import build_impact
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling import interactions as measuring
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.results.compare import byte_shares, run_settings
from lsq_core.session import Session
from lsq_core.store.profiles import InteractionKey
from lsq_core.store.store import Store
from tests.conftest import save_random_model
from tests.test_app import filled, filled_once, first_line, open_page  # noqa: F401 - fixtures
from tests.test_plan_page import command_line_plan, planner_data, problem


@pytest.fixture
def measured(filled, monkeypatch):  # noqa: F811
    """Return the model with interactions measured on a few tokens."""
    monkeypatch.setattr(measuring, "LOSS_TOKENS", {"block": 8, "model": 8})
    request = PlanRequest("high-impact", budget="2.24bpp")
    command = ["plan", "--model", filled.model, "--device", "cpu"]
    execute(command + arguments.plan_arguments(request, filled.settings), lambda *report: None)
    return filled


def test_rows_page_offers_missing_measurements(filled):  # noqa: F811
    app = open_page("Plan", model=filled.model, method="high-impact", budget="3.4")
    assert not app.exception
    assert re.match("High-impact rows .*row scores and interactions", first_line(app))
    assert [b.label for b in app.button if b.label.startswith("Measure")] == [
        "Measure the row scores and interactions"
    ]


def test_rows_page_indivisible_rows_show_error(tmp_path):
    model = save_random_model(tmp_path / "narrow", "llama-gqa", hidden_size=96)
    app = open_page("Plan", model=str(model), method="high-impact", budget="2.3")
    assert not app.exception
    assert first_line(app) == "No such plan."
    (error,) = app.error
    assert "proj (128×96) has rows that cannot be divided into groups of 128" in error.value
    assert not [b.label for b in app.button if b.label.startswith("Measure")]


def test_rows_page_plan_matches_library(measured):
    app = open_page("Plan", model=measured.model, method="high-impact", budget="2.24")
    assert not app.exception
    sent = planner_data(app)
    assert sent["model"]["reference"]["name"] == "2.13"
    stops = [stop["stop"] for stop in sent["model"]["ladder"]]
    assert stops == ["2 %", "5 %", "10 %", "15 %", "20 %"]
    session = Session(ModelSource(measured.model), Store(measured.path))
    key = session.profile_key(measured.settings)
    stored_interactions = session.store.interactions(key, InteractionKey("block", 2, 3, 128))
    impact = build_impact(session.info.matrices, session.store.row_scores(key), stored_interactions)
    model_problem = replace(problem(measured), impact=impact)
    frontier = make_frontier(model_problem, PlanRequest("high-impact"))
    (shown,) = sent["methods"]
    starts = np.frombuffer(b64decode(shown["frontier"]["starts"]), "u1")
    assert starts.tolist() == np.concatenate([s.start for s in frontier.segments]).tolist()
    losses = np.frombuffer(b64decode(shown["frontier"]["losses"]), "<f8")
    assert losses.tolist() == frontier.losses.tolist()
    assert "of the rows at 3 bits" in first_line(app)
    plan = make_plan(model_problem, PlanRequest("high-impact", budget="2.24bpp"))
    assert command_line_plan(app) == {m.name: c.name for m, c in plan.choice.items()}
    tabs = [tab.label for tab in app.tabs]
    assert tabs == ["Ratios by layer", "Interactions within a block", "Predicted vs. measured"]
    actual = " ".join(caption.value for caption in app.caption)
    assert "error most" in actual
    assert "no run" in " ".join(info.value for info in app.info)


def test_rows_page_other_widths_need_measurement(measured):
    app = open_page("Plan", model=measured.model, method="high-impact", widths="2+16")
    assert first_line(app).startswith("High-impact rows need")
    app.selectbox(key="ratios").set_value("uniform").run()
    assert not app.exception
    assert "of the rows at 16 bits" in first_line(app)


def test_rows_page_no_comparison_with_ladder_methods(measured):
    app = open_page("Plan", model=measured.model, method="high-impact", against="mxq")
    assert not app.exception
    assert len(planner_data(app)["methods"]) == 1
    assert app.selectbox(key="against").disabled
    other = open_page("Plan", model=measured.model, method="mxq")
    assert "high-impact" not in other.selectbox(key="against").options
    assert "High-impact rows" not in other.selectbox(key="against").options


def test_interaction_heatmap_values():
    random = np.random.default_rng(0)
    half = random.random((10, 10))
    matrix = half @ half.T
    figure = charts.interaction_heatmap(matrix, ["self_attn.q_proj", "mlp.up_proj"], RATIOS)
    shown = np.array(figure.data[0].z, dtype=float)
    assert np.isnan(shown[:5, :5]).all()
    expected = matrix[0, 7] / np.sqrt(matrix[0, 0] * matrix[7, 7])
    assert shown[0, 7] == shown[7, 0] == pytest.approx(expected)


def test_sweep_arguments_round_trip_row_options():
    rows = PlanRequest("high-impact", low_bits=3, high_bits=16, group_size=64, ratios="diagonal")
    command = arguments.sweep_arguments(
        ["high-impact", "uniform"],
        [],
        ["3.4bpp"],
        ["hybrid-50"],
        [],
        ["stdlib"],
        EvaluationRequest("stdlib"),
        ProfileSettings(),
        rows,
    )
    options = build_parser(exit_on_error=False).parse_args(["sweep", "--model", "demo", *command])
    parsed = plan_request(options, "high-impact")
    assert parsed == rows
    assert options.quantizer == ["hybrid-50"]
    plan_command = ["plan", "--model", "demo", *arguments.plan_arguments(rows, ProfileSettings())]
    assert plan_request(build_parser(exit_on_error=False).parse_args(plan_command)) == rows


def test_plan_heatmap_mixed_rows():
    """Each ratio has its own colour, shown in its cells, and the shares of the ring sum to 1."""
    options = mixed_rows(2, 3, 128)
    assert len({charts.config_color(option) for option in options}) == len(options)
    frame = pd.DataFrame(
        {
            "module": [f"m.{i}" for i in range(10)],
            "type": ["q_proj"] * 5 + ["mlp.up_proj"] * 5,
            "layer": [*range(5)] * 2,
            "config": [option.name for option in options] * 2,
            "z": np.nan,
        }
    )
    heatmap, *legend = charts.plan_heatmap(frame).data
    assert heatmap.z.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert legend[0].name == "b2h3r02g128 (2 %) × 2"
    steps = [color for _, color in heatmap.colorscale]
    assert steps[::2] == [charts.config_color(option) for option in options]
    shares = byte_shares(frame, dict.fromkeys(frame["module"], 128))
    assert shares.index.tolist() == [option.name for option in options]
    assert shares.sum() == pytest.approx(1)
    assert charts.plan_ring(shares, "2.24").data[0].labels[0] == "b2h3r02g128 (2 %)"


def test_mixed_rows_runs_distinguished_in_compare(measured):
    """Compare labels runs by how rows were mixed; predictions for ladder methods ignore them."""
    store, source = Store(measured.path), ModelSource(measured.model)
    session = Session(source, store, "cpu")
    text = measured.settings.calibration
    request = PlanRequest("high-impact", budget="2.24bpp")
    plan = session.plan(request, measured.settings)
    session.run(plan, "rtn", EvaluationRequest(text, max_tokens=300))
    runs = charts.add_run_labels(store.results())
    label = runs.loc[runs["method"] == "high-impact", "label"].item()
    assert "2+3 g128, full ratios, rtn" in label
    (evaluation,) = runs.loc[runs["method"] == "high-impact", "evaluation"]
    actual = run_settings(store.record(evaluation))
    assert (actual["bits of rows"], actual["ratios"], actual["calibration"]) == (
        "2 and 3",
        "full",
        text,
    )
    points = load_measured_points(
        store, session.info.fingerprint, problem(measured), quantizer="rtn", axis=1, metadata="8bit"
    )
    assert evaluation not in points.evaluations
    objectives = store.objectives(session.info.fingerprint, "high-impact")
    assert objectives["objective"].tolist() == [plan.objective]
    assert objectives["kl"].item() > 0
    app = open_page("Plan", model=measured.model, method="high-impact", budget="2.24")
    assert not app.exception
    assert "divergence" in " ".join(c.value for c in app.caption)
