"""What a figure was made with, and what of that it depends on: versions, machine, time.

All that may help a reader is recorded (:func:`versions`, :func:`machine`). What tells one figure
from another is less, and is decided here alone: the *place* it was computed in (kind of device,
dtype) and the versions of what computes it. Two figures of the same model, text and settings
are the same when that is the same: a package that only plans, stores or downloads is no part of
it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import lsq_core

#: Version of this project's own arithmetic: what its quantizers store for given weights, and how
#: its metrics and evaluation turn that into figures. Raise it when one of these comes out new.
#: 2: a matrix of any magnitude is quantized alike, its exponent stored.
ARITHMETIC = 2
#: The packages that compute every forward pass.
_FORWARD = ("torch", "transformers")
#: What is recorded with a figure for its reader.
_PACKAGES = ("torch", "transformers", "hqq", "datasets", "scipy", "pulp", "numpy", "duckdb")


@lru_cache
def versions(*more: str) -> dict[str, str]:
    """This project's version, Python's, and those of the packages that figures depend on.

    ``more`` are packages that only some figures depend on.
    """
    recorded_versions = {"lsq": lsq_core.__version__, "arithmetic": str(ARITHMETIC)}
    recorded_versions["python"] = platform.python_version()
    for package in (*_PACKAGES, *more):
        try:
            recorded_versions[package] = version(package)
        except PackageNotFoundError:
            recorded_versions[package] = "absent"
    return recorded_versions


@dataclass(frozen=True)
class DeviceAndDtype:
    """Where a model computes: the kind of device, ``cpu`` or ``cuda``, and the dtype."""

    device: str
    dtype: str

    @classmethod
    def from_record(cls, recorded: Mapping[str, object]) -> DeviceAndDtype:
        """That of a record with ``device`` (``cuda:1``) and ``dtype``, '' where it has none."""
        return cls(device_kind(str(recorded.get("device") or "")), str(recorded.get("dtype") or ""))


def device_kind(device: str) -> str:
    """``cuda`` of ``cuda:1``: figures do not depend on which of several devices it was."""
    return device.partition(":")[0]


def arithmetic_version(recorded: Mapping[str, str]) -> str:
    """The version of this project's arithmetic in recorded versions; before it was recorded, 1."""
    return recorded.get("arithmetic", "1")


def profile_dependencies(
    device_and_dtype: DeviceAndDtype, recorded: Mapping[str, str], packages: Sequence[str]
) -> dict[str, object]:
    """What the scores of a profile depend on beside its settings, its model and its text.

    ``packages`` are those that its quantizer computes with. Releases of torch and transformers
    move a score by rounding alone, far less than what plans are decided by, so a profile outlives
    them.
    """
    return {
        "device": device_and_dtype.device,
        "dtype": device_and_dtype.dtype,
        "arithmetic": arithmetic_version(recorded),
        "packages": {name: recorded.get(name, "absent") for name in packages},
    }


def run_dependencies(recorded: Mapping[str, str], packages: Sequence[str] = ()) -> dict[str, str]:
    """The part of recorded versions that a quantized model, and its forward pass, depend on.

    ``packages`` are those that its quantizer computes with.
    """
    recorded_versions = {name: recorded.get(name, "absent") for name in (*_FORWARD, *packages)}
    return recorded_versions | {"arithmetic": arithmetic_version(recorded)}


def evaluation_dependencies(recorded: Mapping[str, Any]) -> dict[str, object]:
    """What an evaluation depends on beside the model, the tokens and the protocol.

    ``recorded`` is the provenance kept with it. Equal results of this function mean figures that
    may be paired, and that need not be computed twice.
    """
    device_and_dtype = DeviceAndDtype.from_record(recorded)
    return {
        "device": device_and_dtype.device,
        "gpu": recorded.get("machine") if device_and_dtype.device == "cuda" else None,
        "dtype": device_and_dtype.dtype,
        "bos": recorded.get("bos"),
        "versions": run_dependencies(recorded.get("versions") or {}),
    }


def machine(device: str) -> str:
    """The device in words: the GPU's own name, or the processor and its threads."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} threads"


def now() -> datetime:
    """The time, in UTC, to the microsecond; without a zone, as DuckDB's TIMESTAMP keeps it."""
    return datetime.now(UTC).replace(tzinfo=None)
