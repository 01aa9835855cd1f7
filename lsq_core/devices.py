"""Canonical names of this machine's devices. Nothing here imports torch."""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from pathlib import Path

#: The folder of the driver's device nodes, one per card available to this process.
_DEV_FOLDER = Path("/dev")


def count_gpus() -> int:
    """Return the number of GPUs visible to torch, which numbers them from 0.

    Node numbers can differ: a container may have ``/dev/nvidia3`` alone. ``CUDA_VISIBLE_DEVICES``
    may hide some GPUs. The result is 0 if torch was built without CUDA.
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
    for entry in visible.split(","):  # like CUDA, stop at the first invalid entry
        entry = entry.strip()
        if (entry.isdigit() and int(entry) < node_count) or entry.startswith(("GPU-", "MIG-")):
            count += 1
        else:
            break
    return count


def device_names() -> list[str]:
    """Return the names of the CPU and of every GPU visible to torch."""
    return ["cpu", *(f"cuda:{number}" for number in range(count_gpus()))]


def canonical_device(name: str) -> str:
    """Return the canonical name of a device: ``auto`` is resolved, ``cuda`` becomes ``cuda:0``.

    Names of no known form are returned unchanged.
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
    """Return the number of processor cores available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
