"""Refinements on the Plan page: starting them, their steps and the resulting plan."""

from __future__ import annotations

import re

import numpy as np
import pytest

from lsq_core import charts
from lsq_core.cli.parser import build_parser
from lsq_core.cli.program import execute
from lsq_core.cli.requests import refine_request
from lsq_core.jobs import arguments
from lsq_core.model.source import ModelSource
from lsq_core.planning.request import PlanRequest
from lsq_core.refinement.step import RefinementStep
from lsq_core.session import Session
from lsq_core.shipped import import_measurements
from lsq_core.store.store import Store
from lsq_core.ui.plan import refine
from tests.test_app import filled, filled_once, first_line, open_page  # noqa: F401 - fixtures
from tests.test_plan_page import planner_data

REQUEST = PlanRequest("refined", budget="3.2bpp", start="mxq", pins=("*.layers.0.*=b4g64",))


@pytest.fixture
def refined(filled):  # noqa: F811
    command = ["refine", "--model", filled.model, "--device", "cpu"]
    execute(
        command + arguments.refine_arguments(REQUEST, filled.settings, 0.01), lambda *report: None
    )
    return filled


def test_refine_arguments_parse_to_the_same_request(filled):  # noqa: F811
    argv = ["refine", "--model", "demo", *arguments.refine_arguments(REQUEST, filled.settings, 2.5)]
    options = build_parser().parse_args(argv)
    assert refine_request(options) == REQUEST
    assert options.minutes == 2.5
    assert options.calibration == filled.settings.calibration


def test_search_is_on_the_text_of_the_profile(filled):  # noqa: F811
    app = open_page("Plan", model=filled.model, method="mxq", budget="3.2")
    assert not app.exception
    [button] = [b for b in app.button if b.label == "Refine by measuring"]
    assert not button.disabled
    assert "refine_text" not in app.session_state


def test_search_is_offered_on_another_text_where_the_profiles_is_not_here():
    import_measurements(Store())
    app = open_page("Plan", model="smollm2", method="kl-aware", budget="3.25")
    assert not app.exception
    [chosen] = [box for box in app.selectbox if box.key == "refine_text"]
    assert chosen.value == "stdlib"


def test_page_says_that_no_plan_was_refined(filled):  # noqa: F811
    app = open_page("Plan", model=filled.model, method="refined", budget="3.2", start="mxq")
    assert not app.exception
    assert first_line(app).startswith("No plan by MXQ")
    [button] = [b for b in app.button if b.label == "Plan by MXQ"]
    button.click().run()
    assert app.session_state["method"] == "mxq"
    assert not app.exception


def test_page_shows_the_steps_and_the_plan(refined):
    session = Session(ModelSource(refined.model), Store(refined.path))
    made = session.plan(REQUEST, refined.settings)
    app = open_page(
        "Plan", model=refined.model, method="refined", budget="3.2", start="mxq", against="mxq"
    )
    app.session_state["pins"] = REQUEST.pins[0]
    app.run()
    assert not app.exception
    shown = planner_data(app)
    assert [method["name"] for method in shown["methods"]] == ["refined", "mxq"]
    assert re.search(rf"^{made.bits_per_param:.2f} bits", first_line(app))
    assert any("refining the plan by mxq" in c.value for c in app.caption)


def test_chart_of_steps():
    steps = [
        RefinementStep(0, np.array([0, 1, 2]), 0.5, np.zeros((3, 3))),
        RefinementStep(1, np.array([0, 2, 1]), 0.4, np.zeros((3, 3)), 1.0, 0.35),
    ]
    frame = refine._frame(steps)
    assert frame["changed"].tolist() == [0, 2]
    expected, measured = charts.refinement_steps(frame).data
    assert list(measured.y) == [0.5, 0.4]
    assert list(expected.y)[1:] == [0.35]
