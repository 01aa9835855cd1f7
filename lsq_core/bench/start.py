"""Start-up times: importing the library, and planning from a cold start.

Each is the time of an entire process.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from lsq_core import paths
from lsq_core.bench import Row, relative_half_range, time_call, time_interleaved
from lsq_core.errors import LsqError

#: Modules that must not import any of ``HEAVY``.
LIGHT = (
    "lsq_core",
    "lsq_core.planning.make",
    "lsq_core.store.store",
    "lsq_core.profiling.profile",
    "lsq_core.quantization.registry",
)
HEAVY = ("torch", "transformers", "streamlit")
#: Python arguments for the imports that one's own script would start with.
TRANSFORMERS = ("-c", "import torch, transformers; transformers.AutoModelForCausalLM")


def import_time(repeats: int) -> Row:
    """Time ``import lsq_core``; the error is the number of heavy packages imported by ``LIGHT``."""
    ours = _Process("-c", "import lsq_core")
    seconds = np.array([time_call(ours) for _ in range(repeats)])
    names = f"import sys, {', '.join(LIGHT)}; print(len(set({HEAVY}) & set(sys.modules)))"
    parts = {}
    for name in LIGHT:
        process = _Process("-c", f"import {name}")
        process()
        parts[f"{name}_processor_s"] = process.processor_s
    return Row(
        id="import",
        what="import of the library",
        ours="import lsq_core",
        ours_s=float(np.median(seconds)),
        noise=relative_half_range(seconds),
        processor_s=ours.processor_s,
        error=float(_Process("-c", names)()),
        error_limit=0.0,
        error_is="heavy packages imported",
        most_s=0.5,
        details=parts,
    )


def plan_cold(repeats: int) -> Row:
    """Time ``python -m lsq_core plan`` for a model whose profile is stored."""
    from lsq_core.model.source import ModelSource
    from lsq_core.profiling.settings import ProfileSettings
    from lsq_core.session import Session
    from lsq_core.store.store import Store

    settings = ProfileSettings("rtn", samples=4, block_tokens=64)
    plan_options = [
        "--method",
        "mxq",
        "--budget",
        "3.2bpp",
        "--profile-quantizer",
        settings.quantizer,
    ]
    plan_options += [
        "--samples",
        str(settings.samples),
        "--block-tokens",
        str(settings.block_tokens),
    ]
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "lsq.duckdb"
        bench = Session(ModelSource("demo"), Store(database), "cpu")
        profile = bench.profile(settings)
        command = [
            "-m",
            "lsq_core",
            "plan",
            "--model",
            "demo",
            "--db",
            str(database),
            *plan_options,
        ]
        ours, theirs = _Process(*command, "--json"), _Process(*TRANSFORMERS)
        pair = time_interleaved(ours, theirs, repeats)
    return Row(
        id="plan_cold",
        what="plan from a stored profile, entire process",
        ours="python -m lsq_core plan",
        theirs="import torch and transformers",
        **pair.figures,
        processor_s=ours.processor_s,
        most_s=1.5,
        details={"scores": len(profile.values), "settings": asdict(settings)},
    )


def libraries_import_s(repeats: int = 3) -> float:
    """Return the median processor seconds of a process that imports torch and transformers.

    It involves none of this project's code, so it indicates how fast a machine is.
    """
    process = _Process(*TRANSFORMERS)
    for _ in range(repeats):
        process()
    return process.processor_s


class _Process:
    """A Python command, run in this project's folder on each call."""

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments
        self.spent: list[float] = []

    def __call__(self) -> str:
        """Run the process and return its output.

        Raises
        ------
        LsqError
            If it fails.
        """
        before = _children_s()
        done = subprocess.run(
            [sys.executable, *self.arguments],
            cwd=paths.IMPORT_FOLDER,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        self.spent.append(_children_s() - before)
        if done.returncode:
            raise LsqError(f"python {' '.join(self.arguments)} failed: {done.stderr.strip()}")
        return done.stdout

    @property
    def processor_s(self) -> float:
        """Median processor time in seconds."""
        return float(np.median(self.spent))


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
