"""Fuzzing of external input: every input gives a result or an LsqError."""

from __future__ import annotations

import copy
import json
import math
from contextlib import suppress
from dataclasses import fields
from types import SimpleNamespace

import pytest
import streamlit as st_app
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lsq_core import sweep
from lsq_core.bits import LADDER, MIXED_ROW_CONFIGS, Budget, parse_config, stop_index
from lsq_core.cli import verbs
from lsq_core.errors import InputError, LsqError
from lsq_core.model.info import Matrix
from lsq_core.planning.make import make_frontier, make_plan
from lsq_core.planning.methods import PLANNERS
from lsq_core.planning.pins import Pin, apply_pins
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import TOLERANCE, Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.ui import state
from lsq_core.units import parse_bytes
from tests.test_high_impact import problem as mixed_problem
from tests.test_plan import problem


def measured_problem() -> Problem:
    """Return a six-layer problem with all the data that methods on the ladder use."""
    small = problem(layers=6)
    error, scores = small.by_config["weight_error"], small.scores
    by_config = dict.fromkeys(("weight_error", "sensitivity_module", "expected_kl"), error)
    return Problem(small.matrices, scores | {"loss_impact": scores["kurtosis"]}, by_config)


SMALL, MIXED_ROWS = measured_problem(), mixed_problem()
#: Two matrices, the second of which is not divisible into groups of 128.
INDIVISIBLE = Problem(
    (
        Matrix("model.layers.0.mlp.up", 0, "mlp.up", 128, 128),
        Matrix("model.layers.0.mlp.odd", 0, "mlp.odd", 33, 32),
    )
)
fuzz = settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
any_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["b3g64", "b2h3r10g128", "8bit", "AAAA", "mxq", "hqq-3", "3.13"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)


# --- requests -------------------------------------------------------------------------------

numbers = st.floats(2, 9).map(lambda bits: f"{bits:.4f}bpp")
sizes = st.sampled_from([c.stop_name for c in LADDER] + [c.name for c in LADDER])
budgets = st.none() | numbers | sizes | sizes.map("{}bpp".format) | st.text(max_size=6)
configs = st.sampled_from([c.name for c in (*LADDER, *MIXED_ROW_CONFIGS)])
patterns = st.sampled_from(["*", "*.mlp.*", "*.layers.0.*", "*.q_proj", "nowhere", "[", ""])
pins = st.lists(
    st.builds("{}={}".format, patterns, configs)
    | st.builds("{}={}..{}".format, patterns, configs, configs)
    | st.text(max_size=8),
    max_size=2,
)
requests = st.fixed_dictionaries(
    {"method": st.sampled_from(list(PLANNERS)), "budget": budgets},
    optional={
        "base": st.none() | sizes,
        "pins": pins,
        "boost_stop": st.integers(-1, 20),
        "top_m": st.integers(-1, 20),
        "seed": st.integers(-1, 2**70),
        "exact": st.booleans(),
        "metric": st.sampled_from(["sensitivity", "sensitivity_module", "kurtosis"]),
        "low_bits": st.sampled_from([2, 3, 4]),
        "high_bits": st.sampled_from([3, 4, 16]),
        "group_size": st.sampled_from([32, 64, 128]),
        "loss": st.sampled_from(["block", "model", "none"]),
        "ratios": st.sampled_from(["uniform", "diagonal", "full"]),
        "clip": st.booleans(),
        "ties": st.lists(st.sampled_from(["q_proj,k_proj", "gate_proj,up_proj", "q_proj", "x,y"])),
        "serve": st.sampled_from([None, "vllm", "nothing"]),
    },
)


@fuzz
@example({"method": "uniform", "base": "4.13", "budget": "3.5bpp", "pins": ["*.mlp.*=b2g128"]})
@example({"method": "sensiboost", "base": "4.13", "budget": "3.5bpp", "pins": ["*.mlp.*=b2g128"]})
@given(requests)
def test_make_plan_any_request_within_budget_or_raises(request_fields):
    try:
        request = PlanRequest(**request_fields)
        target = MIXED_ROWS if request.method == "high-impact" else SMALL
        plan = make_plan(target, request)
    except LsqError:
        return
    if request.budget is not None:
        budget = Budget.parse(request.budget, plan.parameters)
        if budget.planned_bytes is None:
            assert plan.nominal_bytes <= budget.nominal_bytes * (1 + TOLERANCE)
        else:
            assert plan.planned_bytes <= budget.planned_bytes
    restored = Plan.from_json(json.loads(json.dumps(plan.to_json())), plan.matrices, 0)
    assert restored.choice == plan.choice
    assert restored.rows == plan.rows


@fuzz
@given(st.dictionaries(st.sampled_from([f.name for f in fields(PlanRequest)]), any_json))
def test_plan_request_from_json_any_types_no_crash(request_fields):
    """The result is a plan for every matrix or a one-line error."""
    message, matrices = "", SMALL.matrices
    try:
        request = PlanRequest.from_json({"method": "uniform"} | request_fields)
        make_frontier(SMALL, request)
        matrices = make_plan(SMALL, request).matrices
    except LsqError as error:
        message = str(error) or "\n"
    assert "\n" not in message
    assert matrices == SMALL.matrices


def test_uniform_base_with_pins_meets_budget():
    """The base alone exceeds the budget; the pins bring the plan within it."""
    request = PlanRequest("uniform", base="4.13", budget="3.5bpp", pins=("*.mlp.*=b2g128",))
    plan = make_plan(SMALL, request)
    assigned = {(m.type, c.name) for m, c in plan.choice.items()}
    assert assigned == {("self_attn.q_proj", "b4g128"), ("mlp.down_proj", "b2g128")}
    assert plan.bits_per_param <= 3.5
    assert any("Without the pins" in note for note in plan.notes)
    with pytest.raises(InputError, match="smallest plan"):  # smaller even with pins
        make_plan(SMALL, PlanRequest("uniform", "4.13", "2.5bpp", pins=request.pins))


def test_pin_makes_indivisible_base_feasible():
    """One matrix is not divisible into groups of 128; a pin gives it another configuration."""
    plan = make_plan(INDIVISIBLE, PlanRequest("uniform", base="3.13", pins=("*.odd=b3g32",)))
    assert [c.name for c in plan.configs] == ["b3g128", "b3g32"]


# --- plan files -----------------------------------------------------------------------------


def _plan_file(target: Problem, **request_fields: object) -> dict:
    return json.loads(json.dumps(make_plan(target, PlanRequest(**request_fields)).to_json()))


LADDER_PLAN = _plan_file(SMALL, method="mxq", budget="3.25bpp", pins=("*.layers.0.*=b8g64",))
ROWS_PLAN = _plan_file(MIXED_ROWS, method="high-impact", budget="2.3bpp")


def _json_paths(content: object, path: tuple = ()) -> list[tuple]:
    """Return the path of every value in nested JSON objects, as a tuple of keys."""
    inner = content.items() if isinstance(content, dict) else ()
    return [path, *(json_path for k, v in inner for json_path in _json_paths(v, (*path, k)))]


def _with_change(content: dict, path: tuple, value: object, remove: bool, extra: bool) -> object:
    if not path:
        return value
    content = copy.deepcopy(content)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    if remove:
        del parent[path[-1]]
    elif extra and isinstance(parent[path[-1]], dict):
        parent[path[-1]]["unknown"] = value
    else:
        parent[path[-1]] = value
    return content


@fuzz
@pytest.mark.parametrize("plan_file", [LADDER_PLAN, ROWS_PLAN], ids=["ladder", "rows"])
@given(data=st.data())
def test_plan_from_json_damaged_content_valid_or_raises(plan_file, data):
    target = SMALL if plan_file is LADDER_PLAN else MIXED_ROWS
    json_path = data.draw(st.sampled_from(_json_paths(plan_file)))
    content = _with_change(
        plan_file, json_path, data.draw(any_json), *data.draw(st.tuples(*2 * [st.booleans()]))
    )
    try:
        plan = Plan.from_json(content, target.matrices, 0)
    except InputError:
        return
    assert len(plan.configs) == len(target.matrices)
    assert plan.planned_bytes > 0
    json.dumps(plan.to_json())
    for name, rows in plan.rows.items():
        matrix = next(m for m in target.matrices if m.name == name)
        assert len(rows) == plan.choice[matrix].high_rows(matrix.out_features)


@pytest.mark.parametrize(
    ("path", "value", "pattern"),
    [
        (("modules",), [], "modules"),
        (("modules",), {}, "another model"),
        (("request", "colour"), "red", "colour"),
        (("request", "boost_stop"), 2.5, "boost_stop"),
        (("request", "pins"), "b3g64", "pins"),
        (("axis",), 2, "axis"),
        (("axis",), True, "axis"),
        (("metadata",), "4bit", "metadata"),
        (("quantizer",), "magic", "magic"),
        (("notes",), 3, "notes"),
        (("flagged",), {"q": "strong"}, "flagged q"),
        (("lower_bound",), math.nan, "lower_bound"),
        (("lower_bound",), None, "lower_bound"),
        (("objective",), 10**400, "objective"),
    ],
)
def test_plan_from_json_bad_field_named_in_error(path, value, pattern):
    content = copy.deepcopy(LADDER_PLAN)
    parent = content["request"] if len(path) == 2 else content
    parent[path[-1]] = value
    with pytest.raises(InputError, match=pattern):
        Plan.from_json(content, SMALL.matrices, 0)


@pytest.mark.parametrize("entry", [None, 3, {"bits": 3}, {"bits": [3], "group_size": 64}])
def test_plan_from_json_bad_module_named_in_error(entry):
    content = copy.deepcopy(LADDER_PLAN)
    name = SMALL.matrices[3].name
    content["modules"][name] = entry
    with pytest.raises(InputError, match=name):
        Plan.from_json(content, SMALL.matrices, 0)


def test_plan_from_json_indivisible_group_raises():
    content = _plan_file(INDIVISIBLE, method="uniform", base="3.51")
    content["modules"]["model.layers.0.mlp.odd"] |= {"bits": 3, "group_size": 128}
    with pytest.raises(InputError, match=r"mlp\.odd .*b3g128"):
        Plan.from_json(content, INDIVISIBLE.matrices, 0)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, '{"axis": 1' + "0" * 5000 + "}", "\0", "[]", "null", '"modules"'],
    ids=["empty", "cut off", "nested", "huge number", "zero byte", "list", "null", "text"],
)
def test_saved_plan_invalid_json_raises(text, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text, "utf8")
    session = SimpleNamespace(config_info=SimpleNamespace(matrices=SMALL.matrices, other_bytes=0))
    with pytest.raises(InputError, match="not a plan"):
        verbs._load_plan(path, session)


# --- parsing text ---------------------------------------------------------------------------

_WORDS = "3.25 9 0 . - 1e3 nan inf bpp MiB GiB B b g h r 64 128 .. = * ٣ ² , ;"
_parts = st.sampled_from([*_WORDS.split(), "\0", "\n", "9" * 400, "9" * 5000])
texts = st.lists(_parts, max_size=6).map("".join) | st.text(max_size=12)


@fuzz
@example("9" * 400 + "GiB")
@example("b" + "9" * 5000 + "g64")
@example("b2h3r" + "9" * 5000 + "g64")
@given(texts)
def test_text_parsers_any_text_parse_or_raise(text):
    for parser in (
        lambda: parse_bytes(text),
        lambda: Budget.parse(text, 4096).nominal_bytes,
        lambda: parse_config(text),
        lambda: stop_index(text),
        lambda: Pin.parse(text),
        lambda: Pin.parse(text, MIXED_ROW_CONFIGS),
        lambda: apply_pins(SMALL, (text,)),
        lambda: make_plan(SMALL, PlanRequest("uniform", budget=text)),
        lambda: make_plan(SMALL, PlanRequest("uniform", base=text)),
    ):
        with suppress(InputError):
            parser()
    for budget in sweep.parse_budgets(text):
        assert budget.strip()


# --- URL parameters -------------------------------------------------------------------------


class _SessionState(dict):
    """Stand-in for Streamlit's session state, sufficient for :mod:`lsq_core.ui.state`."""


@pytest.fixture
def url_query(monkeypatch):
    """Replace the URL parameters and the session state with empty ones; return the former."""
    query: dict[str, str] = {}
    monkeypatch.setattr(st_app, "query_params", query)
    monkeypatch.setattr(st_app, "session_state", _SessionState())
    return query


_number_texts = texts | st.integers(-(10**20), 10**20).map(str) | st.floats().map(str)


@fuzz
@example({"boost_stop": "-5"})
@example({"boost_stop": "99"})
@example({"top_m": "-1"})
@example({"seed": "9" * 30})
@example({"seed": "9" * 5000})
@example({"budget": "1e999"})
@given(st.dictionaries(st.sampled_from(list(state._PLAN_DEFAULTS)), _number_texts))
def test_begin_plan_any_url_gives_valid_control_values(url_query, query_values):
    st_app.session_state.clear()
    url_query.clear()
    url_query.update(query_values)
    state.init_settings("a model", None)
    state.init_plan(has_profile=True)
    chosen = st_app.session_state
    assert 0 <= chosen["boost_stop"] <= 11
    assert 0 <= chosen["top_m"] < 2**53
    assert 0 <= chosen["seed"] < 2**53
    assert math.isfinite(chosen["budget"])
    assert chosen["group_size"] in (32, 64, 128)
    with suppress(LsqError):
        make_plan(SMALL, state.plan_request())
