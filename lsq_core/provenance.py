"""What a figure was made with: versions, machine, time."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import lsq_core

_PACKAGES = ("torch", "transformers", "hqq", "datasets", "scipy", "pulp", "numpy", "duckdb")


@lru_cache
def versions(*more: str) -> dict[str, str]:
    """This project's version, Python's, and those of the packages that figures depend on.

    ``more`` are packages that only some figures depend on.
    """
    found = {"lsq": lsq_core.__version__, "python": platform.python_version()}
    for package in (*_PACKAGES, *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def machine(device: str) -> str:
    """The device in words: the GPU's own name, or the processor and its threads."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} threads"


def now() -> datetime:
    """The time, in UTC, to the microsecond; without a zone, as DuckDB's TIMESTAMP keeps it."""
    return datetime.now(UTC).replace(tzinfo=None)
