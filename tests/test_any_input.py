"""Whatever comes in from outside: a result or an InputError, and nothing else."""

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
from lsq_core.bits import LADDER, MIXED, Budget, parse_config, stop_index
from lsq_core.cli import verbs
from lsq_core.errors import InputError, LsqError
from lsq_core.model.info import Matrix
from lsq_core.planning.make import make_frontier, make_plan
from lsq_core.planning.methods import PLANNERS
from lsq_core.planning.pins import Pin, with_pins
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import TOLERANCE, Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.ui import state
from lsq_core.units import parse_bytes
from tests.test_high_impact import problem as mixed_problem
from tests.test_plan import problem

SMALL, MIXED_ROWS = problem(layers=6), mixed_problem()
#: One matrix that groups of 128 don't fill, as the second.
UNEVEN = Problem(
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
anything = st.recursive(
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
configs = st.sampled_from([c.name for c in (*LADDER, *MIXED)])
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
    },
)


@fuzz
@example({"method": "uniform", "base": "4.13", "budget": "3.5bpp", "pins": ["*.mlp.*=b2g128"]})
@example({"method": "sensiboost", "base": "4.13", "budget": "3.5bpp", "pins": ["*.mlp.*=b2g128"]})
@given(requests)
def test_a_request_gives_a_plan_within_its_budget_or_a_sentence(asked):
    try:
        request = PlanRequest(**asked)
        here = MIXED_ROWS if request.method == "high-impact" else SMALL
        plan = make_plan(here, request)
    except LsqError:
        return
    if request.budget is not None:
        limit = Budget.parse(request.budget, plan.parameters).nominal_bytes
        assert plan.nominal_bytes <= limit * (1 + TOLERANCE)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())), plan.matrices, 0)
    assert again.choice == plan.choice
    assert again.rows == plan.rows


@fuzz
@given(st.dictionaries(st.sampled_from([f.name for f in fields(PlanRequest)]), anything))
def test_a_request_with_values_of_any_type(asked):
    try:
        request = PlanRequest.from_json({"method": "uniform"} | asked)
        make_frontier(SMALL, request)
        make_plan(SMALL, request)
    except LsqError:
        pass


def test_pins_with_a_base_and_a_budget():
    """The base alone is above the budget, and its pins bring it below."""
    request = PlanRequest("uniform", base="4.13", budget="3.5bpp", pins=("*.mlp.*=b2g128",))
    plan = make_plan(SMALL, request)
    given_to = {(m.type, c.name) for m, c in plan.choice.items()}
    assert given_to == {("self_attn.q_proj", "b4g128"), ("mlp.down_proj", "b2g128")}
    assert plan.bits_per_param <= 3.5
    assert any("Without the pins" in note for note in plan.notes)
    with pytest.raises(InputError, match="smallest plan"):  # but not below any
        make_plan(SMALL, PlanRequest("uniform", "4.13", "2.5bpp", pins=request.pins))


def test_pins_that_make_a_base_possible():
    """Groups of 128 don't fill a matrix, which a pin gives another configuration."""
    plan = make_plan(UNEVEN, PlanRequest("uniform", base="3.13", pins=("*.odd=b3g32",)))
    assert [c.name for c in plan.configs] == ["b3g128", "b3g32"]


# --- plan files -----------------------------------------------------------------------------


def _plan_file(here: Problem, **asked: object) -> dict:
    return json.loads(json.dumps(make_plan(here, PlanRequest(**asked)).to_json()))


LADDER_PLAN = _plan_file(SMALL, method="mxq", budget="3.25bpp", pins=("*.layers.0.*=b8g64",))
ROWS_PLAN = _plan_file(MIXED_ROWS, method="high-impact", budget="2.3bpp")


def _places(content: object, path: tuple = ()) -> list[tuple]:
    """Every place of a JSON value, as the keys that lead to it."""
    inner = content.items() if isinstance(content, dict) else ()
    return [path, *(place for k, v in inner for place in _places(v, (*path, k)))]


def _changed(content: dict, path: tuple, value: object, remove: bool, extra: bool) -> object:
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
@pytest.mark.parametrize("whole", [LADDER_PLAN, ROWS_PLAN], ids=["ladder", "rows"])
@given(data=st.data())
def test_a_damaged_plan_file_is_a_sentence(whole, data):
    here = SMALL if whole is LADDER_PLAN else MIXED_ROWS
    place = data.draw(st.sampled_from(_places(whole)))
    content = _changed(
        whole, place, data.draw(anything), *data.draw(st.tuples(*2 * [st.booleans()]))
    )
    try:
        plan = Plan.from_json(content, here.matrices, 0)
    except InputError:
        return
    assert len(plan.configs) == len(here.matrices)
    assert plan.planned_bytes > 0
    json.dumps(plan.to_json())
    for name, rows in plan.rows.items():
        matrix = next(m for m in here.matrices if m.name == name)
        assert len(rows) == plan.choice[matrix].high_rows(matrix.out_features)


@pytest.mark.parametrize(
    ("path", "value", "names"),
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
def test_what_is_wrong_in_a_plan_file_is_named(path, value, names):
    content = copy.deepcopy(LADDER_PLAN)
    parent = content["request"] if len(path) == 2 else content
    parent[path[-1]] = value
    with pytest.raises(InputError, match=names):
        Plan.from_json(content, SMALL.matrices, 0)


@pytest.mark.parametrize("entry", [None, 3, {"bits": 3}, {"bits": [3], "group_size": 64}])
def test_a_damaged_module_is_named(entry):
    content = copy.deepcopy(LADDER_PLAN)
    name = SMALL.matrices[3].name
    content["modules"][name] = entry
    with pytest.raises(InputError, match=name):
        Plan.from_json(content, SMALL.matrices, 0)


def test_a_plan_file_with_groups_that_do_not_fill_is_refused():
    content = _plan_file(UNEVEN, method="uniform", base="3.51")
    content["modules"]["model.layers.0.mlp.odd"] |= {"bits": 3, "group_size": 128}
    with pytest.raises(InputError, match=r"mlp\.odd .*b3g128"):
        Plan.from_json(content, UNEVEN.matrices, 0)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, '{"axis": 1' + "0" * 5000 + "}", "\0", "[]", "null", '"modules"'],
    ids=["empty", "cut off", "nested", "huge number", "zero byte", "list", "null", "text"],
)
def test_a_file_that_holds_no_plan(text, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text, "utf8")
    bench = SimpleNamespace(outline=SimpleNamespace(matrices=SMALL.matrices, other_bytes=0))
    with pytest.raises(InputError, match="not a plan"):
        verbs._saved_plan(path, bench)


# --- text that means a number ---------------------------------------------------------------

_WORDS = "3.25 9 0 . - 1e3 nan inf bpp MiB GiB B b g h r 64 128 .. = * ٣ ² , ;"
_parts = st.sampled_from([*_WORDS.split(), "\0", "\n", "9" * 400, "9" * 5000])
texts = st.lists(_parts, max_size=6).map("".join) | st.text(max_size=12)


@fuzz
@example("9" * 400 + "GiB")
@example("b" + "9" * 5000 + "g64")
@example("b2h3r" + "9" * 5000 + "g64")
@given(texts)
def test_any_text_as_a_size_a_configuration_or_a_pin(text):
    for read in (
        lambda: parse_bytes(text),
        lambda: Budget.parse(text, 4096).nominal_bytes,
        lambda: parse_config(text),
        lambda: stop_index(text),
        lambda: Pin.parse(text),
        lambda: Pin.parse(text, MIXED),
        lambda: with_pins(SMALL, (text,)),
        lambda: make_plan(SMALL, PlanRequest("uniform", budget=text)),
        lambda: make_plan(SMALL, PlanRequest("uniform", base=text)),
    ):
        with suppress(InputError):
            read()
    for budget in sweep.parse_budgets(text):
        assert budget.strip()


# --- the address ----------------------------------------------------------------------------


class _Session(dict):
    """In the place of Streamlit's session: what :mod:`lsq_core.ui.state` asks of it."""


@pytest.fixture
def address(monkeypatch):
    """What stands in the address, and an empty session beside it."""
    query: dict[str, str] = {}
    monkeypatch.setattr(st_app, "query_params", query)
    monkeypatch.setattr(st_app, "session_state", _Session())
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
def test_any_address_gives_values_that_the_controls_take(address, given_address):
    st_app.session_state.clear()
    address.clear()
    address.update(given_address)
    state.begin_plan(has_profile=True)
    chosen = st_app.session_state
    assert 0 <= chosen["boost_stop"] <= 11
    assert 0 <= chosen["top_m"] < 2**53
    assert 0 <= chosen["seed"] < 2**53
    assert math.isfinite(chosen["budget"])
    assert chosen["group_size"] in (32, 64, 128)
    with suppress(LsqError):
        make_plan(SMALL, state.plan_request())
