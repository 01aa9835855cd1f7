"""How fast it is, beside what people use today, with the error beside the time.

Each row is one function in a file here and one entry in ``ROWS``. It measures ours and theirs in
turns, in one process, so that a machine that slows down slows both. "Theirs" is the unmodified
public call with the same threads, dtype and device, warm. Importing this package imports no torch.
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

from lsq_core.errors import InputError, LsqError
from lsq_core.jsontext import write_json
from lsq_core.provenance import machine, versions

#: Where each row is measured, in the order of the table.
ROWS = {
    "solver_cpu": "lsq_core.bench.solver:compiled",
    "solver_cpu_eager": "lsq_core.bench.solver:eager",
    "solver_gpu": "lsq_core.bench.solver:gpu",
    "profile": "lsq_core.bench.profile:profile",
    "perplexity": "lsq_core.bench.perplexity:perplexity",
    "replan10": "lsq_core.bench.replan:replan10",
    "packed_forward": "lsq_core.bench.packed:forward",
    "import": "lsq_core.bench.start:import_time",
    "plan_cold": "lsq_core.bench.start:plan_cold",
    "frontier": "lsq_core.bench.frontier:frontier",
}
#: Times that each side is measured.
REPEATS = 5
#: Ratios as they were recorded, each with the machine: the least of its repeats.
RECORDED = Path(__file__).with_name("recorded.json")
#: The least share of a recorded ratio that a machine may fall to before it counts as slower.
MIN_RATIO_SHARE = 0.8


@dataclass(frozen=True)
class Row:
    """One measured comparison.

    Parameters
    ----------
    ours_s, theirs_s
        Medians in seconds; ``theirs_s`` is None where nothing is there to compare with, and then
        ``ratio`` is None and ``most_s`` says what it may take.
    ratio
        Median over the repeats of theirs / ours, each pair measured back to back; how many times
        faster ours is.
    noise
        Half the range of those ratios (of our times where there are none), over the median.
    least
        The least of those ratios.
    processor_s
        Median processor time of ours, where a neighbour on the machine would decide the clock's.
    error, error_limit
        How far ours is from theirs, in what ``error_is`` says; None where both do the same work.
    target
        The ratio that was aimed at.
    reason
        Why it was not measured, where it wasn't: no GPU, say. Then there are no figures.
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
        """Whether the error is beyond its limit (or not a number)."""
        return self.error is not None and not self.error <= self.error_limit

    @property
    def missed(self) -> bool:
        """Whether it was measured and a target was missed."""
        if self.ours_s is None:
            return False
        slow = self.target is not None and self.ratio < self.target
        return slow or (self.most_s is not None and self.ours_s > self.most_s)


@dataclass(frozen=True)
class Pair:
    """Seconds of ours and of theirs, (repeats,) each, measured in turns."""

    ours: np.ndarray
    theirs: np.ndarray

    @property
    def figures(self) -> dict[str, float]:
        """The fields of a :class:`Row` that these times give."""
        ratios = self.theirs / self.ours
        return {
            "ours_s": float(np.median(self.ours)),
            "theirs_s": float(np.median(self.theirs)),
            "ratio": float(np.median(ratios)),
            "noise": relative_half_range(ratios),
            "least": float(ratios.min()),
        }


def relative_half_range(values: np.ndarray) -> float:
    """Half the range of (n,) over their median."""
    return float(np.ptp(values) / 2 / np.median(values))


def time_interleaved(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    repeats: int = REPEATS,
    *,
    warm: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Pair:
    """Time two calls in turns; ``wait`` returns when a device has finished what it was given.

    Each is called ``warm`` times before it counts.
    """
    for _ in range(warm):
        ours(), theirs()
    wait()
    seconds = [(time_call(ours, wait), time_call(theirs, wait)) for _ in range(repeats)]
    return Pair(*np.array(seconds).T)


def time_call(call: Callable[[], object], wait: Callable[[], None] = lambda: None) -> float:
    """Seconds of the clock that a call takes, garbage collected before and not meanwhile."""
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
) -> list[Row]:
    """Measure these rows, or all of them, in the order of ``ROWS``.

    Raises
    ------
    InputError
        When there is no such row, or nothing to repeat.
    """
    if repeats < 1:
        raise InputError("--repeats must be at least 1.")
    unknown = [id for id in ids if id not in ROWS]
    if unknown:
        raise InputError(f"'{unknown[0]}' is not a benchmark; choose one of {', '.join(ROWS)}.")
    wanted = [id for id in ROWS if not ids or id in ids]
    rows = []
    for done, id in enumerate(wanted):
        progress(done, len(wanted), id)
        module, _, function = ROWS[id].partition(":")
        rows.append(getattr(import_module(module), function)(repeats))
    progress(len(wanted), len(wanted), "measured")
    return rows


def to_json(rows: Sequence[Row]) -> dict:
    """The rows with where and by what they were measured."""
    return {
        "rows": [asdict(row) | {"missed": row.missed, "wrong": row.wrong} for row in rows],
    } | environment()


def environment() -> dict:
    """The machine with its GPU, where there is one, the threads, and the versions."""
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
    """The processor's own name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def record(rows: Sequence[Row]) -> None:
    """Keep the ratios of these rows, the least of the repeats, in the place of earlier ones.

    Raises
    ------
    LsqError
        When an error is beyond its limit: faster and different is no gain.
    """
    wrong = [row.id for row in rows if row.wrong]
    if wrong:
        raise LsqError(f"Nothing was recorded: the error of {', '.join(wrong)} exceeds its limit.")
    entries = _recorded()
    for row in rows:
        if row.least is not None:
            entries[row.id] = {"ratio": row.least} | environment()
    write_json(RECORDED, entries)


def recorded() -> dict[str, float]:
    """Ratio by id as recorded; a row that was never recorded has none."""
    return {id: entry["ratio"] for id, entry in _recorded().items()}


def _recorded() -> dict[str, dict]:
    return json.loads(RECORDED.read_text("utf8")) if RECORDED.is_file() else {}
