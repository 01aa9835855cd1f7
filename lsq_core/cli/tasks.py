"""The verb ``tasks``: measure a run or a model on lm-eval's tasks."""

from __future__ import annotations

import argparse
from pathlib import Path

from lsq_core.model.source import ModelSource
from lsq_core.progress import ProgressCallback
from lsq_core.store.store import Store
from lsq_core.tasks.request import NAMED_TASKS, TaskRequest


def add_options(sub: argparse.ArgumentParser) -> None:
    """Add the options for the run and the tasks."""
    sub.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        help="a run, rebuilt unless it was saved; without one --model is measured, saved or not",
    )
    sub.add_argument(
        "--task",
        action="append",
        default=[],
        help=f"{', '.join(NAMED_TASKS)}, or another of lm-eval's or of the folder (repeatable)",
    )
    sub.add_argument(
        "--tasks-folder",
        type=Path,
        metavar="FOLDER",
        help="more tasks, as YAML files of lm-eval's form with their data files beside them; they "
        "may name Python code, which runs",
    )
    sub.add_argument("--fewshot", type=int, help="number of few-shot examples (the task's own)")
    sub.add_argument("--limit", type=int, help="maximum number of documents per task (all)")


def measure(options: argparse.Namespace, report: ProgressCallback) -> dict:
    """Measure a run or a model on tasks, and store the results."""
    from lsq_core.stages.tasks import measure_tasks

    request = TaskRequest(
        tuple(dict.fromkeys(options.task)), options.tasks_folder, options.fewshot, options.limit
    )
    source = None
    if options.model:
        source = ModelSource(
            options.model, options.revision, options.trust_remote_code, options.allow_pickle
        )
    run, results = measure_tasks(
        request, Store(options.db), options.run, source, options.device, options.dtype, report
    )
    return {
        "run": run,
        "model": source.name if source else None,
        "results": [result.to_json() for result in results],
        "provenance": dict(results[0].provenance) if results else {},
    }


def show(result: dict) -> None:
    """Print one row per metric."""
    print(f"{'task':<24} {'metric':<20} {'value':>8}   {'stderr':>8}  documents")
    for row in result["results"]:
        stderr = "" if row["stderr"] is None else f"± {row['stderr']:.4f}"
        limit = ", limited" if row["limit"] else ""
        print(
            f"{row['task']:<24} {row['metric']:<20} {row['value']:>8.4f}   {stderr:>8}  "
            f"{row['documents']:,}{limit}, {row['fewshot']}-shot, version {row['version']}"
        )
