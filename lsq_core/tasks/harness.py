"""Evaluation of a model in memory on lm-eval's tasks."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsq_core.errors import InputError, LsqError, exception_reason
from lsq_core.files import cached_sha256
from lsq_core.quantized.modules import decoded_weights
from lsq_core.tasks.request import NAMED_TASKS, TaskRequest, TaskResult, check_installed

if TYPE_CHECKING:
    from torch import nn

#: Names of the ``datasets`` loaders for local files.
_LOCAL_LOADERS = ("csv", "json", "parquet", "text")
#: Batch size by device type.
_BATCH = {"cpu": 4, "cuda": 16}
_STDERR = "_stderr"
#: Bootstrap draws for standard errors of metrics that are not means over documents.
_BOOTSTRAP_DRAWS = 1000


def run_tasks(
    model: nn.Module, tokenizer: object, context: int, request: TaskRequest
) -> list[TaskResult]:
    """Evaluate a causal model on tasks and return a result for each task and metric.

    Packed weights are decoded once and held, which takes as much memory as full precision.
    ``context`` is the model's context length in tokens.

    Raises
    ------
    InputError
        If lm-eval is not installed, a task is unknown, or a local data file does not exist.
    LsqError
        If a task's data cannot be read or downloaded.
    """
    check_installed()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = _task_manager(request)
    specs = {name: _task_spec(manager, name, request) for name in request.names}
    with _quiet(), _translate_data_errors(request), decoded_weights(model):
        wrapped = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            max_length=context,
            truncation=True,
            batch_size=_BATCH[model.device.type],
        )
        found = simple_evaluate(
            wrapped,
            tasks=[spec for spec, _ in specs.values()],
            num_fewshot=request.fewshot,
            limit=request.limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=_BOOTSTRAP_DRAWS,
        )
    return [
        result
        for name in found["results"]
        if name in found["versions"] and name in found["n-samples"]
        for result in _results(found, name, request, specs.get(name, (name, None))[1])
    ]


def _task_manager(request: TaskRequest) -> Any:
    """Return lm-eval's tasks and the folder's, or only the latter if they include all requested."""
    from lm_eval.tasks import TaskManager

    if request.folder is not None:
        manager = TaskManager(include_path=str(request.folder), include_defaults=False)
        if {*request.names} <= {*manager.all_tasks}:
            return manager
    return TaskManager(include_path=None if request.folder is None else str(request.folder))


def _task_spec(
    manager: Any, name: str, request: TaskRequest
) -> tuple[str | dict[str, Any], str | None]:
    """Return what lm-eval should load for a task, and the SHA-256 of its local data files, if any.

    lm-eval resolves relative data files against the working folder; here, they are next to the
    task.
    """
    entry = manager.task_index.get(name)
    if entry is None:
        raise InputError(
            f"'{name}' is not a task of lm-eval"
            + (f" or of {request.folder}" if request.folder else "")
            + f"; try {', '.join(NAMED_TASKS)}, or give a folder of tasks."
        )
    path = entry.yaml_path
    own = request.folder.resolve() if request.folder else None
    if path is None or own is None or not Path(path).resolve().is_relative_to(own):
        return name, None
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(path)
    arguments = config.get("dataset_kwargs") or {}
    if config.get("dataset_path") not in _LOCAL_LOADERS or "data_files" not in arguments:
        return name, None
    files = _absolute(arguments["data_files"], Path(path).parent)
    return config | {"dataset_kwargs": arguments | {"data_files": files}}, _digest(files)


def _absolute(files: object, folder: Path) -> object:
    """Return a task's data files with absolute paths.

    Raises
    ------
    InputError
        If one does not exist.
    """
    if isinstance(files, Mapping):
        return {split: _absolute(own, folder) for split, own in files.items()}
    if isinstance(files, list):
        return [_absolute(own, folder) for own in files]
    path = folder / str(files)
    if not path.is_file():
        raise InputError(f"The task in {folder} refers to {files}, which does not exist.")
    return str(path.resolve())


def _digest(files: object) -> str:
    """Return the combined SHA-256 of data files, in their order."""
    if isinstance(files, str):
        return cached_sha256(Path(files))
    parts = files.values() if isinstance(files, Mapping) else files
    return hashlib.sha256("".join(map(_digest, parts)).encode()).hexdigest()


def _results(
    found: Mapping[str, Any], name: str, request: TaskRequest, local: str | None
) -> Iterator[TaskResult]:
    """Yield the metrics of one task from the results of ``simple_evaluate``."""
    config, values = found["configs"][name], found["results"][name]
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith(_STDERR) or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{metric}{_STDERR},{filtered}")
        source = [config.get("dataset_path"), config.get("dataset_name")]
        yield TaskResult(
            task=name,
            version=str(found["versions"][name]),
            metric=metric if filtered == "none" else f"{metric} ({filtered})",
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, int | float) else None,
            higher_is_better=bool(found["higher_is_better"][name].get(metric, True)),
            fewshot=int(found["n-shot"].get(name) or 0),
            limit=request.limit,
            documents=int(found["n-samples"][name]["effective"]),
            dataset=local or "/".join(part for part in source if part),
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's warnings, such as those about arguments that do not apply."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _translate_data_errors(request: TaskRequest) -> Iterator[None]:
    """Raise :class:`LsqError` with an explanation if a task's data is not available."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, OSError) as error:
        raise LsqError(
            f"The data of {', '.join(request.names)} cannot be read ({exception_reason(error)}): "
            "check the network, or give a folder of tasks with local data files."
        ) from error
