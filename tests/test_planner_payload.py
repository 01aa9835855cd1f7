"""The live planner's payload (a full frontier as compact JSON, sent once) and its answers."""

from __future__ import annotations

import gc
import json
from base64 import b64decode

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from lsq_core.bits import LADDER, mixed_rows
from lsq_core.model.info import Matrix
from lsq_core.planning.frontier import build_moves
from lsq_core.planning.make import make_frontier
from lsq_core.planning.pins import apply_pins
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.ui import planner
from lsq_core.ui.planner import Curve, LayerScores, LiveMethod, MatrixFacts, Preset
from tests.browser.planner_app import random_model
from tests.conftest import packed_bytes
from tests.test_plan import problem


def decode_array(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(b64decode(text), dtype=kind)


def make_payload(small: Problem, methods: list[LiveMethod], **more: object) -> dict:
    """Return a payload with simple defaults for everything not given."""
    defaults = {
        "budget": 3.25,
        "other_bytes": 7,
        "metadata": "8bit",
        "presets": [],
        "facts": [],
        "fixed": None,
        "feasible": (2.127, 8.508),
        "uniform": None,
        "pins": [],
    }
    return planner.payload(small, methods, **defaults | more)


@pytest.mark.parametrize("method", ["mxq", "kurtboost", "uniform"])
def test_frontier_payload_round_trip(method):
    """Starts, moves and costs are unchanged and give the same bytes."""
    small = problem(spikes={7: 9.0})
    frontier = make_frontier(small, PlanRequest(method))
    content = planner.frontier_payload(frontier)
    starts = decode_array(content["starts"], "u1").reshape(-1, len(small.matrices))
    matrices, stops = decode_array(content["matrices"], "<i2"), decode_array(content["stops"], "u1")
    ends = np.cumsum(content["counts"])
    assert len(starts) == len(frontier.segments)
    assert ends[-1] == len(matrices) == len(stops)
    for segment, start, end in zip(frontier.segments, starts, ends, strict=True):
        moves = segment.moves
        assert start.tolist() == segment.start.tolist()
        span = slice(end - len(moves), end)
        raised = [(i, s, 0.0) for i, s in zip(matrices[span], stops[span], strict=True)]
        restored = build_moves(segment.start, raised, small.bytes)
        assert [m.bytes_after for m in restored] == [m.bytes_after for m in moves]
    if frontier.cost is None:
        assert content["costs"] is None
    else:
        assert (decode_array(content["costs"], "<f8").reshape(-1, 12) == frontier.cost).all()


def test_payload_nan_and_inf_survive_strict_json():
    small = problem(layers=4)
    small.by_config["weight_error"][3, 5] = np.nan
    frontier = make_frontier(small, PlanRequest("mxq"))
    values = np.r_[np.nan, np.arange(1.0, 8)]
    method = LiveMethod("mxq", "MXQ", frontier, "weight error")
    data = make_payload(
        small, [method], facts=[MatrixFacts("z", values)], presets=[Preset("8 GB", -0.5, "")]
    )
    restored = json.loads(json.dumps(data, allow_nan=False))
    costs = decode_array(restored["methods"][0]["frontier"]["costs"], "<f8")
    assert np.isposinf(costs[3 * 12 + 5])
    np.testing.assert_array_equal(decode_array(restored["facts"][0]["values"], "<f8"), values)
    assert restored["presets"][0]["bits"] == -0.5


def test_payload_model_order_and_sizes():
    """Sizes with a short last group have their own planned bytes."""
    matrices = (
        Matrix("m.0.mlp.up_proj", 0, "mlp.up_proj", 32, 33),
        Matrix("m.0.mlp.down_proj", 0, "mlp.down_proj", 128, 128),
        Matrix("m.1.mlp.up_proj", 1, "mlp.up_proj", 32, 33),
    )
    odd = Problem(matrices, {}, {"weight_error": np.tile(np.arange(12.0)[::-1], (3, 1))})
    method = LiveMethod("mxq", "MXQ", make_frontier(odd, PlanRequest("mxq")))
    for metadata in ("8bit", "fp16"):
        model = make_payload(odd, [method], metadata=metadata)["model"]
        assert model["names"].split("\n") == [m.name for m in matrices]
        assert model["types"] == ["up_proj", "down_proj"]
        assert decode_array(model["typeOf"], "<i4").tolist() == [0, 1, 0]
        assert decode_array(model["layers"], "<i4").tolist() == [0, 0, 1]
        table = decode_array(model["planned"], "<f8").reshape(-1, 12)
        for matrix, row in zip(matrices, decode_array(model["sizeOf"], "<i4"), strict=True):
            assert table[row].tolist() == [packed_bytes(matrix.numel, c, metadata) for c in LADDER]


def test_frontier_payload_cached_and_released():
    small = problem()
    frontier = make_frontier(small, PlanRequest("mxq"))
    first = planner.frontier_payload(frontier)
    assert planner.frontier_payload(frontier) is first
    method = LiveMethod("mxq", "MXQ", frontier)
    assert make_payload(small, [method])["model"] is make_payload(small, [method])["model"]
    other = planner.frontier_payload(make_frontier(problem(seed=1), PlanRequest("mxq")))
    assert other["id"] != first["id"]
    same = planner.frontier_payload(make_frontier(problem(), PlanRequest("mxq")))
    assert same["id"] == first["id"], "the browser need not unpack it again"
    gc.collect()
    before = len(planner._frontiers)
    del frontier, method
    gc.collect()
    assert len(planner._frontiers) == before - 1


def test_payload_of_560_matrices_below_150_kb():
    large = random_model(80)
    method = LiveMethod("mxq", "MXQ", make_frontier(large, PlanRequest("mxq")), "weight error")
    size = len(json.dumps(make_payload(large, [method])))
    print(f"560 × 12: {size / 1000:.0f} kB")
    assert size < 150_000


def test_payload_more_than_32767_matrices():
    matrices = tuple(Matrix(f"m.0.e.{i}", 0, "e", 128, 128, i) for i in range(33_000))
    many = Problem(matrices, {}, {"weight_error": np.tile(np.arange(12.0)[::-1], (33_000, 1))})
    content = planner.frontier_payload(make_frontier(many, PlanRequest("mxq")))
    assert decode_array(content["matrices"], "<i4").max() == 32_999


def test_take_commit_returns_each_commit_once(monkeypatch):
    session: dict[str, object] = {}
    monkeypatch.setattr(planner.st, "session_state", session)
    assert planner.read_committed_budget() is None
    session["planner"] = {"commit": {"bits": 3.50004, "serial": 1}}
    assert planner.read_committed_budget() == planner.CommittedBudget(3.5, None)
    assert planner.read_committed_budget() is None
    session["planner"] = {"commit": {"bits": 3.50004, "serial": 2}}
    again = planner.read_committed_budget()
    assert again == planner.CommittedBudget(3.5, None), "the same budget again is a new commit"
    session["planner"] = {"commit": {"bits": 3.5, "bytes": 2**20, "serial": 3}}
    assert planner.read_committed_budget() == planner.CommittedBudget(3.5, 2**20)
    del session["planner"]
    assert planner.read_committed_budget() is None, "another page was shown between"
    assert session["planner_serial"] == 3


def test_live_planner_mounts():
    def page():
        import numpy as np
        import streamlit as st

        from lsq_core.planning.make import make_frontier
        from lsq_core.planning.request import PlanRequest
        from lsq_core.ui.planner import Curve, LiveMethod, live_planner
        from tests.test_plan import problem

        small, bits = problem(layers=4), np.array([2.0, 9.0])
        curve = Curve(bits, 9 - bits / 9, 8 - bits / 9, 10 - bits / 9, 7.0)
        method = LiveMethod("mxq", "MXQ", make_frontier(small, PlanRequest("mxq")), "error", curve)
        live_planner(
            small,
            [method],
            budget=3.25,
            other_bytes=1,
            metadata="8bit",
            feasible=(2.127, 8.508),
        )
        st.write("mounted")

    app = AppTest.from_function(page).run()
    assert not app.exception
    assert app.markdown[0].value == "mounted"


def test_payload_includes_curve():
    small, bits = problem(layers=4), np.array([2.0, 9.0])
    curve = Curve(bits, 9 - bits, 8 - bits, 10 - bits, 7.0)
    method = LiveMethod("mxq", "MXQ", make_frontier(small, PlanRequest("mxq")), "error", curve)
    content = make_payload(small, [method])["methods"][0]["curve"]
    assert decode_array(content["low"], "<f8").tolist() == [6.0, -1.0]
    assert content["full"] == 7.0


def test_payload_includes_prediction_and_unknown_size():
    small = problem(layers=4)
    frontier = make_frontier(small, PlanRequest("mxq"))
    method = LiveMethod("mxq", "MXQ", frontier, at_budget=(6.5, 6.3, 6.8))
    content = make_payload(small, [method], other_bytes=None)
    assert content["methods"][0]["here"] == (6.5, 6.3, 6.8)
    assert content["otherBytes"] is None


def test_payload_pins_and_changed_pins():
    """The allowed range is sent; setting or dropping a pin in the browser returns all pins."""
    pins = ("*.layers.0.*=b8g64", "*.down_proj=b3g128..b8g32")
    small = apply_pins(problem(layers=4), pins)
    method = LiveMethod("mxq", "MXQ", make_frontier(small, PlanRequest("mxq")))
    content = make_payload(small, [method], pins=pins)
    assert content["pins"] == [*pins]
    assert decode_array(content["allowed"]["low"], "u1").tolist() == small.low.tolist()
    assert decode_array(content["allowed"]["high"], "u1").tolist() == small.high.tolist()
    edit = {"matrix": 2, "scope": "layer", "low": 7, "high": 11}
    assert planner.update_pins(small, pins, edit) == (*pins, "model.layers.1.*=b4g64..b8g32")
    assert planner.update_pins(small, pins, {"drop": 0}) == pins[1:]
    mixed, edit = small.with_options(mixed_rows(2, 3, 32)), edit | {"low": 1, "high": 4}
    (pin,) = planner.update_pins(mixed, (), edit)
    assert pin == "model.layers.1.*=b2h3r05g32..b2h3r20g32"
    assert apply_pins(mixed, (pin,)).low.max() == 1


def test_payload_includes_solved_plan():
    small = problem(layers=4)
    solved = planner.ExactPlan(np.arange(8) % 12, 1.5)
    method = LiveMethod("mxq", "MXQ", make_frontier(small, PlanRequest("mxq")), solved=solved)
    (content,) = make_payload(small, [method])["methods"]
    assert decode_array(content["solved"]["choice"], "u1").tolist() == list(range(8))
    assert content["solved"]["bound"] == 1.5


def test_payload_has_uniform_predictions_and_layer_scores():
    small = problem(layers=4)
    scores = LayerScores("sensitivity", "Sensitivity", np.array([1.0, np.nan, 3.0, 4.0]))
    method = LiveMethod("mxq", "MXQ", make_frontier(small, PlanRequest("mxq")), scores=scores)
    uniform = Curve(np.array([2.1, 3.1]), np.array([9.0, 8.0]), *np.ones((2, 2)), 7.0)
    data = json.loads(json.dumps(make_payload(small, [method], uniform=uniform), allow_nan=False))
    assert decode_array(data["uniform"]["perplexity"], "<f8").tolist() == [9.0, 8.0]
    sent = data["methods"][0]["scores"]
    assert (sent["name"], sent["label"]) == ("sensitivity", "Sensitivity")
    assert decode_array(sent["values"], "<f8")[[0, 2, 3]].tolist() == [1.0, 3.0, 4.0]
