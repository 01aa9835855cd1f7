"""The devices of this machine, each by one name; none of this imports torch."""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from pathlib import Path

#: Where the driver's device nodes are, one a card that this process may use.
_DEV_FOLDER = Path("/dev")


def count_gpus() -> int:
    """How many GPUs torch will see: they are numbered from 0, whatever their nodes' numbers.

    A container may hold ``/dev/nvidia3`` alone, and ``CUDA_VISIBLE_DEVICES`` may hide some. 0 with
    a torch that was built without CUDA.
    """
    if "+cpu" in version("torch"):
        return 0
    node_count = sum(
        bool(re.fullmatch(r"nvidia\d+", path.name)) for path in _DEV_FOLDER.glob("nvidia*")
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not node_count:
        return node_count
    count = 0
    for entry in visible.split(","):  # as CUDA does it: up to the first that is none
        entry = entry.strip()
        if (entry.isdigit() and int(entry) < node_count) or entry.startswith(("GPU-", "MIG-")):
            count += 1
        else:
            break
    return count


def device_names() -> list[str]:
    """The CPU, and every GPU that torch will see."""
    return ["cpu", *(f"cuda:{number}" for number in range(count_gpus()))]


def canonical_device(name: str) -> str:
    """The one name of a device: ``auto`` is what it will mean here, ``cuda`` is ``cuda:0``.

    What names no device stays as it is.
    """
    if name == "auto":
        return device_names()[1] if count_gpus() else "cpu"
    if name == "cuda":
        return "cuda:0"
    if re.fullmatch(r"cpu(:\d+)?", name):
        return "cpu"
    match = re.fullmatch(r"cuda:0*(\d+)", name)
    return f"cuda:{match[1]}" if match else name


def count_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
