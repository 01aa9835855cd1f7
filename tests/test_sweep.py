"""Sweeps: each combination runs once, stored results are reused, failures don't stop it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pandas as pd
import pytest

from lsq_core import sweep, sweep_batches, sweep_state
from lsq_core.cli.program import main
from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.files import DamagedFileError
from lsq_core.model.source import ModelSource
from lsq_core.planning.methods import PLANNERS
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization import registry as quantize
from lsq_core.quantization.registry import BASELINES
from lsq_core.session import Session
from lsq_core.stages import evaluate
from lsq_core.stages import run as runs
from lsq_core.store.store import Store


@pytest.fixture
def settings(small_text) -> ProfileSettings:
    return ProfileSettings("rtn", calibration=str(small_text), samples=4, block_tokens=64)


@pytest.fixture
def session(random_model) -> Session:
    return Session(ModelSource(str(random_model("llama-gqa"))), Store(), "cpu")


def new_session(session: Session, **changes) -> Session:
    """Return a session on the same model and store with nothing loaded, as in a new process."""
    return Session(session.source, session.store, "cpu", **changes)


def requested(texts, methods=("uniform", "mxq"), budgets=("2.6bpp", "3.6bpp"), quantizers=("rtn",)):
    plan_requests = sweep.requests(PlanRequest(methods[0]), methods, (), budgets)
    evaluations = [EvaluationRequest(str(text), max_tokens=300) for text in texts]
    return sweep.items(plan_requests, quantizers, evaluations)


def rows_in(store: Store) -> pd.DataFrame:
    return store.query(
        "SELECT r.id AS run, r.method, e.corpus, e.perplexity FROM evaluations e "
        "JOIN runs r ON e.run = r.id ORDER BY e.created"
    )


def test_estimate_empty_items_returns_none():
    runs = pd.DataFrame(
        {
            "tokens_per_second": [100.0],
            "truncated": [False],
            "corpus": ["stdlib"],
            "tokens": [1000],
            "quantize_seconds": [1.0],
        }
    )
    assert sweep.estimate_seconds(runs, []) is None
    (item,) = requested(["stdlib"], ("uniform",), ("2.6bpp",))
    assert sweep.estimate_seconds(runs, [item]) == pytest.approx(1 + 2 * 300 / 100)


def count_calls(monkeypatch, name: str, owner: object = Session) -> list:
    """Record the calls of a ``Session`` method, or of a function of the module ``owner``."""
    calls, original = [], getattr(owner, name)

    def wrapper(model, *args, **kwargs):
        calls.append(args)
        return original(model, *args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def test_sweep_runs_each_combination_once(session, settings, small_text, other_text):
    items = requested([small_text, other_text])
    assert len(items) == 2 * 2 * 2
    rows = sweep.sweep(session, items, settings)
    assert [row["state"] for row in rows] == ["done"] * 8
    stored = rows_in(session.store)
    assert len(stored) == 8
    assert stored["run"].nunique() == 4, "one quantized model for both texts"
    for item, row in zip(items, rows, strict=True):
        (same,) = stored[
            (stored["run"] == row["run"]) & (stored["corpus"] == row["corpus"])
        ].itertuples()
        assert (same.method, same.perplexity) == (item.request.method, row["perplexity"])


def test_sweep_loads_model_and_quantizes_each_plan_once(
    session, settings, small_text, other_text, monkeypatch
):
    from lsq_core.model import loading as load

    loads, original = [], load.load_model
    monkeypatch.setattr(load, "load_model", lambda *args: loads.append(args) or original(*args))
    quantized = count_calls(monkeypatch, "_quantize", runs)
    sweep.sweep(session, requested([small_text, other_text]), settings)
    assert (len(loads), len(quantized)) == (1, 4)
    assert len(session.store.profiles(session.info.fingerprint)) == 1


def test_sweep_finds_results_without_loading_model(session, settings, small_text, monkeypatch):
    first = sweep.sweep(session, requested([small_text]), settings)
    again = new_session(session)
    quantized = count_calls(monkeypatch, "_quantize", runs)
    second = sweep.sweep(again, requested([small_text]), settings)
    assert [row["state"] for row in second] == ["found"] * 4
    assert "loaded" not in vars(again)
    assert not quantized
    same = ("run", "perplexity", "perplexity_full", "increase", "kl", "top1", "measured_bytes")
    for before, after in zip(first, second, strict=True):
        assert {k: after[k] for k in same} == pytest.approx({k: before[k] for k in same})
    assert len(rows_in(session.store)) == 4


def test_sweep_adds_corpus_to_existing_run(session, settings, small_text, other_text):
    sweep.sweep(session, requested([small_text]), settings)
    rows = sweep.sweep(new_session(session), requested([small_text, other_text]), settings)
    assert [row["state"] for row in rows] == ["found", "done"] * 4
    stored = rows_in(session.store)
    assert (len(stored), stored["run"].nunique()) == (8, 4)


@pytest.mark.parametrize("change", ["tokens", "protocol", "dtype", "quantizer", "versions", "text"])
def test_sweep_reruns_when_settings_change(session, settings, small_text, monkeypatch, change):
    """Each setting that results depend on is changed separately."""
    items = requested([small_text], methods=("uniform",), budgets=("3.6bpp",))
    sweep.sweep(session, items, settings)
    again, (item,) = new_session(session), items
    if change == "tokens":
        item = replace(item, evaluation=replace(item.evaluation, max_tokens=400))
    elif change == "protocol":
        item = replace(item, evaluation=replace(item.evaluation, protocol="blocks"))
    elif change == "dtype":
        again = new_session(session, dtype="bfloat16")
    elif change == "quantizer":
        item = replace(item, quantizer="hqq")
    elif change == "versions":
        for module in (evaluate, sweep_state):
            monkeypatch.setattr(module, "versions", lambda *packages: {"torch": "another"})
    else:
        small_text.write_text(small_text.read_text("utf8").replace("Return", "Give"), "utf8")
    (row,) = sweep.sweep(again, [item], settings)
    assert row["state"] == "done"


def test_sweep_continues_after_failed_item(session, settings, small_text, monkeypatch):
    original = Session.measure

    def failing_measure(self, made, requests):
        if any(single_item.plan.method == "uniform" for single_item in made):
            raise RuntimeError("a defect")
        return original(self, made, requests)

    monkeypatch.setattr(Session, "measure", failing_measure)
    rows = sweep.sweep(
        session, requested([small_text, "/no/such.txt"], budgets=("1bpp", "3.6bpp")), settings
    )
    reported = {(r["method"], r["budget"], r["corpus"]): r for r in rows}
    text = str(small_text)
    assert "out of reach" in reported["mxq", "1bpp", text]["reason"]
    assert "'/no/such.txt'" in reported["mxq", "3.6bpp", "/no/such.txt"]["reason"]
    assert "RuntimeError: a defect" in reported["uniform", "3.6bpp", text]["reason"]
    assert reported["mxq", "3.6bpp", text]["state"] == "done"
    assert len(rows_in(session.store)) == 1


def test_sweep_all_items_fail_raises(session, settings, small_text):
    with pytest.raises(LsqError, match=r"\b2 runs .*out of reach"):
        sweep.sweep(session, requested([small_text], budgets=("1bpp",)), settings)


def test_sweep_resumes_at_first_unfinished_item(
    session, settings, small_text, tmp_path, monkeypatch
):
    items = requested([small_text])
    monkeypatch.setattr(sweep_batches, "MAX_CONCURRENT_PLANS", 2)

    class CutOff(BaseException):
        """Stands in for a kill; no handler catches it."""

    def report(stage, done, total, message):
        if message.startswith("3 of 4") and "block 2 " in message:
            raise CutOff

    job_folder = tmp_path / "job"
    job_folder.mkdir()
    with pytest.raises(CutOff):
        sweep.sweep(
            new_session(session, report=report, checkpoint_folder=job_folder), items, settings
        )
    states = [
        row["state"] for row in json.loads((job_folder / sweep.ITEMS_FILE).read_text())["items"]
    ]
    assert states == ["done", "done", "waiting", "waiting"]
    quantized = count_calls(monkeypatch, "_quantize", runs)
    rows = sweep.sweep(new_session(session, checkpoint_folder=job_folder), items, settings)
    assert [row["state"] for row in rows] == ["found", "found", "done", "done"]
    assert len(quantized) == 2
    assert len(rows_in(session.store)) == 4


def test_sweep_identical_plans_run_once(session, settings, small_text):
    """Uniform at 2.60 and at 2.61 bpp gives the same plan."""
    rows = sweep.sweep(
        session, requested([small_text], ("uniform",), budgets=("2.60bpp", "2.61bpp")), settings
    )
    assert [row["state"] for row in rows] == ["done", "found"]
    assert rows[0]["run"] == rows[1]["run"]


def test_sweep_progress_increases(session, settings, small_text):
    reported = []

    def report(stage, done, total, message):
        if stage == "sweep":
            reported.append((done / total, message))

    sweep.sweep(new_session(session, report=report), requested([small_text]), settings)
    shares = [share for share, _ in reported]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert reported[-1][1].startswith("4 of 4: mxq 3.6bpp, rtn, on ")


def test_cli_sweep_row_per_item(random_model, small_text, capsys):
    command = ["sweep", "--model", str(random_model("llama-gqa")), "--method", "uniform"]
    command += ["--method", "mxq", "--budget", "3.6bpp", "--base", "4.51", "--corpus"]
    command += [str(small_text), "--max-tokens", "300", "--quantizer", "rtn"]
    command += ["--calibration", str(small_text), "--samples", "4", "--block-tokens", "64"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["counts"] == {"done": 3, "found": 0, "failed": 1}
    assert [(r["method"], r["base"], r["budget"]) for r in result["items"]] == [
        ("uniform", "4.51", None),
        ("uniform", None, "3.6bpp"),
        ("mxq", "4.51", None),
        ("mxq", None, "3.6bpp"),
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert re.search("0 new, 3 reused, 1 failed", shown)
    assert "takes a budget" in shown
    assert main(["sweep", "--model", "demo", "--method", "mxq"]) == 2


def test_parse_budgets():
    assert sweep.parse_budgets("2.25, 2.51;3.13  9MiB 2.25") == (
        "2.25bpp",
        "2.51bpp",
        "3.13bpp",
        "9MiB",
    )
    with pytest.raises(InputError, match="--budget"):
        sweep.requests(PlanRequest("mxq"), ["mxq"], (), ())


def test_estimate_from_previous_runs():
    runs = pd.DataFrame(
        {
            "corpus": ["a", "a", "b"],
            "tokens": [1000, 500, 4000],
            "truncated": [False, True, False],
            "tokens_per_second": [100.0, 100.0, 100.0],
            "quantize_seconds": [2.0, 2.0, 2.0],
        }
    )
    items = requested(["a", "b"], methods=("mxq",), budgets=("3bpp",))
    original = [replace(i, evaluation=replace(i.evaluation, max_tokens=None)) for i in items]
    assert sweep.estimate_seconds(runs, original) == pytest.approx(2 + 2 * 5000 / 100)
    assert sweep.estimate_seconds(runs, items) == pytest.approx(2 + 2 * 600 / 100)
    unknown = [replace(original[0], evaluation=EvaluationRequest("c"))]
    assert sweep.estimate_seconds(runs, unknown) is None
    assert sweep.estimate_seconds(runs.iloc[:0], original) is None


def single_item(text):
    return requested([text], methods=("uniform",), budgets=("3.6bpp",))


def test_sweep_completes_evaluation_without_kl(session, settings, small_text):
    """Evaluating only the saved model stores no KL, so a sweep evaluates the run again."""
    (row,) = sweep.sweep(session, single_item(small_text), settings)
    with session.store.transaction() as connection:
        connection.execute("UPDATE evaluations SET kl = NULL, top1 = NULL WHERE run IS NOT NULL")
    (again,) = sweep.sweep(new_session(session), single_item(small_text), settings)
    assert (again["state"], again["run"]) == ("done", row["run"])
    assert again["kl"] == pytest.approx(row["kl"])
    stored = session.store.query(
        "SELECT kl FROM evaluations WHERE run IS NOT NULL AND kl IS NOT NULL"
    )
    assert stored["kl"].tolist() == [again["kl"]]
    plans = session.store.query("SELECT count(*) AS n FROM plans")
    assert plans["n"][0] == 1, "an evaluation more of a run needs no other plan"


def test_save_run_restores_deleted_run(session, settings, small_text):
    (row,) = sweep.sweep(session, single_item(small_text), settings)
    store, (evaluation,) = session.store, session.store.results()["evaluation"]
    columns = {c: store.run(row["run"])[c] for c in ("plan", "fingerprint", "method", "quantizer")}
    store.delete_runs([row["run"]])
    assert store.results().empty
    store.save_run(row["run"], columns, [])
    assert store.results()["evaluation"].tolist() == [evaluation]


def test_sweep_failing_plan_tried_once(session, settings, small_text, other_text, monkeypatch):
    items = requested([small_text, other_text], methods=("sensi-knapsack",), budgets=("3.6bpp",))
    tried = []

    def failing_plan(session, request, *args, **options):
        tried.append(request)
        raise LsqError("The disk is full.")

    monkeypatch.setattr(sweep_state, "plan_model", failing_plan)
    with pytest.raises(LsqError, match=r"\b2 runs .*The disk"):
        sweep.sweep(session, items, settings)
    assert len(tried) == 1


def test_sweep_batch_failure_logs_traceback(session, settings, small_text, monkeypatch, capsys):
    """Each run succeeds when retried alone, so only the traceback reveals the defect."""
    original, sizes = Session.measure, []

    def a_defect_in_measuring(self, made, requests):
        sizes.append(len(made))
        if len(made) > 1:
            raise ZeroDivisionError("of many")
        return original(self, made, requests)

    monkeypatch.setattr(Session, "measure", a_defect_in_measuring)
    rows = sweep.sweep(session, requested([small_text], methods=("uniform",)), settings)
    assert [row["state"] for row in rows] == ["done", "done"]
    assert sizes == [2, 1, 1]
    stderr = capsys.readouterr().err
    assert "Traceback" in stderr
    assert "in a_defect_in_measuring" in stderr


def test_sweep_only_bad_input_raises_input_error(session, settings, small_text):
    invalid_items = requested(["/no/such/text"], methods=("uniform",))
    with pytest.raises(InputError, match=r"None of the 2 runs .*/no/such/text"):
        sweep.sweep(session, invalid_items, settings)
    mixed = sweep.sweep(
        session, [*invalid_items, *requested([small_text], budgets=("3.6bpp",))], settings
    )
    assert [row["state"] for row in mixed] == ["failed", "failed", "done", "done"]


@pytest.mark.parametrize("content", [b"", b'{"items": 3}', b'{"items": [{"state": "done"}]}'])
def test_rows_kept_damaged_file_raises(tmp_path, content):
    assert sweep.read_sweep_rows(tmp_path) == []
    (tmp_path / sweep.ITEMS_FILE).write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"items\.json is damaged"):
        sweep.read_sweep_rows(tmp_path)


def test_sweep_batch_matches_single_runs(session, settings, small_text, monkeypatch):
    """All plans are measured together, so full precision reads the text once."""
    items = requested([small_text], budgets=("2.6bpp", "3.2bpp", "3.6bpp"))
    monkeypatch.setattr(sweep_batches, "MAX_CONCURRENT_PLANS", 6)
    measure_calls = count_calls(monkeypatch, "measure")
    rows = sweep.sweep(session, items, settings)
    assert [len(made) for made, _ in measure_calls] == [6]
    for item, row in zip(items, rows, strict=True):
        alone = Session(session.source, Store(session.store.path.with_name("alone.duckdb")), "cpu")
        plan = alone.plan(item.request, settings)
        outcome = alone.run(plan, item.quantizer, item.evaluation)
        for name in ("perplexity", "perplexity_full", "kl", "top1", "measured_bytes"):
            assert row[name] == outcome[name]


def test_sweep_shared_matrices_quantized_once(session, settings, small_text, monkeypatch):
    from lsq_core.quantized import convert as apply

    made, original = [], apply.quantize_config
    monkeypatch.setattr(
        apply,
        "quantize_config",
        lambda *a, **k: made.append((k["name"], a[1])) or original(*a, **k),
    )
    items = requested([small_text], methods=("mxq",), budgets=("2.6bpp", "3.1bpp", "3.6bpp"))
    sweep.sweep(session, items, settings)
    plans = [session.plan(item.request, settings) for item in items]
    stops = [(matrix.name, config) for plan in plans for matrix, config in plan.choice.items()]
    assert len(made) == len(set(made)) == len(set(stops)) < len(stops)


def test_sweep_without_cache_runs_plans_singly(session, settings, small_text, monkeypatch):
    measure_calls = count_calls(monkeypatch, "measure")
    session.cache_bytes = 0
    rows = sweep.sweep(session, requested([small_text]), settings)
    assert [len(made) for made, _ in measure_calls] == [1] * 4
    assert [row["state"] for row in rows] == ["done"] * 4


def test_sweep_out_of_memory_retries_singly(session, settings, small_text, monkeypatch):
    original = Session.measure

    def limited_measure(self, made, requests):
        if len(made) > 1:
            raise LsqError("cuda ran out of memory")
        return original(self, made, requests)

    monkeypatch.setattr(Session, "measure", limited_measure)
    rows = sweep.sweep(session, requested([small_text]), settings)
    assert [row["state"] for row in rows] == ["done"] * 4


# --- baselines ------------------------------------------------------------------------------


def test_baselines_are_uniform_plans(small_text):
    like, texts = PlanRequest("mxq"), [EvaluationRequest(str(small_text))]
    found = sweep.baselines(like, ("3.13",), ("4.2bpp",), ("nf4", "rtn"), texts)
    assert [(i.request.method, i.request.base, i.request.budget, i.quantizer) for i in found] == [
        ("uniform", "3.13", None, "nf4"),
        ("uniform", "3.13", None, "rtn"),
        ("uniform", None, "4.2bpp", "nf4"),
        ("uniform", None, "4.2bpp", "rtn"),
    ]
    assert sweep.expand_methods(["all"]) == [name for name in PLANNERS if name != "refined"]
    assert sweep.expand_methods(["mxq"]) == ["mxq"]
    assert sweep.expand_baselines(["all"], ["hqq"]) == [q for q in BASELINES if q != "hqq"]
    with pytest.raises(InputError, match="'nf5'"):
        sweep.expand_baselines(["nf5"], [])


def test_sweep_incompatible_baseline_fails_with_reason(session, settings, small_text, monkeypatch):
    """It fails without a profile being measured; the other runs have all their figures."""
    monkeypatch.setattr(quantize, "find_spec", lambda name: name != "gptqmodel" or None)
    profiled = count_calls(monkeypatch, "profile")
    texts = [EvaluationRequest(str(small_text), max_tokens=300)]
    items = sweep.baselines(
        PlanRequest("uniform"), (), ("2.2bpp", "4.2bpp"), ("rtn", "nf4", "gptq"), texts
    )
    rows = sweep.sweep(session, items, settings)
    reported = {(row["quantizer"], row["budget"]): row for row in rows}
    failed = {key: row["reason"] for key, row in reported.items() if row["state"] == "failed"}
    assert set(failed) == {("nf4", "2.2bpp"), ("gptq", "2.2bpp"), ("gptq", "4.2bpp")}
    assert "2.2bpp is below" in failed["nf4", "2.2bpp"]
    assert failed["gptq", "4.2bpp"].startswith("GPTQ needs gptqmodel")
    assert not profiled
    for row in rows:
        if row["state"] == "done":
            assert row["measured_bytes"] == row["planned_bytes"]
            assert row["quantize_seconds"] > 0
            assert row["steps"] == 0
    assert (
        reported["nf4", "4.2bpp"]["measured_bytes"] != reported["rtn", "4.2bpp"]["measured_bytes"]
    )
    again = sweep.sweep(new_session(session), items, settings)
    assert [row["state"] for row in again] == [
        "found" if row["state"] == "done" else "failed" for row in rows
    ]


def test_cli_sweep_all_methods_and_baselines(random_model, small_text, capsys, monkeypatch):
    requested = []
    monkeypatch.setattr(sweep, "sweep", lambda session, items, *_: requested.extend(items) or [])
    command = ["sweep", "--model", str(random_model("llama-gqa")), "--method", "all"]
    command += ["--baseline", "all", "--corpus", str(small_text), "--json"]
    for budget in sweep.EVERYTHING_BUDGETS:
        command += ["--budget", budget]
    assert main(command) == 0
    methods = sweep.expand_methods(["all"])
    assert len(requested) == 3 * (len(methods) + len(BASELINES) - 1)
    pairs = {(item.request.method, item.quantizer) for item in requested}
    assert pairs == {(m, "hqq") for m in methods} | {("uniform", q) for q in BASELINES}
