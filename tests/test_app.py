"""The app's pages, run without a browser: rendering, controls and error messages."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb
import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from lsq_core import disk, jobs
from lsq_core.bits import LADDER
from lsq_core.cli.parser import build_parser
from lsq_core.distributed import cluster
from lsq_core.evaluation.bootstrap import bootstrap_difference
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.planning.methods import PLANNERS
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import BASELINES, unavailable_reason
from lsq_core.session import Session
from lsq_core.store.store import Store
from lsq_core.ui import words
from lsq_core.ui.planner import CommittedBudget
from tests.conftest import ROOT, save_random_model
from tests.helpers import wait_for

PAGES = {
    "Model": None,
    "Explore": "pages/1_Explore.py",
    "Plan": "pages/2_Plan.py",
    "Run": "pages/3_Run.py",
    "Compare": "pages/4_Compare.py",
    "Storage": "pages/6_Storage.py",
}


@dataclass(frozen=True)
class Filled:
    """A database with a model, a profile and three runs, two of which share a measurement."""

    path: Path
    model: str
    settings: ProfileSettings


@pytest.fixture(scope="session")
def filled_once(shared_folder) -> Filled:
    """One database for all modules: pytest reruns an imported fixture in each importing module."""
    folder = shared_folder("app", _populate)
    return Filled(folder / "lsq.duckdb", str(folder / "model"), _settings(folder))


def _settings(folder: Path) -> ProfileSettings:
    text = str(folder / "text.txt")
    return ProfileSettings("rtn", calibration=text, samples=8, block_tokens=64)


def _populate(folder: Path) -> None:
    text = folder / "text.txt"
    text.write_text("\n".join(f"Return the {i}-th item of the list." for i in range(300)), "utf8")
    model = save_random_model(folder / "model", "llama-gqa", num_hidden_layers=4)
    settings = _settings(folder)
    session = Session(_source(str(model)), Store(folder / "lsq.duckdb"), "cpu")
    for base, tokens in (("3.51", 600), ("4.25", 600), ("3.51", 300)):
        plan = session.plan(PlanRequest("sensiboost", base=base), settings)
        session.run(plan, "rtn", EvaluationRequest(str(text), max_tokens=tokens))


def _source(model: str):
    from lsq_core.model.source import ModelSource

    return ModelSource(model)


@pytest.fixture
def filled(filled_once: Filled, tmp_path: Path) -> Filled:
    """A copy of :func:`filled_once` at the database path that this test's pages use."""
    path = tmp_path / "lsq.duckdb"
    path.write_bytes(filled_once.path.read_bytes())
    return Filled(path, filled_once.model, filled_once.settings)


def open_page(title: str, **address: str) -> AppTest:
    app = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    app.query_params.update(address)
    app.run()
    return go_to_page(app, title)


def go_to_page(app: AppTest, title: str) -> AppTest:
    if PAGES[title]:
        app.switch_page(PAGES[title])
    app.run()
    assert not app.exception
    return app


def first_line(app: AppTest) -> str:
    return app.title[0].value


def chart(app: AppTest) -> dict:
    return json.loads(app.get("plotly_chart")[0].proto.spec)


def _array(values: object) -> list:
    import base64

    import numpy as np

    if isinstance(values, dict):
        flat = np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"])
        shape = [int(n) for n in str(values.get("shape", flat.size)).split(",")]
        return flat.reshape(shape).tolist()
    return values


# --- headlines ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "headline"),
    [
        ("Model", "Where should the bits go?"),
        ("Explore", "demo has not been profiled"),
        ("Plan", "3.51 bits: 2.14 MiB"),
        ("Run", "No runs yet"),
        ("Compare", "No runs to compare"),
        ("Storage", "on disk."),
    ],
)
def test_page_headline_empty_database(title, headline):
    app = open_page(title)
    assert headline in first_line(app)
    assert not app.error


@pytest.mark.parametrize(
    ("title", "headline"),
    [
        ("Model", "Where should the bits go?"),
        ("Explore", "Most sensitive: layers"),
        ("Plan", "bits:"),
        ("Run", "Nothing is running."),
        ("Compare", "Best within"),
    ],
)
def test_page_headline_populated_database(filled, title, headline):
    app = open_page(title, model=filled.model)
    assert headline in first_line(app)
    assert not app.error


def test_model_page_says_what_the_model_is():
    app = open_page("Model")
    assert "5.6 M parameters, 10.8 MiB" in app.subheader[0].value
    assert app.metric[0].label == "Layers"


# --- the model ------------------------------------------------------------------------------


def test_model_page_unknown_path_shows_one_error():
    app = open_page("Model", model="/nowhere/at/all")
    assert [e.value.count(". ") for e in app.error] == [0]
    assert "/nowhere/at/all" in app.error[0].value
    assert app.text_input(key="name"), "another model can still be chosen"


@pytest.mark.parametrize("title", ["Explore", "Plan", "Run"])
def test_pages_unknown_path_show_one_error(title):
    assert len(open_page(title, model="/nowhere/at/all").error) == 1


def test_model_page_hub_id_offline_shows_one_error():
    (error,) = open_page("Model", model="org/not-cached").error
    assert "org/not-cached" in error.value
    assert "network" in error.value


def test_model_page_typed_model_selected_and_in_url(filled):
    app = open_page("Model")
    app.text_input(key="name").set_value(filled.model)
    _click_button(app, "Open")
    assert app.query_params["model"] in (filled.model, [filled.model])
    assert app.metric[0].value == "4", "layers"
    assert "bits" in first_line(go_to_page(app, "Plan"))
    assert app.session_state["model"] == filled.model


def test_trust_remote_code_default_off_and_per_model(filled):
    from lsq_core.ui import state

    app = open_page("Model")
    assert not app.checkbox(key="trust").value
    assert not app.checkbox(key="pickle").value
    app.text_input(key="name").set_value(filled.model)
    app.checkbox(key="trust").check()
    _click_button(app, "Open")
    assert app.session_state["allowed"] == {filled.model: (True, False)}
    assert not app.checkbox(key="trust").value, "off again for the next one"
    assert state.parse_source("demo").trust_remote_code is False


def test_source_of_parses_revision():
    from lsq_core.ui import state

    source = state.parse_source("org/name@v2")
    assert (source.name, source.revision) == ("org/name", "v2")
    assert state.model_text(source) == "org/name@v2"


def _click_button(app: AppTest, label: str) -> None:
    next(b for b in app.button if b.label == label).click().run()
    assert not app.exception


def test_prune_deletes_job_after_confirmation(filled):
    home = jobs.start(disk.jobs_folder(Store(filled.path)), ["results"]).folder
    wait_for(lambda: not jobs.read(home).active)
    app = open_page("Storage")
    app.multiselect(key="prune").set_value([home.name]).run()
    assert home.exists()
    app.button(key="prune-sure").click().run()
    assert not app.exception
    assert not home.exists()
    assert "Deleted 1" in app.success[0].value


# --- profiling ------------------------------------------------------------------------------


def test_explore_profile_job_runs_and_result_shown(filled):
    app = open_page("Explore", model=filled.model)
    app.selectbox(key="axis").set_value(0).run()
    assert "has not been profiled" in first_line(app)
    app.button(key="profile").click().run()
    folder = disk.jobs_folder(Store(filled.path))
    (job,) = jobs.list_jobs(folder)
    assert job.arguments[0] == "profile"
    wait_for(lambda: not jobs.read(job.folder).active)
    assert jobs.read(job.folder).state == "done", jobs.read(job.folder).log_tail()
    assert first_line(app.run()).startswith("Most sensitive: layers")


def test_explore_metadata_comparison_table(filled):
    app = open_page("Explore", model=filled.model)
    assert any("fp16" in m.value for m in app.markdown), "says how to get the table"
    store = Store(filled.path)
    session = Session(_source(filled.model), store, "cpu")
    pair = [session.profile(replace(filled.settings, metadata=kind)) for kind in ("8bit", "fp16")]
    eight, sixteen = (p.values.query("metric == 'weight_error'") for p in pair)
    error_norms = [
        (frame[frame["config"] == "b4g64"]["value"] ** 2).sum() ** 0.5 for frame in (eight, sixteen)
    ]
    table = next(d.value for d in app.run().dataframe if "added %" in d.value.columns)
    assert table["added %"][7] == pytest.approx(100 * (error_norms[0] / error_norms[1] - 1))
    assert len(table) == len(LADDER)


def test_explore_failed_job_message_shown(filled):
    app = open_page("Explore", model=filled.model)
    app.number_input(key="samples").set_value(1).run()
    app.number_input(key="block_tokens").set_value(4096).run()
    app.button(key="profile").click().run()
    (job,) = jobs.list_jobs(disk.jobs_folder(Store(filled.path)))
    wait_for(lambda: not jobs.read(job.folder).active)
    assert jobs.read(job.folder).state == "failed"
    assert words.escape(jobs.read(job.folder).message) in app.run().error[0].value


def test_explore_unknown_calibration_shows_one_error():
    app = open_page("Model")
    app.session_state["calibration"] = "/no/such/text"
    (error,) = go_to_page(app, "Explore").error
    assert "/no/such/text" in error.value


def test_explore_chart_matches_profile(filled):
    app = open_page("Explore", model=filled.model)
    store = Store(filled.path)
    value = store.query(
        "SELECT value FROM scores WHERE metric = 'kurtosis' AND layer = 2 AND type LIKE '%k_proj'"
    )["value"][0]
    lines = json.loads(app.get("plotly_chart")[1].proto.spec)["data"]
    k = next(t for t in lines if t.get("name") == "k_proj")
    assert _array(k["y"])[2] == pytest.approx(value, rel=1e-12)


# --- running --------------------------------------------------------------------------------


def test_run_page_runs_job_and_shows_result(filled):
    app = open_page("Model", model=filled.model, method="uniform", ask="base", base="4.51")
    app.session_state["corpus"] = filled.settings.calibration
    go_to_page(app, "Run")
    app.number_input(key="max_tokens").set_value(400)
    app.selectbox(key="quantizer").set_value("rtn")
    app.text_input(key="save").set_value("kept-1").run()
    _click_button(app, "Quantize and evaluate")
    (job,) = jobs.list_jobs(disk.jobs_folder(Store(filled.path)))
    wait_for(lambda: not jobs.read(job.folder).active)
    done = jobs.read(job.folder)
    assert done.state == "done", done.log_tail()
    app.run()
    row = Store(filled.path).results().iloc[0]
    assert first_line(app).startswith(f"Perplexity {row['perplexity']:.2f}")
    assert app.metric[0].value == f"{row['perplexity']:.4f}"
    assert row["bits_per_param"] == pytest.approx(LADDER[8].nominal_bits)
    assert Path(row["saved_to"]) == disk.models_folder(Store(filled.path)) / "kept-1"
    # a second tab, or this one reloaded
    assert first_line(open_page("Run", model=filled.model)) == first_line(app)


def test_run_page_saves_in_another_format(filled):
    app = open_page("Model", model=filled.model, method="uniform", ask="base", base="4.51")
    app.session_state["corpus"] = filled.settings.calibration
    go_to_page(app, "Run")
    app.number_input(key="max_tokens").set_value(400)
    app.selectbox(key="quantizer").set_value("rtn").run()
    assert not any(box.key == "save_format" for box in app.selectbox)
    app.text_input(key="save").set_value("mine").run()
    app.selectbox(key="save_format").set_value("gguf").run()
    assert not any(box.key == "save_crossing" for box in app.selectbox)
    assert any("28 × Q4" in caption.value for caption in app.caption)
    app.selectbox(key="save_format").set_value("mlx").run()
    assert app.selectbox(key="save_crossing").value == "refuse"
    _click_button(app, "Quantize and evaluate")
    (job,) = jobs.list_jobs(disk.jobs_folder(Store(filled.path)))
    wait_for(lambda: not jobs.read(job.folder).active)
    done = jobs.read(job.folder)
    assert done.state == "done", done.log_tail()
    app.run()
    rows = Store(filled.path).results().iloc[:2].set_index("format")
    exported = rows.loc["mlx"]
    assert exported["exported_from"] == rows.loc["lsq", "run"]
    assert Path(exported["saved_to"]) == disk.models_folder(Store(filled.path)) / "mine"
    assert any(exported["run"] in caption.value for caption in app.caption)


@pytest.mark.parametrize("name", ["../away", "a/b", "with space", ".hidden", "/abs"])
def test_run_page_invalid_save_name_shows_error(filled, name):
    app = open_page("Run", model=filled.model, method="uniform")
    app.text_input(key="save").set_value(name).run()
    _click_button(app, "Quantize and evaluate")
    assert "not a valid name" in app.error[0].value
    assert not jobs.list_jobs(disk.jobs_folder(Store(filled.path)))


def test_run_page_incompatible_quantizer_disabled_with_reason(filled):
    app = open_page("Model", model=filled.model, method="uniform", ask="base", base="3.13")
    go_to_page(app, "Run")
    button = next(b for b in app.button if b.label == "Quantize and evaluate")
    assert not button.disabled
    app.selectbox(key="quantizer").set_value("nf4").run()
    button = next(b for b in app.button if b.label == "Quantize and evaluate")
    assert button.disabled
    assert any("b3g128" in c.value for c in app.caption)
    assert not jobs.list_jobs(disk.jobs_folder(Store(filled.path)))


@pytest.mark.skipif(not unavailable_reason("gptq"), reason="gptqmodel is installed here")
def test_run_page_unavailable_quantizer_disabled_with_reason(filled):
    app = open_page("Model", model=filled.model, method="uniform", ask="base", base="4.25")
    go_to_page(app, "Run")
    choice = app.selectbox(key="quantizer")
    assert [o for o in choice.options if o.startswith("gptq (")], "marked"
    choice.set_value("gptq").run()
    assert next(b for b in app.button if b.label == "Quantize and evaluate").disabled
    assert any(unavailable_reason("gptq") in c.value for c in app.caption)


def test_run_page_full_sweep_command(filled, monkeypatch):
    started = []
    monkeypatch.setattr(jobs, "start", lambda folder, words: started.append(words))
    app = open_page("Run", model=filled.model)
    app.multiselect(key="sweep_corpora").set_value(["stdlib"])
    app.number_input(key="sweep_tokens").set_value(300).run()
    _click_button(app, "Everything at 2.2, 3.2 and 4.2 bits")
    (command,) = started
    parsed = build_parser().parse_args(command)
    assert parsed.verb == "sweep"
    assert parsed.method == list(PLANNERS)
    assert parsed.budget == ["2.2bpp", "3.2bpp", "4.2bpp"]
    assert (parsed.quantizer, parsed.base) == (["hqq"], [])
    assert parsed.baseline == [q for q in BASELINES if q != "hqq"]
    assert (parsed.corpus, parsed.max_tokens) == (["stdlib"], 300)


def test_sweep_infeasible_budgets_disable_start(filled):
    app = open_page("Run", model=filled.model)
    app.multiselect(key="sweep_methods").set_value(["uniform"])
    app.multiselect(key="sweep_quantizers").set_value(["rtn"])
    app.text_input(key="sweep_budgets").set_value("1.5, 20").run()
    assert not app.exception
    start = next(b for b in app.button if b.label == "Start the sweep")
    assert start.disabled
    assert any("2 are not possible" in c.value for c in app.caption)
    app.text_input(key="sweep_budgets").set_value("1.5, 2.25").run()
    assert not next(b for b in app.button if b.label == "Start the sweep").disabled
    assert any("1 is not possible" in c.value for c in app.caption)


def test_sweep_on_ray_has_its_options_or_the_reason(filled, monkeypatch):
    started = []
    monkeypatch.setattr(jobs, "start", lambda folder, words: started.append(words))
    monkeypatch.setattr(cluster, "find_spec", lambda name: object())
    app = open_page("Run", model=filled.model)
    app.selectbox(key="sweep_place").set_value("local").run()
    _click_button(app, "Start the sweep")
    app.selectbox(key="sweep_place").set_value("cluster").run()
    assert next(b for b in app.button if b.label == "Start the sweep").disabled, "no address"
    app.text_input(key="sweep_address").set_value("node-a:6379").run()
    app.number_input(key="sweep_cores").set_value(2).run()
    _click_button(app, "Start the sweep")
    parsed = [build_parser().parse_args(command) for command in started]
    assert [(one.ray, one.actor_cores) for one in parsed] == [("local", None), ("node-a:6379", 2)]
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    app.run()
    assert next(b for b in app.button if b.label == "Start the sweep").disabled
    assert any(cluster.unavailable_reason() in c.value for c in app.caption)


# --- comparing ------------------------------------------------------------------------------


def test_compare_chart_has_one_measurement_only(filled):
    app = open_page("Compare", model=filled.model)
    measured = next(b for b in app.selectbox if b.label == "Measurement")
    assert len(measured.options) == 2
    sizes = []
    for option in measured.options:
        next(b for b in app.selectbox if b.label == "Measurement").select(option).run()
        points = [t for t in chart(app)["data"] if t["mode"] == "markers" and "customdata" in t]
        sizes.append(sum(len(_array(t["x"])) for t in points))
    assert sorted(sizes) == [1, 2]


def test_compare_two_runs_paired_difference(filled):
    app = open_page("Compare", model=filled.model)
    measured = next(b for b in app.selectbox if b.label == "Measurement")
    measured.select(next(o for o in measured.options if "2 runs" in o)).run()
    store = Store(filled.path)
    a, b = app.session_state["run_a"], app.session_state["run_b"]
    nll, counts = store.windows(a)
    found = bootstrap_difference(nll, store.windows(b)[0], counts)
    summary = next(m.value for m in app.markdown if m.value.startswith("Perplexity"))
    assert f"{100 * found.relative:+.2f}".replace("-", "−") in summary
    assert math.isnan(found.low)  # so short a text has too few windows for an interval
    assert "too few windows" in summary
    assert not re.search(VERDICT, summary)  # without an interval there is no verdict


VERDICT = r"\*\*(tie|lower|higher)\*\*"


def _open_pair(filled: Filled) -> AppTest:
    app = open_page("Compare", model=filled.model)
    measured = next(b for b in app.selectbox if b.label == "Measurement")
    return measured.select(next(o for o in measured.options if "2 runs" in o)).run()


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, "tie"), (-20.0, "lower"), (20.0, "higher")])
def test_compare_verdict_matches_paired_windows(filled, shift, verdict):
    """Uses enough windows for an interval; nats per window differ by ``shift`` plus noise."""
    app = _open_pair(filled)
    a, b = app.session_state["run_a"], app.session_state["run_b"]
    counts = np.full(60, 128)
    theirs = np.full(60, 256.0)
    mine = theirs + shift + 10 * np.random.default_rng(0).standard_normal(60)
    with duckdb.connect(str(filled.path)) as database:
        for id, nll in ((a, mine), (b, theirs)):
            values = [nll.tolist(), counts.tolist(), id]
            database.execute("UPDATE evaluations SET nll = ?, counts = ? WHERE id = ?", values)
    found = bootstrap_difference(mine, theirs, counts)
    assert found.low < found.high
    app = _open_pair(filled)
    assert (app.session_state["run_a"], app.session_state["run_b"]) == (a, b)
    summary = next(m.value for m in app.markdown if m.value.startswith("Perplexity"))
    assert re.findall(VERDICT, summary) == [verdict]


# --- the database ---------------------------------------------------------------------------


def test_app_locked_database_shows_one_error(filled, monkeypatch):
    monkeypatch.setattr("lsq_core.store.connection.LOCK_TIMEOUT_S", 0.2)
    lock_script = (
        f"import duckdb; c = duckdb.connect({str(filled.path)!r}); print('held', flush=True); "
        "input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", lock_script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout.readline().strip() == "held"
        app = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
        holder.communicate("\n")
    assert not app.exception
    assert "in use" in app.error[0].value


def test_plan_headline_uses_committed_budget(monkeypatch):
    """The headline shows the committed budget in the same run of the page, not in the next."""
    app = open_page("Plan", model="demo", method="uniform", budget="3.25")
    assert "3.25 bits" in first_line(app)
    monkeypatch.setattr(
        "lsq_core.ui.plan.live.read_committed_budget", lambda: CommittedBudget(4.26, None)
    )
    assert "4.25 bits" in first_line(app.run())
