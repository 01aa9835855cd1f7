"""Provenance of a figure (versions, machine, time), and which parts of it the figure depends on.

Everything that may help a reader is recorded (:func:`versions`, :func:`machine`). A figure depends
on only part of it, which is decided in this module alone: the *place* where it was computed (kind
of device, dtype) and the versions of the packages that compute it. Two figures of the same model,
text and settings are the same if these agree; packages that only plan, store or download don't
count.
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

from lsq_core.version import __version__

#: Version of this project's own arithmetic: what its quantizers store for given weights, and how
#: its metrics and evaluation turn that into figures. Raise it when any of these results change.
#: Version 2: matrices of any magnitude are quantized alike, with their exponent stored.
ARITHMETIC = 2
#: The packages that every forward pass depends on.
_FORWARD = ("torch", "transformers")
#: The packages whose versions are recorded with every figure.
_PACKAGES = ("torch", "transformers", "hqq", "datasets", "scipy", "pulp", "numpy", "duckdb")


@lru_cache
def versions(*more: str) -> dict[str, str]:
    """Return the versions of this project, its arithmetic, Python and the recorded packages.

    ``more`` are further packages, on which only some figures depend.
    """
    recorded_versions = {"lsq": __version__, "arithmetic": str(ARITHMETIC)}
    recorded_versions["python"] = platform.python_version()
    for package in (*_PACKAGES, *more):
        try:
            recorded_versions[package] = version(package)
        except PackageNotFoundError:
            recorded_versions[package] = "absent"
    return recorded_versions


@dataclass(frozen=True)
class DeviceAndDtype:
    """The kind of device, ``cpu`` or ``cuda``, and the dtype that a model computes in."""

    device: str
    dtype: str

    @classmethod
    def from_record(cls, recorded: Mapping[str, object]) -> DeviceAndDtype:
        """Read ``device`` (``cuda:1``) and ``dtype`` from a record; '' if missing."""
        return cls(device_kind(str(recorded.get("device") or "")), str(recorded.get("dtype") or ""))


def device_kind(device: str) -> str:
    """Return ``cuda`` for ``cuda:1``: figures do not depend on which of several devices is used."""
    return device.partition(":")[0]


def arithmetic_version(recorded: Mapping[str, str]) -> str:
    """Return the version of this project's arithmetic in recorded versions; 1 if missing."""
    return recorded.get("arithmetic", "1")


def profile_dependencies(
    device_and_dtype: DeviceAndDtype, recorded: Mapping[str, str], packages: Sequence[str]
) -> dict[str, object]:
    """Return what a profile's scores depend on besides its settings, model and text.

    ``packages`` are those that its quantizer computes with. Releases of torch and transformers
    change scores only by rounding, far too little to affect plans, so profiles remain valid across
    them.
    """
    return {
        "device": device_and_dtype.device,
        "dtype": device_and_dtype.dtype,
        "arithmetic": arithmetic_version(recorded),
        "packages": {name: recorded.get(name, "absent") for name in packages},
    }


def run_dependencies(recorded: Mapping[str, str], packages: Sequence[str] = ()) -> dict[str, str]:
    """Return the recorded versions that a quantized model and its forward pass depend on.

    ``packages`` are those that its quantizer computes with.
    """
    recorded_versions = {name: recorded.get(name, "absent") for name in (*_FORWARD, *packages)}
    return recorded_versions | {"arithmetic": arithmetic_version(recorded)}


def evaluation_dependencies(recorded: Mapping[str, Any]) -> dict[str, object]:
    """Return what an evaluation depends on besides the model, the tokens and the protocol.

    ``recorded`` is the provenance stored with it. Figures with equal dependencies may be paired
    and need not be computed twice.
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
    """Return a description of a device: the GPU's name, or the processor and its threads."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} threads"


def now() -> datetime:
    """Return the current UTC time without a time zone, as stored in DuckDB's TIMESTAMP."""
    return datetime.now(UTC).replace(tzinfo=None)
