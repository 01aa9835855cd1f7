"""Figures of an evaluation: sums per window, and the KL divergence of each token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lsq_core.evaluation.divergence import summarize_divergence
from lsq_core.evaluation.result import Evaluation
from lsq_core.files import DamagedFileError, read_arrays, write_arrays

#: Figures that are summed per window.
_SUMMED = ("nll", "seconds", "kl", "agreed", "squared_change")


class WindowSums:
    """One model's figures, summed over the scored tokens of each window (windows,).

    ``scored`` is the number of these tokens in each window.
    """

    def __init__(self, scored: Sequence[int]) -> None:
        self.working_bytes: int | None = None
        self.counts = np.zeros(len(scored), dtype=np.int64)
        self.sums = {name: np.zeros(len(scored)) for name in _SUMMED}
        self.ends = np.cumsum(scored)
        #: KL divergence of each scored token, window by window.
        self.token_kl = np.zeros(self.ends[-1], dtype=np.float32)

    def record(self, window: int, figures: dict[str, np.ndarray]) -> None:
        """Set the figures (scored,) of one window."""
        scored = len(figures["nll"])
        self.counts[window] = scored
        for name, values in figures.items():
            self.sums[name][window] = values.sum()
        if "kl" in figures:
            end = self.ends[window]
            self.token_kl[end - scored : end] = figures["kl"]

    def record_working_bytes(self, taken: int | None) -> None:
        """Record a peak of GPU memory, in bytes."""
        if taken is not None:
            self.working_bytes = max(taken, self.working_bytes or 0)

    @property
    def state(self) -> dict[str, np.ndarray]:
        """All arrays to checkpoint, by name."""
        return {"counts": self.counts, "token_kl": self.token_kl} | self.sums

    def restore(self, saved: dict[str, np.ndarray]) -> None:
        """Restore a checkpointed state."""
        self.counts, self.token_kl = saved["counts"], saved["token_kl"]
        self.sums = {name: saved[name] for name in self.sums}

    def finish(self, protocol: str, compared: bool = False) -> Evaluation:
        """Return the evaluation; KL divergence and agreement only if it was compared."""
        tokens, divergence = self.counts.sum(), None
        if compared:
            squared_change = self.sums["squared_change"]
            divergence = summarize_divergence(self.token_kl, squared_change, self.counts)
        return Evaluation(
            protocol=protocol,
            nll=self.sums["nll"],
            counts=self.counts,
            seconds=float(self.sums["seconds"].sum()),
            working_bytes=self.working_bytes,
            kl=float(self.sums["kl"].sum() / tokens) if compared else None,
            top1=float(self.sums["agreed"].sum() / tokens) if compared else None,
            divergence=divergence,
        )


class Checkpoint:
    """A file with the sums so far, replaced atomically so that a killed process leaves it intact.

    A window is complete if its count is not zero.
    """

    def __init__(self, path: Path | None, model_totals: tuple[WindowSums, ...]) -> None:
        self.path, self.model_totals = path, model_totals
        #: Why the file could not be restored, '' if it could.
        self.damage = ""

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of all sums, by name and model number."""
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
