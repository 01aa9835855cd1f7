"""Task requests and their results. Needs neither torch nor lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lsq_core.errors import InputError

#: Tasks that quantization papers report, by lm-eval's names; other lm-eval tasks work too.
NAMED_TASKS = (
    "arc_easy",
    "arc_challenge",
    "hellaswag",
    "lambada_openai",
    "piqa",
    "winogrande",
)
_REQUIREMENTS = Path(__file__).parent / "requirements.txt"


@dataclass(frozen=True)
class TaskRequest:
    """Tasks to evaluate a model on.

    ``folder`` holds additional tasks as YAML files in lm-eval's format; relative data files are
    resolved against their folder. ``fewshot`` is the number of solved examples before each
    question, None for the task's own; ``limit`` is the maximum number of documents per task, None
    for all.
    """

    names: tuple[str, ...]
    folder: Path | None = None
    fewshot: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.names:
            names = ", ".join(NAMED_TASKS)
            raise InputError(f"Give at least one task: {names}, or another of lm-eval's.")
        if self.fewshot is not None and self.fewshot < 0:
            raise InputError(f"The number of examples cannot be negative ({self.fewshot}).")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"The limit must be at least 1 document, not {self.limit}.")
        if self.folder is not None and not self.folder.is_dir():
            raise InputError(f"There is no folder {self.folder} with tasks.")


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task.

    ``metric`` is lm-eval's name, with its filter unless that is ``none``; ``stderr`` is the
    standard error over documents, None if the task has none; ``fewshot`` and ``limit`` are the
    settings used, ``documents`` is the number scored. ``dataset`` is their source: the name on the
    Hub, or the local files' SHA-256.
    """

    task: str
    version: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    fewshot: int
    limit: int | None
    documents: int
    dataset: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict:
        """Return the fields that the command line prints."""
        names = ("task", "version", "metric", "value", "stderr", "higher_is_better", "fewshot")
        return {name: getattr(self, name) for name in (*names, "limit", "documents", "dataset")}


def check_installed() -> None:
    """Raise :class:`InputError` if lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise InputError(
            "Tasks need lm-eval, which is not installed: make lm-eval, or "
            f"pip install --no-deps -r {_REQUIREMENTS}."
        )
