"""Helpers shared by several test modules."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

from lsq_core.evaluation.perplexity import evaluate_models
from lsq_core.evaluation.protocol import EvaluationText, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from lsq_core.evaluation.result import EvaluationPair
    from lsq_core.planning.problem import Problem

T = TypeVar("T")


def wait_for(condition: Callable[[], T], seconds: float = 60, interval: float = 0.02) -> T:
    """Poll until a condition is true, and return its value.

    The deadline only guards against a hanging process; it is not a measure of speed.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"the condition was not met within {seconds:g} s"
        time.sleep(interval)
    return value


def nominal_budget(nominal: float, problem: Problem) -> str:
    """Express nominal bytes of a problem's matrices as a budget in bits per parameter."""
    return f"{8 * float(nominal) / problem.total!r}bpp"


def find_free_port() -> int:
    """Return a loopback port on which nothing is listening."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def update_config(folder: Path, **entries: object) -> None:
    """Change entries of a model's ``config.json``."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@contextmanager
def mount_small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Create a folder and mount a file system on it, of a size such as ``1m``, within the block.

    Skips the test if mounting is not permitted.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def evaluate_model(
    model: nn.Module,
    ids: np.ndarray,
    protocol: Protocol,
    *,
    bos: int | None,
    checkpoint: Path | None = None,
    **options: object,
) -> EvaluationPair:
    """Evaluate one model on one text, with the options of :func:`evaluate_models`."""
    [[pair]] = evaluate_models(
        [model], [EvaluationText(ids, protocol)], bos=bos, checkpoints=[[checkpoint]], **options
    )
    return pair
