"""A new metric, method or quantizer needs only one class and one registry entry."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lsq_core import charts, sweep
from lsq_core.bits import EXTENDED_LADDER
from lsq_core.cli.parser import build_parser
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.model.source import ModelSource
from lsq_core.planning.make import make_frontier
from lsq_core.planning.methods import PLANNERS
from lsq_core.planning.methods.knapsack import Knapsack
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.metrics import METRICS, default_metrics
from lsq_core.profiling.metrics.base import Metric, Score
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization import layout
from lsq_core.quantization.hqq.quantizer import min_max_grid
from lsq_core.quantization.packed import GridQuantizer
from lsq_core.quantization.registry import QUANTIZERS, QuantizerSpec
from lsq_core.session import Session
from lsq_core.stages.plan import build_problem
from lsq_core.store.store import Store


class LargestWeight(Metric):
    """The largest magnitude among a matrix's weights."""

    name = "largest_weight"
    title = "Largest weight"
    label = short = "largest weight"
    axis = "max |w|"
    meaning = "The largest magnitude among the weights of a matrix."
    default = False
    needs_calibration = False

    def score_unquantized(self, context):
        for matrix in context.matrices:
            yield Score(matrix, self.name, None, float(context.weight(matrix).abs().max()))


class LargestStep(Knapsack):
    """Minimize the summed step size of the grids."""

    name = "largest-step"
    title = "Largest step"
    meaning = "The least summed distance between the levels of the grids."
    color, symbol = "#123456", "cross-thin"
    metrics = ("largest_weight",)
    cost_unit = "grid step"

    def cost(self, problem):
        levels = np.array([2.0**config.bits - 1 for config in problem.options])
        return problem.scores["largest_weight"][:, None] / levels


class PlainGrid(GridQuantizer):
    """Round-to-nearest under another name."""

    def solve(self, weight, config, axis):
        return min_max_grid(weight, config, axis, optimize=False)


@pytest.fixture
def settings(small_text) -> ProfileSettings:
    return ProfileSettings("rtn", calibration=str(small_text), samples=4, block_tokens=64)


@pytest.fixture
def session(random_model) -> Session:
    return Session(ModelSource(str(random_model("llama-gqa"))), Store(), "cpu")


@pytest.fixture
def metric(monkeypatch) -> type[Metric]:
    monkeypatch.setitem(METRICS, LargestWeight.name, LargestWeight)
    return LargestWeight


@pytest.fixture
def method(metric, monkeypatch) -> LargestStep:
    monkeypatch.setitem(PLANNERS, LargestStep.name, LargestStep())
    return PLANNERS[LargestStep.name]


@pytest.fixture
def quantizer(monkeypatch) -> str:
    spec = QuantizerSpec(
        "Plain grid", f"{__name__}:PlainGrid", layout.packed, color="#654321", symbol="hash"
    )
    monkeypatch.setitem(QUANTIZERS, "plain", spec)
    return "plain"


def help_text(verb: str, capsys) -> str:
    with pytest.raises(SystemExit):
        build_parser().parse_args([verb, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_new_metric_is_measured_stored_and_shown(session, settings, metric, capsys):
    from lsq_core.ui import words
    from lsq_core.ui.explore.profile import ExploreView
    from lsq_core.ui.explore.ranks import metric_table

    assert metric.name not in default_metrics()
    session.profile(settings, [metric.name])
    stored = Session(session.source, Store(session.store.path), "cpu").find_profile(settings)
    assert metric.name in stored.metrics
    expected = [
        float(session.loaded.model.get_submodule(m.name).weight.abs().max())
        for m in session.info.matrices
    ]
    assert stored.scores(metric.name).tolist() == expected

    view = ExploreView(None, session.info, settings, stored, None, None)
    assert metric_table(view, "b4g64")[metric.name].tolist() == expected
    assert words.metric_label(metric.name) == "Largest weight"
    assert f"or {metric.name}:" in help_text("profile", capsys)


def test_new_default_metric_is_measured_without_being_named(session, settings, metric, monkeypatch):
    monkeypatch.setattr(metric, "default", True)
    assert metric.name in session.profile(settings).metrics


def test_new_method_plans_from_its_metric(session, settings, method, capsys):
    plan = session.plan(method.name, settings, budget="3.2bpp")
    assert plan.bits_per_param <= 3.2
    assert len({config.name for config in plan.configs}) > 1
    assert method.metrics[0] in session.find_profile(settings).metrics, "measured on demand"

    assert method.name in help_text("plan", capsys)
    assert method.name in sweep.expand_methods(["all"])
    line = frontier_line(session, settings, method.name)
    (trace,) = charts.frontiers([line], no_runs(), "cost").data
    assert (trace.name, trace.line.color) == ("Largest step, cost", method.color)


def frontier_line(session: Session, settings: ProfileSettings, name: str) -> charts.FrontierLine:
    problem = build_problem(session.info, session.find_profile(settings))
    frontier = make_frontier(problem, PlanRequest(name, budget="3.2bpp"))
    budgets = np.linspace(2.6, 8, 5)
    chosen = [frontier.at(problem.total * bits / 8).choice for bits in budgets]
    cost = np.array([frontier.cost[np.arange(len(c)), c].sum() for c in chosen])
    assert (np.diff(cost) <= 0).all(), "more bits cost less"
    return charts.FrontierLine(name, budgets, cost)


def no_runs():
    return pd.DataFrame(columns=["method", "label", "bits_per_param", "value"])


def test_new_quantizer_carries_out_a_plan(session, settings, small_text, quantizer, capsys):
    plan = session.plan("uniform", settings, base="3.13")
    request = EvaluationRequest(str(small_text), max_tokens=300)
    ours = session.run(plan, quantizer, request, settings=settings)
    rtn = session.run(plan, "rtn", request, settings=settings)
    assert ours["perplexity"] == rtn["perplexity"]
    assert ours["run"] != rtn["run"], "runs of different quantizers are different runs"

    assert quantizer in help_text("run", capsys)
    assert charts.style_key("uniform", quantizer) == quantizer
    assert charts.method_style(quantizer).title == "Plain grid"


def test_every_entry_is_described():
    for name, metric in METRICS.items():
        assert name == metric.name
        assert all((metric.title, metric.label, metric.short, metric.axis, metric.meaning))
        assert not metric.proxy_of or metric.proxy_of in METRICS
        assert metric.configs or not metric.by_config
        assert set(metric.configs) <= set(EXTENDED_LADDER)
    request_fields = set(PlanRequest.__dataclass_fields__)
    for name, planner in PLANNERS.items():
        assert name == planner.name
        assert all((planner.title, planner.meaning, planner.color, planner.symbol))
        assert set(planner.metrics) <= set(METRICS)
        assert set(planner.fields) <= request_fields
        assert bool(planner.cost_unit) != planner.has_base


@pytest.mark.parametrize("name", PLANNERS)
def test_every_method_has_a_card(name):
    planner = PLANNERS[name]
    for text in (planner.summary, planner.source, planner.use, planner.limits):
        assert len(text) > 10
    assert planner.summary.endswith(".")
