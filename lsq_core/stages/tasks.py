"""Measure runs and full-precision models on tasks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lsq_core.errors import InputError, translate_resource_errors
from lsq_core.model.source import ModelSource
from lsq_core.progress import ProgressCallback, ignore_progress
from lsq_core.provenance import machine, versions
from lsq_core.quantized.manifest import RUN_KEYS, is_quantized_folder, read_manifest
from lsq_core.stages.model import OpenModel
from lsq_core.stages.saved import load_saved, rebuild_run
from lsq_core.store.store import Store
from lsq_core.tasks.request import TaskRequest, TaskResult, check_installed

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, eq=False)
class _Measured:
    """A model to measure: that of a run, or full precision (``run`` is None)."""

    run: str | None
    fingerprint: str
    model: nn.Module
    tokenizer: object
    context: int
    where: dict[str, str]


def measure_tasks(
    request: TaskRequest,
    store: Store,
    run: str | None = None,
    source: ModelSource | None = None,
    device: str = "auto",
    dtype: str = "auto",
    report: ProgressCallback = ignore_progress,
) -> tuple[str | None, list[TaskResult]]:
    """Measure a run, a saved model or a full-precision model on tasks, and store the results.

    Returns the run's id (None for full precision) and the results.

    Without a run, ``source`` is the model to measure; for a folder written by ``run --save``, the
    results are stored with its run. With a run, it is the current location of the run's model.

    Raises
    ------
    InputError, LsqError
        If lm-eval is not installed, an input is invalid, or a task's data cannot be read.
    """
    check_installed()
    from lsq_core.tasks.harness import run_tasks

    of = _open(store, run, source, device, dtype, report)
    report("tasks", 0, 1, ", ".join(request.names))
    with translate_resource_errors(of.where["device"]):
        found = run_tasks(of.model, of.tokenizer, of.context, request)
    provenance = of.where | {
        "machine": machine(of.where["device"]),
        "versions": versions("lm-eval"),
    }
    results = [replace(result, provenance=provenance) for result in found]
    store.save_task_results(of.fingerprint, of.run, results)
    return of.run, results


def _open(
    store: Store,
    run: str | None,
    source: ModelSource | None,
    device: str,
    dtype: str,
    report: ProgressCallback,
) -> _Measured:
    if run is not None:
        trusted = source is not None and source.trust_remote_code
        original, model = rebuild_run(run, source, store, device, dtype, report, trusted)
        return _of_model(original, model, run)
    if source is None:
        raise InputError("Name a run, or a model with --model.")
    folder = source.local_folder
    if folder is not None and is_quantized_folder(folder):
        return _open_saved(store, source, device, dtype, report)
    original = OpenModel(source, store, device, dtype, report)
    return _of_model(original, original.loaded.model, None)


def _of_model(original: OpenModel, model: nn.Module, run: str | None) -> _Measured:
    info = original.info
    where = original.device_and_dtype
    return _Measured(run, info.fingerprint, model, original.tokenizer, info.context, where)


def _open_saved(
    store: Store, source: ModelSource, device: str, dtype: str, report: ProgressCallback
) -> _Measured:
    from lsq_core.model.architecture import context_length

    folder = source.local_folder
    manifest = read_manifest(folder, RUN_KEYS)
    if store.find_run_plan(manifest["run"]) is None:
        raise InputError(
            f"The run of {folder} is not in {store.path}; 'eval --model {folder}' adds it."
        )
    saved = load_saved(folder, device, dtype, report, source.trust_remote_code)
    where = {"device": saved.device, "dtype": saved.dtype}
    return _Measured(
        manifest["run"],
        manifest["fingerprint"],
        saved.model,
        saved.tokenizer,
        context_length(saved.model),
        where,
    )
