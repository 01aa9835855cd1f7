"""lm-eval tasks: requests, stored results, and a local task if lm-eval is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from lsq_core.cli.program import main
from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.model.source import ModelSource
from lsq_core.session import Session
from lsq_core.stages.tasks import measure_tasks
from lsq_core.store import connection as store_module
from lsq_core.store.schema import MIGRATIONS
from lsq_core.store.store import Store
from lsq_core.tasks.request import TaskRequest, TaskResult
from lsq_core.ui.compare.tasks import tasks_table

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed (make lm-eval)"
)
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 3.0
"""


def result(task: str, value: float, **changed: object) -> TaskResult:
    known = {
        "version": "1.0", "metric": "acc", "stderr": 0.01, "higher_is_better": True, "fewshot": 0,
        "limit": None, "documents": 100, "dataset": "d",
        "provenance": {"device": "cpu", "dtype": "float32"},
    }  # fmt: skip
    return TaskResult(task=task, value=value, **known | changed)


# --- requests ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"names": ()},
        {"names": ("piqa",), "fewshot": -1},
        {"names": ("piqa",), "limit": 0},
        {"names": ("piqa",), "folder": Path("/no/such/folder")},
    ],
)
def test_wrong_requests_are_refused(wrong):
    with pytest.raises(InputError):
        TaskRequest(**wrong)


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed here")
def test_without_lm_eval_how_to_install_it_is_said(tmp_path, capsys):
    db = str(tmp_path / "s.duckdb")
    assert main(["tasks", "--model", "demo", "--task", "piqa", "--db", db]) == 2
    assert "make lm-eval" in capsys.readouterr().err


# --- stored results ---------------------------------------------------------------------------


def test_newest_result_stands_beside_full_precision(tmp_path):
    store = Store(tmp_path / "s.duckdb")
    store.save_task_results("f", None, [result("piqa", 0.7), result("other", 0.5)])
    store.save_task_results("f", "r", [result("piqa", 0.5)])
    store.save_task_results("f", "r", [result("piqa", 0.6), result("other", 0.4, fewshot=2)])
    store.save_task_results("g", "r", [result("piqa", 0.1)])
    found = store.task_results("f")
    own = found[found["run"] == "r"].set_index("task")
    assert own["value"].to_dict() == {"piqa": 0.6, "other": 0.4}
    assert own.loc["piqa", "full"] == 0.7
    assert own["full"].isna().to_dict() == {"piqa": False, "other": True}, "2-shot is another task"
    assert len(found) == 4


@pytest.mark.parametrize(
    "changed",
    [
        {"version": "2.0"},
        {"limit": 50},
        {"dataset": "e"},
        {"provenance": {"device": "cuda:0", "dtype": "float32"}},
        {"provenance": {"device": "cpu", "dtype": "bfloat16"}},
    ],
)
def test_results_of_other_conditions_are_not_paired(tmp_path, changed):
    store = Store(tmp_path / "s.duckdb")
    store.save_task_results("f", None, [result("piqa", 0.7, **changed)])
    store.save_task_results("f", "r", [result("piqa", 0.6)])
    found = store.task_results("f")
    assert found.loc[found["run"] == "r", "full"].isna().all()


def test_deleted_runs_have_no_results(tmp_path):
    session = Session("demo", tmp_path / "s.duckdb", device="cpu")
    request = EvaluationRequest("stdlib", "strided", 300)
    run = session.run(session.plan("uniform", base="4.13"), "hqq", request)["run"]
    store, fingerprint = session.store, session.info.fingerprint
    store.save_task_results(fingerprint, run, [result("piqa", 0.6)])
    assert len(store.task_results(fingerprint)) == 1
    store.delete_runs([run])
    assert store.task_results(fingerprint).empty


def test_database_without_the_table_opens(tmp_path, monkeypatch):
    path = tmp_path / "old.duckdb"
    at = next(i for i, script in enumerate(MIGRATIONS) if "task_results" in script)
    monkeypatch.setattr(store_module, "MIGRATIONS", MIGRATIONS[:at])
    Store(path)
    monkeypatch.undo()
    assert Store(path).task_results("f").empty


def test_table_of_compare_tells_difference_and_errors(tmp_path):
    store = Store(tmp_path / "s.duckdb")
    store.save_task_results("f", None, [result("piqa", 0.7, stderr=None)])
    store.save_task_results("f", "r", [result("piqa", 0.6), result("other", 0.4, limit=5)])
    table = tasks_table(store.task_results("f"), "r").set_index("task")
    assert table["difference"].to_dict() == pytest.approx({"piqa": -0.1, "other": float("nan")},
                                                          nan_ok=True)  # fmt: skip
    assert table.loc["piqa", "± stderr"] == 0.01
    assert tasks_table(store.task_results("f"), "no run").empty


# --- with lm-eval -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return a folder with a task; the likelier choice is right in six of its eight questions."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "names.yaml").write_text(TASK.format(name="local_names", file="names.jsonl"))
    rows = [
        {"question": f"def f{i}(x):\n    return", "choices": [" x", " zebra quartz"], "answer": a}
        for i, a in enumerate([0, 0, 0, 0, 0, 0, 1, 1])
    ]
    (folder / "names.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@needs_lm_eval
def test_local_task_of_a_model_and_of_its_run(folder, tmp_path, capsys):
    """Any model finds the first choice likelier, which is right in six of eight questions."""
    session = Session("demo", tmp_path / "s.duckdb", device="cpu")
    request = EvaluationRequest("stdlib", "strided", 300)
    saved = tmp_path / "saved"
    run = session.run(session.plan("uniform", base="4.13"), "hqq", request, saved)["run"]
    db = ["--db", str(session.store.path), "--device", "cpu", "--json"]
    options = ["--task", "local_names", "--tasks-folder", str(folder), *db]
    outcomes = []
    for of in (["--model", "demo"], [run], ["--model", str(saved)]):
        assert main(["tasks", *of, *options]) == 0
        (found,) = json.loads(capsys.readouterr().out)["results"]
        outcomes.append(found)
    assert [found["value"] for found in outcomes] == [0.75] * 3
    assert outcomes[0]["stderr"] == pytest.approx((0.75 * 0.25 / 7) ** 0.5)
    assert (outcomes[0]["documents"], outcomes[0]["version"]) == (8, "3.0")
    kept = session.store.task_results(session.info.fingerprint)
    assert kept["run"].tolist()[1:] == [run]
    assert kept["full"].tolist() == [0.75, 0.75]


@needs_lm_eval
def test_limit_examples_and_data_are_part_of_a_result(folder, tmp_path):
    store = Store(tmp_path / "s.duckdb")
    names = ("local_names",)
    _, (first,) = measure_tasks(
        TaskRequest(names, folder, fewshot=1, limit=3), store, None, ModelSource("demo"), "cpu"
    )
    assert (first.fewshot, first.limit, first.documents) == (1, 3, 3)
    assert "lm-eval" in first.provenance["versions"]
    data = folder / "names.jsonl"
    data.write_text(data.read_text() + "\n" + data.read_text().splitlines()[0])
    _, (second,) = measure_tasks(
        TaskRequest(names, folder), store, None, ModelSource("demo"), "cpu"
    )
    assert second.documents == 9
    assert second.dataset != first.dataset


@needs_lm_eval
def test_wrong_tasks_are_refused(folder, tmp_path):
    store, source = Store(tmp_path / "s.duckdb"), ModelSource("demo")
    with pytest.raises(InputError, match="no_such_task"):
        measure_tasks(TaskRequest(("no_such_task",), folder), store, None, source, "cpu")
    (folder / "names.jsonl").unlink()
    with pytest.raises(InputError, match=r"names\.jsonl"):
        measure_tasks(TaskRequest(("local_names",), folder), store, None, source, "cpu")
    with pytest.raises(InputError):
        measure_tasks(TaskRequest(("local_names",), folder), store)
    (folder / "names.jsonl").write_text("not JSON")
    with pytest.raises(LsqError, match="local_names"):
        measure_tasks(TaskRequest(("local_names",), folder), store, None, source, "cpu")
