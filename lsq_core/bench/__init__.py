"""Benchmarks against the packages in use today: times, and the error of the result.

Each row is a function in a module here and an entry in ``ROWS``. It measures ours and theirs
alternately in one process, so that a slowdown of the machine affects both. "Theirs" is the
unmodified public call with the same threads, dtype and device, after a warm-up. Importing this
package does not import torch.
"""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

import numpy as np

from lsq_core.errors import InputError, LsqError, choose
from lsq_core.jsontext import write_json
from lsq_core.provenance import machine, versions

#: The function that measures each row, in the order of the table.
ROWS = {
    "solver_cpu": "lsq_core.bench.solver:compiled",
    "solver_cpu_eager": "lsq_core.bench.solver:eager",
    "solver_gpu": "lsq_core.bench.solver:gpu",
    "profile": "lsq_core.bench.profile:profile",
    "perplexity": "lsq_core.bench.perplexity:perplexity",
    "replan10": "lsq_core.bench.replan:replan10",
    "sweep12": "lsq_core.bench.replan:sweep12",
    "packed_forward": "lsq_core.bench.packed:forward",
    "evaluate_gpu": "lsq_core.bench.gpu:evaluate",
    "profile_gpu": "lsq_core.bench.gpu:profile",
    "packed_forward_gpu": "lsq_core.bench.packed:forward_gpu",
    "import": "lsq_core.bench.start:import_time",
    "plan_cold": "lsq_core.bench.start:plan_cold",
    "frontier": "lsq_core.bench.frontier:frontier",
}
#: Rows that measure the model given by ``--model``; ratios are recorded for the demo model only.
MODEL_ROWS = ("sweep12", "evaluate_gpu", "profile_gpu")
DEFAULT_MODEL = "demo"
#: Why a row that needs a GPU has no figures.
NO_GPU = "needs a GPU, and there is none on this machine"
#: Number of measurements of each side.
REPEATS = 5
#: File of recorded ratios, each the smallest of its repeats, with the machine.
RECORDED = Path(__file__).with_name("recorded.json")
#: Smallest share of a recorded ratio that is not a regression.
MIN_RATIO_SHARE = 0.8


@dataclass(frozen=True)
class Row:
    """One measured comparison.

    Parameters
    ----------
    ours_s, theirs_s
        Medians in seconds. Without a counterpart, ``theirs_s`` and ``ratio`` are None.
    ratio
        Median over the repeats of theirs / ours, each pair measured back to back: how many times
        faster ours is.
    noise
        Half the range of those ratios (without a counterpart, of our times) over their median.
    least
        The smallest of those ratios.
    processor_s
        Our median processor time, for rows whose wall-clock time depends on other load.
    error, error_limit
        The difference between ours and theirs, as described by ``error_is``, and its limit; None
        without a result.
    target, most_s
        The target ratio, and the limit of ``ours_s``.
    reason
        Why the row was not measured, such as a missing GPU; it has no figures then.
    """

    id: str
    what: str
    ours: str = ""
    theirs: str = ""
    ours_s: float | None = None
    theirs_s: float | None = None
    ratio: float | None = None
    noise: float | None = None
    least: float | None = None
    processor_s: float | None = None
    error: float | None = None
    error_limit: float | None = None
    error_is: str = ""
    target: float | None = None
    most_s: float | None = None
    device: str = "cpu"
    reason: str = ""
    details: dict = field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        """Whether the error exceeds its limit or is NaN."""
        return self.error is not None and not self.error <= self.error_limit

    @property
    def missed(self) -> bool:
        """Whether the row was measured and missed its target or limit."""
        if self.ours_s is None:
            return False
        slow = self.target is not None and self.ratio < self.target
        return slow or (self.most_s is not None and self.ours_s > self.most_s)


@dataclass(frozen=True)
class Pair:
    """Our and their times in seconds, (repeats,) each, measured alternately."""

    ours: np.ndarray
    theirs: np.ndarray

    @property
    def figures(self) -> dict[str, float]:
        """The fields of a :class:`Row` computed from these times."""
        ratios = self.theirs / self.ours
        return {
            "ours_s": float(np.median(self.ours)),
            "theirs_s": float(np.median(self.theirs)),
            "ratio": float(np.median(ratios)),
            "noise": relative_half_range(ratios),
            "least": float(ratios.min()),
        }


def relative_half_range(values: np.ndarray) -> float:
    """Return half the range of values (n,) over their median."""
    return float(np.ptp(values) / 2 / np.median(values))


def time_interleaved(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    repeats: int = REPEATS,
    *,
    warm: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Pair:
    """Time two calls alternately, after ``warm`` untimed calls of each.

    ``wait`` returns once the device has finished its work.
    """
    for _ in range(warm):
        ours(), theirs()
    wait()
    seconds = [(time_call(ours, wait), time_call(theirs, wait)) for _ in range(repeats)]
    return Pair(*np.array(seconds).T)


def time_call(call: Callable[[], object], wait: Callable[[], None] = lambda: None) -> float:
    """Measure the wall-clock seconds of a call, without garbage collection during it."""
    gc.collect()
    gc.disable()
    try:
        start_time = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - start_time
    finally:
        gc.enable()


def measure(
    ids: Sequence[str] = (),
    repeats: int = REPEATS,
    progress: Callable[[int, int, str], None] = lambda done, total, message: None,
    model: str = DEFAULT_MODEL,
) -> list[Row]:
    """Measure the given rows, or all of them, in the order of ``ROWS``.

    ``model`` is the model for ``MODEL_ROWS``.

    Raises
    ------
    InputError
        If there is no such row, or ``repeats`` is less than 1.
    """
    if repeats < 1:
        raise InputError("--repeats must be at least 1.")
    for id in ids:
        choose(ROWS, id, "a benchmark")
    wanted = [id for id in ROWS if not ids or id in ids]
    rows = []
    for done, id in enumerate(wanted):
        progress(done, len(wanted), id)
        module, _, function = ROWS[id].partition(":")
        options = {"model": model} if id in MODEL_ROWS else {}
        rows.append(getattr(import_module(module), function)(repeats, **options))
    progress(len(wanted), len(wanted), "measured")
    return rows


def to_json(rows: Sequence[Row]) -> dict:
    """Return the rows and the environment they were measured in."""
    return {
        "rows": [asdict(row) | {"missed": row.missed, "wrong": row.wrong} for row in rows],
    } | environment()


def environment() -> dict:
    """Describe the machine, its GPU if it has one, the threads and the package versions."""
    import torch

    gpu = {"gpu": machine("cuda")} if torch.cuda.is_available() else {}
    return {
        "machine": machine("cpu"),
        "processor": _processor(),
        **gpu,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _processor() -> str:
    """Return the processor's model name, if the system provides it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def record(rows: Sequence[Row]) -> None:
    """Record the smallest ratio of each of these rows, replacing earlier ones.

    Raises
    ------
    InputError
        If a row was measured on a model other than the demo.
    LsqError
        If an error exceeds its limit.
    """
    other = [row.id for row in rows if row.details.get("model", DEFAULT_MODEL) != DEFAULT_MODEL]
    if other:
        raise InputError(f"The ratio of {other[0]} is recorded for the demo model alone.")
    wrong = [row.id for row in rows if row.wrong]
    if wrong:
        raise LsqError(f"Nothing was recorded: the error of {', '.join(wrong)} exceeds its limit.")
    entries = _recorded()
    for row in rows:
        if row.least is not None:
            entries[row.id] = {"ratio": row.least} | environment()
    write_json(RECORDED, entries)


def recorded() -> dict[str, float]:
    """Return the recorded ratios by row."""
    return {id: entry["ratio"] for id, entry in _recorded().items()}


def _recorded() -> dict[str, dict]:
    return json.loads(RECORDED.read_text("utf8")) if RECORDED.is_file() else {}
