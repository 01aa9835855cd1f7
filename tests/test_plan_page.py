"""The Plan page without a browser: it shows the library's plans and explains what it cannot do."""

from __future__ import annotations

import json
import re
import shlex
from base64 import b64decode
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from lsq_core import disk, jobs
from lsq_core.bits import LADDER
from lsq_core.evaluation.prediction import Prediction, is_wide
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.model.source import ModelSource
from lsq_core.planning.constraints import restrict
from lsq_core.planning.facts import z_scores
from lsq_core.planning.make import make_frontier, make_plan
from lsq_core.planning.methods import PLANNERS
from lsq_core.planning.methods.boost import detect_by_type
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.planning.serving_memory import (
    MEMORY_SIZES_GIB,
    context_bytes_per_token,
    memory_budgets,
)
from lsq_core.session import Session
from lsq_core.stages.plan import build_problem
from lsq_core.store.store import Store
from lsq_core.ui.plan import actions, live, prediction
from lsq_core.units import GIB
from tests.helpers import wait_for
from tests.test_app import (  # noqa: F401 - fixtures
    Filled,
    _array,
    chart,
    filled,
    filled_once,
    first_line,
    go_to_page,
    open_page,
)


def planner_data(app: AppTest) -> dict:
    """Return the data sent to the live planner."""
    (planner,) = [
        c.proto
        for c in app.get("bidi_component")
        if c.proto.component_name.endswith("lsq_live_planner")
    ]
    return json.loads(planner.json)


def fixed(app: AppTest) -> list[str]:
    """Return the configurations of a plan requested by base alone."""
    return [LADDER[i].name for i in b64decode(planner_data(app)["fixed"])]


def problem(filled: Filled) -> Problem:  # noqa: F811
    model_session = Session(ModelSource(filled.model), Store(filled.path))
    return build_problem(model_session.info, model_session.find_profile(filled.settings))


def command_line_plan(app: AppTest) -> dict[str, str]:
    """Run the copied command line and return its plan as module name to configuration."""
    from lsq_core.cli.program import execute

    command = shlex.split(next(c.value for c in app.code))
    arguments = [w for w in command[1:] if w not in ("--out", "plan.json")]
    result = execute(arguments, lambda *report: None)
    return {name: entry["config"] for name, entry in result["modules"].items()}


@pytest.mark.parametrize(
    ("method", "more"), [("uniform", {}), ("sensiboost", {}), ("kurtboost", {"boost_stop": 2})]
)
def test_plan_page_base_matches_make_plan(filled, method, more):  # noqa: F811
    app = open_page("Plan", model=filled.model, method=method, ask="base")
    before = fixed(app)
    app.selectbox(key="base").set_value("4.51").run()
    assert not app.exception
    plan = make_plan(problem(filled), PlanRequest(method, base="4.51", **more))
    assert fixed(app) == [c.name for c in plan.configs] != before


@pytest.mark.parametrize("method", ["mxq", "sensiboost", "sensi-knapsack"])
def test_live_planner_frontier_matches_make_frontier(filled, method):  # noqa: F811
    app = open_page("Plan", model=filled.model, method=method, budget="3.4")
    sent = planner_data(app)
    assert sent["budget"] == pytest.approx(3.4)
    assert sent["fixed"] is None
    frontier = make_frontier(problem(filled), PlanRequest(method))
    (shown,) = sent["methods"]
    starts = np.frombuffer(b64decode(shown["frontier"]["starts"]), "u1")
    assert starts.tolist() == np.concatenate([s.start for s in frontier.segments]).tolist()
    assert shown["frontier"]["counts"] == [len(s.moves) for s in frontier.segments]
    plan = make_plan(problem(filled), PlanRequest(method, budget="3.4bpp"))
    assert first_line(app).startswith(f"{plan.bits_per_param:.2f} bits")
    assert command_line_plan(app) == {m.name: c.name for m, c in plan.choice.items()}


def test_live_planner_feasible_range(filled):  # noqa: F811
    app = open_page("Plan", model=filled.model, method="mxq", budget="99")
    low, high = planner_data(app)["feasible"]
    assert (low, high) == pytest.approx((2.127, LADDER[-1].nominal_bits))
    assert planner_data(app)["budget"] == pytest.approx(high)
    assert not app.error
    capped = open_page("Plan", model=filled.model, method="kurtboost", ask="both", base="4.25")
    assert (
        planner_data(capped)["feasible"][0]
        == planner_data(capped)["budget"]
        == pytest.approx(4.254)
    )
    assert not capped.error


def test_plan_page_two_methods_share_budget(filled):  # noqa: F811
    app = open_page("Plan", model=filled.model, method="mxq", budget="3.4", against="uniform")
    assert [m["name"] for m in planner_data(app)["methods"]] == ["mxq", "uniform"]
    names = {t.get("name", "") for t in chart(app)["data"]}
    assert {"MXQ, squared weight error", "Uniform, squared weight error"} <= names
    captions = " ".join(c.value for c in app.caption)
    assert "Predictions on" in captions, "two runs are too few to predict from"


def test_plan_page_says_expected_kl_before_any_run(filled):  # noqa: F811
    session = Session(ModelSource(filled.model), Store(filled.path), "cpu")
    profile = session.profile(filled.settings, ["expected_kl"])
    app = open_page("Plan", model=filled.model, method="kl-aware", budget="3.4")
    plan = session.plan(PlanRequest("kl-aware", budget="3.4bpp"), filled.settings)
    table = profile.by_config("expected_kl")
    stops = [LADDER.index(config) for config in plan.configs]
    expected = table[range(len(stops)), stops].sum()
    captions = " ".join(c.value for c in app.caption)
    assert f"about {expected:.2g} nats" in captions


def test_plan_page_missing_profile_message():
    app = open_page("Plan", method="sensiboost")
    assert re.match("SensiBoost .*sensitivity by part of demo", first_line(app))
    assert not app.get("bidi_component")


def test_plan_page_measure_missing_metric_starts_job(filled, monkeypatch):  # noqa: F811
    app = open_page("Plan", model=filled.model, method="loss-aware")
    assert re.match("Loss-aware .*loss impact", first_line(app))
    started = []
    monkeypatch.setattr(jobs, "start", lambda folder, order: started.append((folder, order)))
    next(b for b in app.button if b.label == "Measure the loss impact").click().run()
    ((folder, order),) = started
    assert folder == disk.jobs_folder(Store(filled.path))
    assert order[0] == "profile"
    assert order[order.index("--metric") + 1] == "loss_impact"


def test_plan_page_pins_applied_and_invalid_pin_shows_error(filled):  # noqa: F811
    app = open_page("Plan", model=filled.model, method="mxq", budget="5.00")
    pin = "*.layers.2.*=b8g64"
    app.text_area(key="pins").set_value(pin).run()
    plan = make_plan(problem(filled), PlanRequest("mxq", budget="5bpp", pins=(pin,)))
    assert command_line_plan(app) == {m.name: c.name for m, c in plan.choice.items()}
    assert {plan.choice[m].name for m in plan.matrices if m.layer == 2} == {"b8g64"}
    assert any("pins cost" in c.value for c in app.caption)
    app.text_area(key="pins").set_value("no pin").run()
    assert ["not a pin" in e.value for e in app.error] == [True]


@pytest.mark.parametrize("method", ["mxq", "kurtboost"])
def test_plan_page_serves_and_tells_the_cost(filled, method):  # noqa: F811
    app = open_page("Plan", model=filled.model, method=method, budget="5.00", against="uniform")
    assert [m["free"] for m in planner_data(app)["methods"]] == [None, None]
    assert planner_data(app)["tied"] is None
    app.segmented_control(key="serve").set_value("vllm").run()
    request = PlanRequest(method, budget="5bpp", serve="vllm")
    plan = make_plan(problem(filled), request)
    assert command_line_plan(app) == {m.name: c.name for m, c in plan.choice.items()}
    assert {c.bits for c in plan.configs} <= {4, 8}
    assert any("constraints of vLLM" in c.value for c in app.caption)
    sent = planner_data(app)
    restricted = restrict(problem(filled), request)
    assert np.frombuffer(b64decode(sent["tied"]), "<i4").tolist() == restricted.items.tolist()
    free = make_frontier(problem(filled), PlanRequest(method))
    for shown in sent["methods"]:
        assert shown["free"]["frontier"]["id"] != shown["frontier"]["id"]
    starts = np.frombuffer(b64decode(sent["methods"][0]["free"]["frontier"]["starts"]), "u1")
    assert starts.tolist() == np.concatenate([s.start for s in free.segments]).tolist()
    assert app.query_params["serve"] == "vllm"


def test_plan_page_served_budget_and_base_out_of_reach(filled):  # noqa: F811
    app = open_page("Plan", model=filled.model, method="mxq", budget="3.00", serve="vllm")
    (message,) = [w.value for w in app.warning]
    assert re.search(r"3\.00 bits is out of reach for vLLM", message)
    app = open_page("Plan", model=filled.model, method="uniform", ask="base", serve="vllm")
    assert {float(bits) > 4 for bits in app.selectbox(key="base").options} == {True}
    assert not app.error


def test_plan_page_ties_applied_and_invalid_tie_shows_error(filled):  # noqa: F811
    app = open_page("Plan", model=filled.model, method="mxq", budget="5.00")
    app.text_area(key="ties").set_value("gate_proj,up_proj\nq_proj,k_proj").run()
    request = PlanRequest("mxq", budget="5bpp", ties=("gate_proj,up_proj", "q_proj,k_proj"))
    plan = make_plan(problem(filled), request)
    assert command_line_plan(app) == {m.name: c.name for m, c in plan.choice.items()}
    app.text_area(key="ties").set_value("q_proj").run()
    assert ["not a tie" in e.value for e in app.error] == [True]
    assert first_line(app) == "No such plan."


def test_plan_page_mixed_rows_cannot_be_served(filled):  # noqa: F811
    app = open_page("Plan", model=filled.model, method="high-impact", serve="vllm")
    assert app.segmented_control(key="serve").disabled
    assert not [e.value for e in app.error if "vLLM" in e.value]


def test_plan_page_second_method_ignores_unsupported_base(filled):  # noqa: F811
    """MXQ takes no base: one left in the URL is not applied to the second method either."""
    app = open_page(
        "Plan", model=filled.model, method="mxq", ask="both", base="4.25", against="sensiboost"
    )
    ours, theirs = planner_data(app)["methods"]
    assert (ours["name"], theirs["name"]) == ("mxq", "sensiboost")
    assert not app.error


def test_plan_page_invalid_url_numbers_use_defaults(filled):  # noqa: F811
    numbers = {"boost_stop": "-5", "top_m": "-1", "seed": "9" * 30, "budget": "inf"}
    app = open_page("Plan", model=filled.model, method="sensiboost-ablation", **numbers)
    chosen = app.session_state
    assert (chosen["boost_stop"], chosen["top_m"], chosen["seed"]) == (2, 0, 0)


def test_plan_page_budget_stop_name(filled):  # noqa: F811
    app = open_page("Plan", model=filled.model, method="uniform", budget="3.25")
    assert set(command_line_plan(app).values()) == {"b3g64"}


def test_plan_page_budget_out_of_range_clamped_with_warning(filled):  # noqa: F811
    app = open_page("Plan", model=filled.model, method="mxq", budget="100")
    assert first_line(app).startswith("8.51 bits"), "the largest plan itself"
    (message,) = [w.value for w in app.warning]
    assert re.search(r"100\.00 bits .*out of reach.*8\.51 bits", message)
    app.text_area(key="pins").set_value("*=b4g64").run()
    (message,) = [w.value for w in app.warning]
    assert re.search(r"100\.00 bits .*out of reach .*pins.* 4\.25", message)
    again = open_page("Plan", model=filled.model, method="mxq", budget="nan")
    assert first_line(again).startswith("3.60 bits"), "what is no number is the default"


def test_take_pins_rejects_contradicting_pins(filled, monkeypatch):  # noqa: F811
    """Sets pins as the component's answer does; the browser tests do the clicking."""
    plan_query = SimpleNamespace(problem=problem(filled), request=PlanRequest("mxq"))
    session = {"pins": ""}
    monkeypatch.setattr(actions.st, "session_state", session)
    layer = "model.layers.0.*=b4g64"
    live.set_pins(plan_query, (layer,))
    assert session == {"pins": layer}
    live.set_pins(plan_query, (layer, "*.q_proj=b8g64"))
    assert session["pins"] == layer
    assert "contradict" in session["pins_refused"]
    live.set_pins(plan_query, ())
    assert session["pins"] == ""
    plan_query.request = PlanRequest("mxq", serve="vllm")
    live.set_pins(plan_query, ("*.q_proj=b3g64",))
    assert session["pins"] == ""
    assert "vLLM supports" in session["pins_refused"]


def test_prediction_band_format():
    def message(*figures: float) -> str:
        return prediction.format_band(Prediction(*np.array(figures)[:, None], np.array([False])))

    assert message(61.7, 61.3, 62.12) == "61.70 ±0.42"
    assert message(11.11, 7.523, 23.53) == "11.1 (7.52 to 23.5)"
    assert message(8383.03, 1189.2, 451101.7) == "8,380 (1,190 to 451,000)"


def test_prediction_band_is_wide_beyond_a_tenth():
    assert not is_wide(10.0, 9.1, 10.9)
    assert is_wide(10.0, 9.1, 11.1)
    assert is_wide(10.0, 8.9, 10.9)


def test_plan_page_url_has_only_non_defaults(filled):  # noqa: F811
    app = open_page("Plan", model=filled.model, method="sensiboost", ask="base")
    app.selectbox(key="base").set_value("4.51").run()
    assert set(app.query_params) == {"model", "method", "ask", "base"}
    app.selectbox(key="base").set_value("3.13").run()
    assert set(app.query_params) == {"model", "method", "ask"}


def test_plan_page_save_and_open_plan(filled):  # noqa: F811
    app = open_page("Plan", model=filled.model, method="mxq", budget="4.2", against="uniform")
    app.text_input(key="plan_name").set_value("mine").run()
    _click_button(app, "Save the plan")
    app.session_state["budget"] = 2.5
    app.run()
    _click_button(app, "Open")
    assert app.session_state["budget"] == pytest.approx(4.2)
    assert planner_data(app)["budget"] == pytest.approx(4.2)


def test_plan_page_open_plan_with_byte_budget(filled):  # noqa: F811
    store, total = Store(filled.path), problem(filled).total
    model_session = Session(ModelSource(filled.model), store)
    plan = make_plan(problem(filled), PlanRequest("mxq", budget=f"{total / 2:.0f}B"))
    store.save_plan(plan, model_session.info.fingerprint, None, "four bits")
    app = open_page("Plan", model=filled.model, method="mxq", budget="2.5")
    _click_button(app, "Open")
    assert app.session_state["budget_bytes"] == int(total / 2)
    assert command_line_plan(app) == {m.name: c.name for m, c in plan.choice.items()}


def test_plan_page_budget_in_bytes_bounds_every_method(filled):  # noqa: F811
    """The typed size applies to the plan, the compared plan and the command line."""
    size = int(problem(filled).total * 3.4 / 8)
    app = open_page(
        "Plan", model=filled.model, method="mxq", budget_bytes=str(size), against="sensi-knapsack"
    )
    sent = planner_data(app)
    assert sent["budgetBytes"] == size
    plan = make_plan(problem(filled), PlanRequest("mxq", budget=f"{size}B"))
    assert plan.planned_bytes <= size
    assert command_line_plan(app) == {m.name: c.name for m, c in plan.choice.items()}
    assert not app.error


def test_plan_page_budget_outlives_a_constraint(filled):  # noqa: F811
    """vLLM raises the budget to its minimum; without vLLM the requested budget is back."""
    app = open_page("Plan", model=filled.model, method="mxq", budget="3.2")
    app.segmented_control(key="serve").set_value("vllm").run()
    raised = planner_data(app)["budget"]
    assert raised > 4
    assert app.warning
    app.segmented_control(key="serve").set_value("").run()
    assert planner_data(app)["budget"] == pytest.approx(3.2)
    assert not app.warning


def test_plan_page_exact_plan_shown(filled):  # noqa: F811
    app = open_page("Plan", model=filled.model, method="mxq", budget="3.3", exact="True")
    assert any("Optimal at" in c.value for c in app.caption)
    plan = make_plan(problem(filled), PlanRequest("mxq", budget="3.3bpp", exact=True))
    (method,) = planner_data(app)["methods"]
    assert [LADDER[i] for i in b64decode(method["solved"]["choice"])] == list(plan.configs)


def _click_button(app: AppTest, label: str) -> None:
    next(b for b in app.button if b.label == label).click().run()
    assert not app.exception


# --- data behind the panels -----------------------------------------------------------------


def test_plan_page_baseline_runs_in_chart(filled):  # noqa: F811
    model_session = Session(ModelSource(filled.model), Store(filled.path), "cpu")
    text = EvaluationRequest(filled.settings.calibration, max_tokens=600)
    for base, quantizer in [("2.13", "rtn"), ("3.13", "rtn"), ("4.13", "rtn"), ("4.25", "nf4")]:
        plan = model_session.plan(PlanRequest("uniform", base=base), filled.settings)
        model_session.run(plan, quantizer, text)
    app = open_page("Plan", model=filled.model, method="mxq")
    charts = [json.loads(drawn.proto.spec) for drawn in app.get("plotly_chart")]
    lines = [line for drawn in charts for line in drawn["data"]]
    runs = {line.get("name"): len(_array(line["x"])) for line in lines}
    assert runs["RTN, measured"] == 3
    assert runs["NF4, measured"] == 1


def test_memory_presets_fit_plan_and_context(filled):  # noqa: F811
    model_session = Session(ModelSource(filled.model), Store(filled.path))
    model_problem = problem(filled)
    # Scale the MLPs to 40 billion weights, so that some presets are in range.
    mlp = [m.numel for m in model_problem.matrices if m.type.startswith("mlp")]
    scale = 40e9 / sum(mlp)
    wide = [
        replace(m, out_features=128 * int(m.out_features * scale / 128))
        if m.type.startswith("mlp")
        else m
        for m in model_problem.matrices
    ]
    large = replace(model_problem, matrices=tuple(wide))
    info = replace(model_session.info, matrices=large.matrices)
    context = context_bytes_per_token(info)
    assert context == 2 * sum(
        m.out_features for m in large.matrices if m.type.endswith(("k_proj", "v_proj"))
    )
    in_range = 0
    for memory in memory_budgets(info, large, "8bit"):
        low, high = (8 * size / large.total for size in large.feasible)
        if low <= memory.bits <= high:
            in_range += 1
            plan = make_plan(large, PlanRequest("mxq", budget=f"{memory.bits:.6f}bpp"))
            used = plan.planned_bytes + info.other_bytes + context * memory.tokens
            assert used <= memory.gib * GIB
            assert used >= 0.9 * memory.gib * GIB - GIB
    assert in_range
    assert [m.gib for m in memory_budgets(info, large, "8bit")] == list(MEMORY_SIZES_GIB)


def test_z_scores_match_layer_detection(filled):  # noqa: F811
    model_problem = problem(filled)
    z = z_scores(model_problem, "kurtosis")
    detections = detect_by_type(model_problem, "kurtosis", 0)
    for matrix, value in zip(model_problem.matrices, z, strict=True):
        layers, detection = detections[matrix.type]
        if matrix.layer == layers[0]:
            assert np.isnan(value)
        else:
            assert value == detection.z[layers.index(matrix.layer) - 1]


# --- quantizing and evaluating on the page --------------------------------------------------


def set_up_run(filled: Filled) -> AppTest:  # noqa: F811
    app = open_page("Model", model=filled.model, method="uniform", ask="base", base="4.51")
    app.session_state["corpus"] = filled.settings.calibration
    go_to_page(app, "Plan")
    app.number_input(key="max_tokens").set_value(300)
    return app.selectbox(key="quantizer").set_value("rtn").run()


def test_plan_page_runs_the_plan_in_place(filled):  # noqa: F811
    app = set_up_run(filled)
    _click_button(app, "Quantize and evaluate")
    (job,) = jobs.list_jobs(disk.jobs_folder(Store(filled.path)))
    assert any(job.title in m.value for m in app.markdown)
    assert [t.value for t in app.toast if job.title in t.value]
    wait_for(lambda: not jobs.read(job.folder).active)
    assert jobs.read(job.folder).state == "done", job.log_tail()
    app.run()
    row = Store(filled.path).results().iloc[0]
    assert row["bits_per_param"] == pytest.approx(LADDER[8].nominal_bits)
    assert (row["quantizer"], row["tokens"]) == ("rtn", 300)
    verdict = f"Perplexity {row['perplexity']:.2f}"
    assert any(verdict in m.value for m in app.markdown)
    assert [t.value for t in app.toast if verdict in t.value]
    app.run()
    assert not app.toast, "said once"
    assert any(verdict in m.value for m in app.markdown), "kept"
    # the Run page starts the same command
    go_to_page(app, "Run")
    _click_button(app, "Quantize and evaluate")
    assert {j.arguments for j in jobs.list_jobs(disk.jobs_folder(Store(filled.path)))} == {
        job.arguments
    }
    for started in jobs.list_jobs(disk.jobs_folder(Store(filled.path))):
        if started.active:
            jobs.cancel(started)


def test_plan_page_says_how_long_a_run_takes(filled):  # noqa: F811
    app = set_up_run(filled)
    assert any("300 tokens" in c.value and "About " in c.value for c in app.caption)


def test_plan_page_invalid_save_name_shows_error(filled):  # noqa: F811
    app = set_up_run(filled)
    app.text_input(key="save").set_value("../away").run()
    assert not app.error
    _click_button(app, "Quantize and evaluate")
    assert "not a valid name" in app.error[0].value
    assert not jobs.list_jobs(disk.jobs_folder(Store(filled.path)))


def test_plan_page_incompatible_quantizer_disabled_with_reason(filled):  # noqa: F811
    app = set_up_run(filled)
    app.selectbox(key="base").set_value("3.13")
    app.selectbox(key="quantizer").set_value("nf4").run()
    assert next(b for b in app.button if b.label == "Quantize and evaluate").disabled
    assert any("b3g128" in c.value for c in app.caption)


# --- method cards ---------------------------------------------------------------------------


def test_method_is_chosen_from_its_card(filled):  # noqa: F811
    app = open_page("Plan", model=filled.model, method="sensiboost")
    app.button(key="method-cards").click().run()
    shown = " ".join(m.value for m in app.markdown)
    assert all(planner.title in shown for planner in PLANNERS.values())
    needs = " ".join(c.value for c in app.caption)
    assert "loss impact not measured yet" in needs
    app.button(key="choose-mxq").click().run()
    assert not app.exception
    assert app.selectbox(key="method").value == "mxq"
    assert planner_data(app)["methods"][0]["name"] == "mxq"


def test_card_of_a_method_of_another_program_is_its_meaning(filled, monkeypatch):  # noqa: F811
    class Foreign(type(PLANNERS["mxq"])):
        name, title, meaning = "foreign", "Foreign", "Does something else."
        summary = source = use = limits = ""

    monkeypatch.setitem(PLANNERS, "foreign", Foreign())
    app = open_page("Plan", model=filled.model, method="mxq")
    app.button(key="method-cards").click().run()
    assert any("Does something else" in m.value for m in app.markdown)


def test_another_profile_with_the_metrics_is_offered(filled):  # noqa: F811
    other = replace(filled.settings, samples=7)
    session = Session(ModelSource(filled.model), Store(filled.path), "cpu")
    session.profile(other, ["loss_impact", "weight_error"])
    app = open_page("Model", model=filled.model, method="loss-aware", budget="3.6")
    for field, value in asdict(filled.settings).items():
        app.session_state["profile_quantizer" if field == "quantizer" else field] = value
    app.session_state["settings_of"] = session.info.fingerprint
    go_to_page(app, "Plan")
    assert "needs" in first_line(app)
    app.button(key="other-profile").click().run()
    assert not app.exception
    assert planner_data(app)["methods"][0]["name"] == "loss-aware"
    assert app.session_state["samples"] == 7
