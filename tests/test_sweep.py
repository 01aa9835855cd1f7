"""Sweeps: every combination once, what is there is found, what fails stops nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pandas as pd
import pytest

from lsq_core import sweep
from lsq_core.cli import main
from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.files import Damaged
from lsq_core.model.source import ModelSource
from lsq_core.planning.methods import PLANNERS
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization import registry as quantize
from lsq_core.quantization.registry import BASELINES
from lsq_core.session import Session
from lsq_core.stages import evaluate
from lsq_core.store.store import Store


@pytest.fixture
def settings(small_text) -> ProfileSettings:
    return ProfileSettings("rtn", calibration=str(small_text), samples=4, block_tokens=64)


@pytest.fixture
def other_text(tmp_path) -> str:
    path = tmp_path / "other.txt"
    path.write_text("\n".join(f"{i} is followed by {i + 1}." for i in range(300)), "utf8")
    return str(path)


@pytest.fixture
def bench(random_model) -> Session:
    return Session(ModelSource(str(random_model("llama-gqa"))), Store(), "cpu")


def fresh(bench: Session, **changes) -> Session:
    """The same model in another process, so to speak: nothing of it is loaded."""
    return Session(bench.source, bench.store, "cpu", **changes)


def asked(texts, methods=("uniform", "mxq"), budgets=("2.6bpp", "3.6bpp"), quantizers=("rtn",)):
    wanted = sweep.requests(PlanRequest(methods[0]), methods, (), budgets)
    evaluations = [EvaluationRequest(str(text), max_tokens=300) for text in texts]
    return sweep.items(wanted, quantizers, evaluations)


def rows_in(store: Store) -> pd.DataFrame:
    return store.query(
        "SELECT r.id AS run, r.method, e.corpus, e.perplexity FROM evaluations e "
        "JOIN runs r ON e.run = r.id ORDER BY e.created"
    )


def test_nothing_to_estimate_takes_no_time_to_say():
    runs = pd.DataFrame(
        {
            "tokens_per_second": [100.0],
            "truncated": [False],
            "corpus": ["stdlib"],
            "tokens": [1000],
            "quantize_seconds": [1.0],
        }
    )
    assert sweep.estimate(runs, []) is None
    (item,) = asked(["stdlib"], ("uniform",), ("2.6bpp",))
    assert sweep.estimate(runs, [item]) == pytest.approx(1 + 2 * 300 / 100)


def count_calls(monkeypatch, name: str) -> list:
    """Notes every call of a Session method."""
    calls, whole = [], getattr(Session, name)

    def noted(self, *args, **kwargs):
        calls.append(args)
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Session, name, noted)
    return calls


def test_every_combination_is_run_once_and_kept(bench, settings, small_text, other_text):
    items = asked([small_text, other_text])
    assert len(items) == 2 * 2 * 2
    rows = sweep.sweep(bench, items, settings)
    assert [row["state"] for row in rows] == ["done"] * 8
    kept = rows_in(bench.store)
    assert len(kept) == 8
    assert kept["run"].nunique() == 4, "one quantized model for both texts"
    for item, row in zip(items, rows, strict=True):
        (same,) = kept[(kept["run"] == row["run"]) & (kept["corpus"] == row["corpus"])].itertuples()
        assert (same.method, same.perplexity) == (item.request.method, row["perplexity"])


def test_model_and_profile_are_read_once_and_each_plan_quantized_once(
    bench, settings, small_text, other_text, monkeypatch
):
    from lsq_core.model import loading as load

    loads, whole = [], load.load_model
    monkeypatch.setattr(load, "load_model", lambda *args: loads.append(args) or whole(*args))
    quantized = count_calls(monkeypatch, "_quantize")
    sweep.sweep(bench, asked([small_text, other_text]), settings)
    assert (len(loads), len(quantized)) == (1, 4)
    assert len(bench.store.profiles(bench.info.fingerprint)) == 1


def test_what_is_there_is_found_without_loading_the_model(bench, settings, small_text, monkeypatch):
    first = sweep.sweep(bench, asked([small_text]), settings)
    again = fresh(bench)
    quantized = count_calls(monkeypatch, "_quantize")
    second = sweep.sweep(again, asked([small_text]), settings)
    assert [row["state"] for row in second] == ["found"] * 4
    assert "loaded" not in vars(again)
    assert not quantized
    same = ("run", "perplexity", "perplexity_full", "increase", "kl", "top1", "measured_bytes")
    for before, after in zip(first, second, strict=True):
        assert {k: after[k] for k in same} == pytest.approx({k: before[k] for k in same})
    assert len(rows_in(bench.store)) == 4


def test_another_text_is_added_to_the_run_that_is_there(bench, settings, small_text, other_text):
    sweep.sweep(bench, asked([small_text]), settings)
    rows = sweep.sweep(fresh(bench), asked([small_text, other_text]), settings)
    assert [row["state"] for row in rows] == ["found", "done"] * 4
    kept = rows_in(bench.store)
    assert (len(kept), kept["run"].nunique()) == (8, 4)


@pytest.mark.parametrize("change", ["tokens", "protocol", "dtype", "quantizer", "versions", "text"])
def test_a_result_of_other_circumstances_is_not_taken(
    bench, settings, small_text, monkeypatch, change
):
    """Each thing that a figure depends on, changed alone."""
    items = asked([small_text], methods=("uniform",), budgets=("3.6bpp",))
    sweep.sweep(bench, items, settings)
    again, (item,) = fresh(bench), items
    if change == "tokens":
        item = replace(item, evaluation=replace(item.evaluation, max_tokens=400))
    elif change == "protocol":
        item = replace(item, evaluation=replace(item.evaluation, protocol="blocks"))
    elif change == "dtype":
        again = fresh(bench, dtype="bfloat16")
    elif change == "quantizer":
        item = replace(item, quantizer="hqq")
    elif change == "versions":
        for module in (evaluate, sweep):
            monkeypatch.setattr(module, "versions", lambda *packages: {"torch": "another"})
    else:
        small_text.write_text(small_text.read_text("utf8").replace("Return", "Give"), "utf8")
    (row,) = sweep.sweep(again, [item], settings)
    assert row["state"] == "done"


def test_an_item_that_fails_stops_no_other(bench, settings, small_text, monkeypatch):
    whole = Session.measure

    def breaks(self, made, requests):
        if any(one.plan.method == "uniform" for one in made):
            raise RuntimeError("a defect")
        return whole(self, made, requests)

    monkeypatch.setattr(Session, "measure", breaks)
    rows = sweep.sweep(
        bench, asked([small_text, "/no/such.txt"], budgets=("1bpp", "3.6bpp")), settings
    )
    told = {(r["method"], r["budget"], r["corpus"]): r for r in rows}
    text = str(small_text)
    assert "out of reach" in told["mxq", "1bpp", text]["reason"]
    assert "'/no/such.txt'" in told["mxq", "3.6bpp", "/no/such.txt"]["reason"]
    assert "RuntimeError: a defect" in told["uniform", "3.6bpp", text]["reason"]
    assert told["mxq", "3.6bpp", text]["state"] == "done"
    assert len(rows_in(bench.store)) == 1


def test_when_all_fail_the_sweep_does(bench, settings, small_text):
    with pytest.raises(LsqError, match=r"\b2 runs .*out of reach"):
        sweep.sweep(bench, asked([small_text], budgets=("1bpp",)), settings)


def test_a_sweep_cut_off_goes_on_at_its_first_unfinished_item(
    bench, settings, small_text, tmp_path, monkeypatch
):
    items = asked([small_text])
    monkeypatch.setattr(sweep, "PLANS_AT_ONCE", 2)

    class CutOff(BaseException):
        """What kills a process is no exception that anybody handles."""

    def report(stage, done, total, message):
        if message.startswith("3 of 4") and "window 2 " in message:
            raise CutOff

    keep = tmp_path / "job"
    keep.mkdir()
    with pytest.raises(CutOff):
        sweep.sweep(fresh(bench, report=report, folder_to_keep=keep), items, settings)
    states = [row["state"] for row in json.loads((keep / sweep.ITEMS).read_text())["items"]]
    assert states == ["done", "done", "waiting", "waiting"]
    quantized = count_calls(monkeypatch, "_quantize")
    rows = sweep.sweep(fresh(bench, folder_to_keep=keep), items, settings)
    assert [row["state"] for row in rows] == ["found", "found", "done", "done"]
    assert len(quantized) == 2
    assert len(rows_in(bench.store)) == 4


def test_the_same_plan_asked_for_twice_is_made_once(bench, settings, small_text):
    """Uniform at 2.60 and at 2.61 bits is the same plan."""
    rows = sweep.sweep(
        bench, asked([small_text], ("uniform",), budgets=("2.60bpp", "2.61bpp")), settings
    )
    assert [row["state"] for row in rows] == ["done", "found"]
    assert rows[0]["run"] == rows[1]["run"]


def test_progress_grows_over_all_items(bench, settings, small_text):
    told = []

    def report(stage, done, total, message):
        if stage == "sweep":
            told.append((done / total, message))

    sweep.sweep(fresh(bench, report=report), asked([small_text]), settings)
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert told[-1][1].startswith("4 of 4: mxq 3.6bpp, rtn, on ")


def test_the_command_line_gives_a_row_an_item(random_model, small_text, capsys):
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
    assert re.search("0 made, 3 .*, 1 failed", shown)
    assert "takes a budget" in shown
    assert main(["sweep", "--model", "demo", "--method", "mxq"]) == 2


def test_budgets_as_they_are_typed():
    assert sweep.parse_budgets("2.25, 2.51;3.13  9MiB 2.25") == (
        "2.25bpp",
        "2.51bpp",
        "3.13bpp",
        "9MiB",
    )
    with pytest.raises(InputError, match="--budget"):
        sweep.requests(PlanRequest("mxq"), ["mxq"], (), ())


def test_the_estimate_is_of_the_runs_so_far():
    runs = pd.DataFrame(
        {
            "corpus": ["a", "a", "b"],
            "tokens": [1000, 500, 4000],
            "truncated": [False, True, False],
            "tokens_per_second": [100.0, 100.0, 100.0],
            "quantize_seconds": [2.0, 2.0, 2.0],
        }
    )
    items = asked(["a", "b"], methods=("mxq",), budgets=("3bpp",))
    whole = [replace(i, evaluation=replace(i.evaluation, max_tokens=None)) for i in items]
    assert sweep.estimate(runs, whole) == pytest.approx(2 + 2 * 5000 / 100)
    assert sweep.estimate(runs, items) == pytest.approx(2 + 2 * 600 / 100)
    unknown = [replace(whole[0], evaluation=EvaluationRequest("c"))]
    assert sweep.estimate(runs, unknown) is None
    assert sweep.estimate(runs.iloc[:0], whole) is None


def one(text):
    return asked([text], methods=("uniform",), budgets=("3.6bpp",))


def test_an_evaluation_without_full_precision_is_made_whole(bench, settings, small_text):
    """What only the saved model was evaluated for has no KL; a sweep doesn't take it for done."""
    (row,) = sweep.sweep(bench, one(small_text), settings)
    with bench.store.transaction() as connection:
        connection.execute("UPDATE evaluations SET kl = NULL, top1 = NULL WHERE run IS NOT NULL")
    (again,) = sweep.sweep(fresh(bench), one(small_text), settings)
    assert (again["state"], again["run"]) == ("done", row["run"])
    assert again["kl"] == pytest.approx(row["kl"])
    kept = bench.store.query("SELECT kl FROM evaluations WHERE run IS NOT NULL AND kl IS NOT NULL")
    assert kept["kl"].tolist() == [again["kl"]]
    plans = bench.store.query("SELECT count(*) AS n FROM plans")
    assert plans["n"][0] == 1, "an evaluation more of a run needs no other plan"


def test_a_run_deleted_meanwhile_is_there_again(bench, settings, small_text):
    (row,) = sweep.sweep(bench, one(small_text), settings)
    store, (evaluation,) = bench.store, bench.store.results()["evaluation"]
    columns = {c: store.run(row["run"])[c] for c in ("plan", "fingerprint", "method", "quantizer")}
    store.delete_runs([row["run"]])
    assert store.results().empty
    store.save_run(row["run"], columns, [])
    assert store.results()["evaluation"].tolist() == [evaluation]


def test_a_plan_that_cannot_be_made_is_tried_once(bench, settings, small_text, other_text):
    items = asked([small_text, other_text], methods=("sensi-knapsack",), budgets=("3.6bpp",))
    tried = []

    def refuse(self, request, settings):
        tried.append(request)
        raise LsqError("The disk is full.")

    bench.plan = refuse.__get__(bench)
    with pytest.raises(LsqError, match=r"\b2 runs .*The disk"):
        sweep.sweep(bench, items, settings)
    assert len(tried) == 1


def test_a_batch_that_fails_keeps_its_traceback(bench, settings, small_text, monkeypatch, capsys):
    """Each of its runs goes well alone, so that nothing else would tell of the defect."""
    whole, sizes = Session.measure, []

    def a_defect_in_measuring(self, made, requests):
        sizes.append(len(made))
        if len(made) > 1:
            raise ZeroDivisionError("of many")
        return whole(self, made, requests)

    monkeypatch.setattr(Session, "measure", a_defect_in_measuring)
    rows = sweep.sweep(bench, asked([small_text], methods=("uniform",)), settings)
    assert [row["state"] for row in rows] == ["done", "done"]
    assert sizes == [2, 1, 1]
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "in a_defect_in_measuring" in said


def test_a_sweep_of_bad_input_only_is_bad_input(bench, settings, small_text):
    wrong = asked(["/no/such/text"], methods=("uniform",))
    with pytest.raises(InputError, match=r"None of the 2 runs .*/no/such/text"):
        sweep.sweep(bench, wrong, settings)
    mixed = sweep.sweep(bench, [*wrong, *asked([small_text], budgets=("3.6bpp",))], settings)
    assert [row["state"] for row in mixed] == ["failed", "failed", "done", "done"]


@pytest.mark.parametrize("content", [b"", b'{"items": 3}', b'{"items": [{"state": "done"}]}'])
def test_damaged_rows_of_a_sweep_are_said(tmp_path, content):
    assert sweep.rows_kept(tmp_path) == []
    (tmp_path / sweep.ITEMS).write_bytes(content)
    with pytest.raises(Damaged, match=r"items\.json is damaged"):
        sweep.rows_kept(tmp_path)


def test_plans_made_together_are_as_each_made_alone(bench, settings, small_text, monkeypatch):
    """And full precision reads the text once for them all."""
    items = asked([small_text], budgets=("2.6bpp", "3.2bpp", "3.6bpp"))
    monkeypatch.setattr(sweep, "PLANS_AT_ONCE", 6)
    read = count_calls(monkeypatch, "measure")
    rows = sweep.sweep(bench, items, settings)
    assert [len(made) for made, _ in read] == [6]
    for item, row in zip(items, rows, strict=True):
        alone = Session(bench.source, Store(bench.store.path.with_name("alone.duckdb")), "cpu")
        plan = alone.plan(item.request, settings)
        outcome = alone.run(plan, item.quantizer, item.evaluation)
        for name in ("perplexity", "perplexity_full", "kl", "top1", "measured_bytes"):
            assert row[name] == outcome[name]


def test_what_is_alike_in_two_plans_is_quantized_once(bench, settings, small_text, monkeypatch):
    from lsq_core.quantized import convert as apply

    made, whole = [], apply.quantize_config
    monkeypatch.setattr(
        apply, "quantize_config", lambda *a, **k: made.append((k["name"], a[1])) or whole(*a, **k)
    )
    items = asked([small_text], methods=("mxq",), budgets=("2.6bpp", "3.1bpp", "3.6bpp"))
    sweep.sweep(bench, items, settings)
    plans = [bench.plan(item.request, settings) for item in items]
    stops = [(matrix.name, config) for plan in plans for matrix, config in plan.choice.items()]
    assert len(made) == len(set(made)) == len(set(stops)) < len(stops)


def test_where_memory_is_short_plans_are_made_one_by_one(bench, settings, small_text, monkeypatch):
    read = count_calls(monkeypatch, "measure")
    bench.remembered_bytes = 0
    rows = sweep.sweep(bench, asked([small_text]), settings)
    assert [len(made) for made, _ in read] == [1] * 4
    assert [row["state"] for row in rows] == ["done"] * 4


def test_too_little_memory_for_all_at_once_is_no_failure(bench, settings, small_text, monkeypatch):
    whole = Session.measure

    def small(self, made, requests):
        if len(made) > 1:
            raise LsqError("cuda ran out of memory")
        return whole(self, made, requests)

    monkeypatch.setattr(Session, "measure", small)
    rows = sweep.sweep(bench, asked([small_text]), settings)
    assert [row["state"] for row in rows] == ["done"] * 4


# --- baselines ------------------------------------------------------------------------------


def test_baselines_are_uniform_plans_at_every_size(small_text):
    like, texts = PlanRequest("mxq"), [EvaluationRequest(str(small_text))]
    found = sweep.baselines(like, ("3.13",), ("4.2bpp",), ("nf4", "rtn"), texts)
    assert [(i.request.method, i.request.base, i.request.budget, i.quantizer) for i in found] == [
        ("uniform", "3.13", None, "nf4"),
        ("uniform", "3.13", None, "rtn"),
        ("uniform", None, "4.2bpp", "nf4"),
        ("uniform", None, "4.2bpp", "rtn"),
    ]
    assert sweep.all_methods(["all"]) == list(PLANNERS)
    assert sweep.all_methods(["mxq"]) == ["mxq"]
    assert sweep.all_baselines(["all"], ["hqq"]) == [q for q in BASELINES if q != "hqq"]
    with pytest.raises(InputError, match="'nf5'"):
        sweep.all_baselines(["nf5"], [])


def test_what_a_baseline_cannot_do_is_its_rows_reason(bench, settings, small_text, monkeypatch):
    """Refused before anything is measured or loaded; the others have all their figures."""
    monkeypatch.setattr(quantize, "find_spec", lambda name: name != "gptqmodel" or None)
    profiled = count_calls(monkeypatch, "profile")
    texts = [EvaluationRequest(str(small_text), max_tokens=300)]
    items = sweep.baselines(
        PlanRequest("uniform"), (), ("2.2bpp", "4.2bpp"), ("rtn", "nf4", "gptq"), texts
    )
    rows = sweep.sweep(bench, items, settings)
    told = {(row["quantizer"], row["budget"]): row for row in rows}
    failed = {key: row["reason"] for key, row in told.items() if row["state"] == "failed"}
    assert set(failed) == {("nf4", "2.2bpp"), ("gptq", "2.2bpp"), ("gptq", "4.2bpp")}
    assert "2.2bpp is below" in failed["nf4", "2.2bpp"]
    assert failed["gptq", "4.2bpp"].startswith("GPTQ needs gptqmodel")
    assert not profiled
    for row in rows:
        if row["state"] == "done":
            assert row["measured_bytes"] == row["planned_bytes"]
            assert row["quantize_seconds"] > 0
            assert row["steps"] == 0
    assert told["nf4", "4.2bpp"]["measured_bytes"] != told["rtn", "4.2bpp"]["measured_bytes"]
    again = sweep.sweep(fresh(bench), items, settings)
    assert [row["state"] for row in again] == [
        "found" if row["state"] == "done" else "failed" for row in rows
    ]


def test_one_command_sweeps_all_methods_and_baselines(
    random_model, small_text, capsys, monkeypatch
):
    asked = []
    monkeypatch.setattr(sweep, "sweep", lambda bench, items, settings: asked.extend(items) or [])
    command = ["sweep", "--model", str(random_model("llama-gqa")), "--method", "all"]
    command += ["--baseline", "all", "--corpus", str(small_text), "--json"]
    for budget in sweep.EVERYTHING_BUDGETS:
        command += ["--budget", budget]
    assert main(command) == 0
    assert len(asked) == 3 * (len(PLANNERS) + len(BASELINES) - 1)
    by = {(item.request.method, item.quantizer) for item in asked}
    assert by == {(m, "hqq") for m in PLANNERS} | {("uniform", q) for q in BASELINES}
