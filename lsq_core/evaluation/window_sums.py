"""Sums by window of an evaluation: negative log-likelihood, KL divergence, agreement."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lsq_core.evaluation.result import Evaluation
from lsq_core.files import DamagedFileError, read_arrays, write_arrays


class WindowSums:
    """One model's figures, summed over the scored tokens of each window (windows,)."""

    def __init__(self, windows: int) -> None:
        self.working_bytes: int | None = None
        self.counts = np.zeros(windows, dtype=np.int64)
        self.sums = {name: np.zeros(windows) for name in ("nll", "seconds", "kl", "agreed")}

    def record(self, window: int, scored: int, figures: dict[str, float]) -> None:
        """Set the figures of one window."""
        self.counts[window] = scored
        for name, value in figures.items():
            self.sums[name][window] = value

    def record_working_bytes(self, taken: int | None) -> None:
        """Record a peak of GPU memory, in bytes."""
        if taken is not None:
            self.working_bytes = max(taken, self.working_bytes or 0)

    @property
    def state(self) -> dict[str, np.ndarray]:
        """All arrays by name, to checkpoint."""
        return {"counts": self.counts} | self.sums

    def restore(self, saved: dict[str, np.ndarray]) -> None:
        """Restore a checkpointed state."""
        self.counts = saved["counts"]
        self.sums = {name: saved[name] for name in self.sums}

    def finish(self, protocol: str, compared: bool = False) -> Evaluation:
        """Return the evaluation; KL divergence and agreement only if it was compared."""
        tokens = self.counts.sum()
        return Evaluation(
            protocol=protocol,
            nll=self.sums["nll"],
            counts=self.counts,
            seconds=float(self.sums["seconds"].sum()),
            working_bytes=self.working_bytes,
            kl=float(self.sums["kl"].sum() / tokens) if compared else None,
            top1=float(self.sums["agreed"].sum() / tokens) if compared else None,
        )


class Checkpoint:
    """A file of the sums so far, replaced atomically so that a killed process leaves it intact.

    A window is complete if its count is not zero.
    """

    def __init__(self, path: Path | None, model_totals: tuple[WindowSums, ...]) -> None:
        self.path, self.model_totals = path, model_totals
        #: Why the file could not be restored, an empty string if it could.
        self.damage = ""

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of all sums, by name and number."""
        return {
            f"{name}_{number}": array
            for number, totals in enumerate(self.model_totals)
            for name, array in totals.state.items()
        }

    def restore(self) -> None:
        """Restore the sums from the file, if it exists; a damaged file is deleted."""
        if self.path is None:
            return
        try:
            saved = read_arrays(self.path, self.arrays)
        except DamagedFileError as error:
            self.damage = str(error)
            self.path.unlink(missing_ok=True)
            return
        for number, totals in enumerate(self.model_totals if saved else ()):
            totals.restore({name: saved[f"{name}_{number}"] for name in totals.state})

    def save(self) -> None:
        """Write the file, if there is one."""
        if self.path is not None:
            write_arrays(self.path, self.arrays)
