"""Shipped measurements: imported once, marked as shipped, reused, and presented in a tour."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from lsq_core import shipped, sweep
from lsq_core.errors import InputError
from lsq_core.evaluation.prediction import fit, load_measured_points
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.planning.methods import PLANNERS
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.metrics import default_metrics
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.results.story import boost_gain, largest_saving
from lsq_core.session import Session
from lsq_core.shipped import export, import_measurements
from lsq_core.stages.plan import build_problem
from lsq_core.store.shipped import SHIPPED
from lsq_core.store.store import Store
from lsq_core.sweep_progress import describe_counts
from tests.conftest import ROOT

#: Numbers with two or three digits before the point; bits and percentages on cards have fewer.
PERPLEXITY = re.compile(r"(?<![\d.,])\d{2,3}(?:\.\d)?(?![\d,.]*\d)")


@pytest.fixture(scope="session")
def measured(shared_folder) -> Path:
    """Return a folder with the demo model's ``measured.duckdb`` and its export in ``files``."""
    return shared_folder("shipped", _measure)


def _measure(folder: Path) -> None:
    text = folder / "calibration.txt"
    text.write_text("\n".join(f"Return the {i}-th item of the list." for i in range(300)), "utf8")
    store = Store(folder / "measured.duckdb")
    session = Session("demo", store, "cpu")
    settings = ProfileSettings("rtn", calibration=str(text), samples=16, block_tokens=64)
    session.profile(settings)
    session.profile(ProfileSettings("nf4", calibration=str(text), samples=16, block_tokens=64))
    for method in ("uniform", "sensiboost", "sensiboost-ablation"):
        plan = session.plan(PlanRequest(method, base="3.13"), settings)
        session.run(plan, "hqq", EvaluationRequest(str(text), max_tokens=600))
    export(store, folder / "files")
    text.unlink()  # not available where the measurements are used


@pytest.fixture
def store(measured, tmp_path) -> Store:
    """Return a new database with the exported measurements imported."""
    store = Store(tmp_path / "lsq.duckdb")
    assert import_measurements(store, measured / "files")
    return store


def test_import_marks_origin_and_keeps_figures(measured, store):
    own = Store(measured / "measured.duckdb").results()
    runs = store.results()
    assert (runs["origin"] == SHIPPED).all()
    same = ["run", "method", "perplexity", "perplexity_full", "kl", "measured_bytes", "machine"]
    pd.testing.assert_frame_equal(runs[same], own[same])
    assert not runs["saved_model"].any()
    for run in runs["evaluation"]:
        assert store.record(run)["evaluation"]["provenance"]["origin"] == SHIPPED
    fingerprint = runs["fingerprint"].iloc[0]
    profiles = store.profiles(fingerprint)
    assert profiles["origin"].eq(SHIPPED).all()
    assert {store.profile(id).provenance["origin"] for id in profiles["id"]} == {SHIPPED}


def test_import_happens_once(measured, store):
    assert not import_measurements(store, measured / "files")
    store.delete_runs(store.results()["run"].tolist()[:1])
    assert not import_measurements(store, measured / "files")
    assert len(store.results()) == 2


def test_newer_import_keeps_stars_notes_and_deletions(measured, store):
    first, second, third = store.results()["run"]
    store.star(first, True)
    store.annotate(second, "good")
    store.delete_runs([third])
    store.import_shipped(measured / "files", "another release")
    runs = store.results().set_index("run")
    assert list(runs.index) == [first, second]
    assert runs.loc[first, "starred"]
    assert runs.loc[second, "note"] == "good"


def test_import_never_replaces_own_rows(measured, tmp_path):
    own = Store(tmp_path / "own.duckdb")
    with own.transaction() as connection:
        connection.execute(
            "INSERT INTO runs (id, fingerprint, method, quantizer, origin, machine) "
            "SELECT ?, 'x', 'uniform', 'hqq', 'measured', 'mine'",
            [Store(measured / "measured.duckdb").results()["run"].iloc[0]],
        )
    import_measurements(own, measured / "files")
    machines = own.query("SELECT machine FROM runs WHERE origin = 'measured'")["machine"]
    assert machines.tolist() == ["mine"]


def test_export_leaves_out_deleted_runs_and_their_plans(store, tmp_path):
    store.delete_runs(store.results()["run"].tolist()[:1])
    counts = export(store, tmp_path / "again")
    [plans] = store.query("SELECT count(DISTINCT plan) AS n FROM runs WHERE deleted IS NULL")["n"]
    assert (counts["runs"], counts["plans"]) == (2, plans)
    assert plans == 2


def test_session_plans_from_shipped_profile_without_its_text(store):
    session = Session("demo", store, "cpu")
    assert session.default_settings.quantizer in ("rtn", "nf4")
    plan = session.plan("mxq", budget="3.2bpp")
    assert plan.profile in store.profiles(session.info.fingerprint)["id"].tolist()
    assert not session.is_loaded
    with pytest.raises(InputError, match="There is no corpus"):
        session.find_profile(ProfileSettings(calibration="/nowhere.txt"))


def test_measured_files_fit_the_schema(tmp_path):
    """This version can import the measurements in the repository."""
    store = Store(tmp_path / "lsq.duckdb")
    assert import_measurements(store)
    runs = store.results()
    models = set(runs["model"])
    assert models <= set(shipped.MODELS)
    assert (runs["origin"] == SHIPPED).all()
    assert runs["perplexity_full"].notna().all()
    assert runs.groupby("model").size().loc["smollm2"] >= 60
    assert largest_saving(runs[runs["model"] == "smollm2"]).bytes > 0.05
    gain = boost_gain(runs[runs["model"] == "smollm2"])
    assert gain.drop > 0.03 > gain.extra


def test_shipped_profile_has_every_metric_as_it_is_defined_now(tmp_path):
    store = Store(tmp_path / "lsq.duckdb")
    import_measurements(store)
    fingerprint = store.results()["fingerprint"][0]
    (profile,) = (store.profile(id) for id in store.profiles(fingerprint)["id"])
    assert {*default_metrics(), "loss_impact", "expected_kl"} <= set(profile.metrics)


def test_expected_kl_predicts_shipped_runs(tmp_path):
    """Predict runs of twelve methods on text not used for the profile, leaving each out in turn."""
    store = Store(tmp_path / "lsq.duckdb")
    import_measurements(store)
    fingerprint = store.results()["fingerprint"][0]
    profiles = [store.profile(id) for id in store.profiles(fingerprint)["id"]]
    (profile,) = [p for p in profiles if "expected_kl" in p.metrics]
    problem = build_problem(store.model(fingerprint), profile)
    points = load_measured_points(
        store, fingerprint, problem, quantizer="hqq", axis=1, metadata="8bit"
    )
    runs = store.results().set_index("evaluation").loc[list(points.evaluations)]
    expected = np.exp(points.features[:, 0])
    usable = (points.cost > 0.02) & (points.cost < np.log(3))
    assert usable.sum() > 20
    assert np.median(runs["kl"][usable] / expected[usable]) == pytest.approx(1, abs=0.15)
    own, predicted = fit(points).leave_one_out()
    kept = usable[own]
    error = np.abs(np.log(predicted.perplexity / points.perplexity[own]))[kept]
    assert np.median(error) < 0.04
    measured = points.perplexity[own]
    inside = (predicted.low <= measured) & (measured <= predicted.high)
    assert inside[kept].mean() >= 0.8
    assert inside.mean() >= 0.9, "the band holds what it says"


def test_method_cards_name_shipped_perplexities(tmp_path):
    """Every number on a card that could be a SmolLM2 perplexity is that of a shipped run."""
    store = Store(tmp_path / "lsq.duckdb")
    import_measurements(store)
    measured = store.results()["perplexity"]
    known = {f"{value:.{digits}f}" for value in measured for digits in (0, 1)}
    cards = [f"{planner.use} {planner.limits}" for planner in PLANNERS.values()]
    named = {n for card in cards if "SmolLM2" in card for n in PERPLEXITY.findall(card)}
    assert len(named) >= 10
    assert named <= known


@pytest.mark.slow
def test_measure_makes_what_is_exported(tmp_path, monkeypatch):
    """Profiles, quantizes and evaluates a few shipped runs; measuring again adds nothing."""
    (tmp_path / "text.txt").write_text(
        "\n".join(f"Return the {i}-th item of the list." for i in range(400)), "utf8"
    )
    monkeypatch.chdir(tmp_path)
    fewer = {"BASES": ("3.13",), "BOOSTS": ("sensiboost",), "BOOST_BASES": ("3.13",)}
    fewer |= {"KNAPSACKS": ("mxq", "loss-aware"), "VARIANTS": ("kurt-milp",)}
    fewer |= {"BUDGETS": ("3.2bpp",), "VARIANT_BUDGETS": ("3.2bpp",)}
    fewer |= {"MAX_TOKENS": 600, "OTHER_QUANTIZERS": ("rtn",)}
    for name, value in fewer.items():
        monkeypatch.setattr(shipped, name, value)
    store = Store(tmp_path / "measured.duckdb")
    for _ in range(2):
        shipped.measure(store, "text.txt", "text.txt", ["demo"])
    counts = export(store, tmp_path / "files")
    assert (counts["runs"], counts["profiles"]) == (5, 2)
    runs = store.results()
    assert set(runs["method"]) == {"uniform", "sensiboost", "mxq", "kurt-milp", "loss-aware"}
    assert set(runs["corpus"]) == {"text.txt"}


# --- boost gain and largest saving ------------------------------------------------------------


def run_row(evaluation: str, method: str, base: str | None, bits: float, perplexity: float) -> dict:
    request = f'{{"method": "{method}", "base": "{base}", "boost_stop": 2, "top_m": 0}}'
    return {
        "evaluation": evaluation, "method": method, "quantizer": "hqq", "base": base,
        "request": request, "bits_per_param": bits, "perplexity": perplexity,
        "increase": perplexity / 10 - 1, "created": pd.Timestamp("2026-01-01"),
    }  # fmt: skip


RUNS = pd.DataFrame(
    [
        run_row("u3", "uniform", "3.13", 3.13, 16.0),
        run_row("u4", "uniform", "4.13", 4.13, 12.0),
        run_row("s3", "sensiboost", "3.13", 3.20, 14.0),
        run_row("a3", "sensiboost-ablation", "3.13", 3.20, 15.8),
        run_row("k4", "kurtboost", "4.13", 4.20, 11.9),
        run_row("m", "mxq", None, 3.60, 11.5),
    ]
)


def test_boost_gain_is_largest_with_its_ablation():
    gain = boost_gain(RUNS)
    assert (gain.boosted["evaluation"], gain.uniform["evaluation"]) == ("s3", "u3")
    assert gain.ablation["evaluation"] == "a3"
    assert gain.drop == pytest.approx(0.125)
    assert gain.extra == pytest.approx(3.20 / 3.13 - 1)
    assert gain.ablation_drop == pytest.approx(0.0125)


def test_boost_gain_prefers_a_run_with_its_ablation():
    """KurtBoost gains more here, but has no ablation to rule out chance."""
    better = RUNS.assign(perplexity=[16.0, 12.0, 14.0, 15.8, 9.0, 11.5])
    assert boost_gain(better).boosted["evaluation"] == "s3"
    alone = boost_gain(better[better["evaluation"] != "a3"])
    assert (alone.boosted["evaluation"], alone.ablation) == ("k4", None)


def test_boost_gain_leaves_out_broken_models():
    broken = RUNS.assign(perplexity=[160, 12, 60, 158, 11.9, 11.5])
    broken["increase"] = broken["perplexity"] / 10 - 1
    assert boost_gain(broken).boosted["evaluation"] == "k4"


def test_boost_gain_prefers_an_ablation_only_among_gains():
    mixed = RUNS.assign(perplexity=[16.0, 12.0, 17.0, 15.8, 11.0, 11.5])
    assert boost_gain(mixed).boosted["evaluation"] == "k4"


def test_boost_gain_is_not_that_of_another_quantizer():
    other = RUNS.assign(quantizer=["hqq", "hqq", "gptq", "gptq", "hqq", "hqq"])
    assert boost_gain(other).boosted["evaluation"] == "k4"


def test_no_gain_no_story():
    worse = RUNS.assign(perplexity=[16, 12, 17, 15.8, 12.5, 20.0])
    assert boost_gain(worse) is None
    assert largest_saving(worse) is None
    assert boost_gain(RUNS[RUNS["method"] != "uniform"]) is None


def test_largest_saving_is_smaller_and_better():
    saving = largest_saving(RUNS)
    assert (saving.planned["evaluation"], saving.uniform["evaluation"]) == ("m", "u4")
    assert saving.bytes == pytest.approx(1 - 3.6 / 4.13)


def test_useless_uniform_is_no_saving():
    """Beating a uniform run that is far worse than full precision saves nothing."""
    assert largest_saving(RUNS, max_increase=0.1) is None


# --- the Model page ---------------------------------------------------------------------------


@pytest.fixture
def model_page(store, monkeypatch) -> AppTest:
    monkeypatch.setenv("LSQ_DB", str(store.path))
    return AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()


def test_tour_leads_to_pages_in_the_right_state(model_page, store):
    """Every step opens another page, which is drawn without an error."""
    steps = [b.key for b in model_page.button if (b.key or "").startswith("tour-")]
    assert len(steps) >= 2
    for key in steps:
        app = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
        app.button(key=key).click().run()
        assert not app.exception, key
        assert not app.error, key
        assert app.title[0].value != model_page.title[0].value, key


def test_model_page_shows_plan_and_ways(model_page):
    assert not model_page.exception
    assert {"explore", "llama"} <= {button.key for button in model_page.button}


def test_sweep_says_that_it_reuses_a_shipped_run(measured, store, tmp_path):
    text = tmp_path / "again.txt"
    text.write_text("\n".join(f"Return the {i}-th item of the list." for i in range(300)), "utf8")
    session = Session("demo", store, "cpu")
    evaluation = EvaluationRequest(str(text), max_tokens=600)
    (profile,) = [
        ProfileSettings(**json.loads(settings))
        for settings in store.profiles(session.info.fingerprint)["settings"]
        if '"rtn"' in settings
    ]
    items = sweep.items([PlanRequest("uniform", base="3.13")], ["hqq"], [evaluation])
    (row,) = sweep.sweep(session, items, replace(profile, calibration=str(text)))
    assert (row["state"], row["shipped"]) == ("found", True)
    assert describe_counts([row]) == "0 new, 1 reused (1 shipped), 0 failed"
    assert describe_counts([{"state": "found"}]) == "0 new, 1 reused, 0 failed"
    assert len(store.results()) == 3


def _switch_models() -> None:
    """Switch from a model profiled on a missing text to another model; the script of a page."""
    import streamlit as st

    from lsq_core.profiling.settings import ProfileSettings
    from lsq_core.ui import state

    state.init_settings("shipped", ProfileSettings("rtn", calibration="/nowhere/text.txt"))
    st.text(state.settings().calibration)
    state.init_settings("other", None)
    st.text(state.settings().calibration)


def test_another_model_does_not_keep_an_absent_calibration_text():
    app = AppTest.from_function(_switch_models).run()
    assert not app.exception
    assert [t.value for t in app.text] == ["/nowhere/text.txt", ProfileSettings().calibration]
