"""Progress of plans that are evaluated together, as part of a sweep's progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lsq_core.progress import PROGRESS_STEPS, ProgressCallback


@dataclass
class BatchProgress:
    """Reports the progress of a batch of items as part of the sweep's progress.

    ``before`` of the ``total`` items were made before the batch; ``number`` and ``title`` are those
    of the next item to finish.
    """

    outer: ProgressCallback
    before: int
    size: int
    plans: int
    total: int
    number: int = 0
    title: str = ""
    quantized: int = 0
    reached: float = 0.0

    def report(self, stage: str, done: int, total: int, message: str) -> None:
        """Report the progress of one stage as progress of the sweep."""
        part = done / total if total else 0.0
        if stage == "quantize":
            part = (self.quantized + part) / self.plans
        self.reached = max(self.reached, stage_fraction(stage, part))
        at = int(PROGRESS_STEPS * (self.before + self.reached * self.size))
        number = self.number or self.before + 1
        more = self.before + self.size - number
        title = f"{self.title} and {more} more" if more else self.title
        self.outer(
            "sweep",
            at,
            PROGRESS_STEPS * self.total,
            f"{number} of {self.total}: {title} · {message}",
        )


def stage_fraction(stage: str, done: float) -> float:
    """Return the done fraction of a batch, given the fraction ``done`` of a stage.

    Quantizing is short compared with evaluating.
    """
    shares = {"quantize": 0.05 * done, "evaluate": 0.05 + 0.95 * done}
    return shares.get(stage, 0.0)


def describe_counts(rows: Sequence[dict]) -> str:
    """Count the items made, found and failed: ``9 new, 3 reused (2 shipped), 0 failed``."""
    states = [row["state"] for row in rows]
    shipped = sum(bool(row.get("shipped")) for row in rows)
    which = f" ({shipped} shipped)" if shipped else ""
    return (
        f"{states.count('done')} new, {states.count('found')} reused{which}, "
        f"{states.count('failed')} failed"
    )
