"""The progress of plans that are evaluated together, as a part of a sweep's."""

from __future__ import annotations

from dataclasses import dataclass

from lsq_core.progress import ProgressCallback

#: Steps by which an item's progress is reported.
_PROGRESS_STEPS = 1000


@dataclass
class BatchProgress:
    """Tells the progress of items that are made together as a part of the sweep's.

    ``before`` of the ``total`` items were made before them; ``number`` and ``title`` are those of
    the item that is finished next.
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
        """Forward the progress of one stage as progress of the sweep."""
        part = done / total if total else 0.0
        if stage == "quantize":
            part = (self.quantized + part) / self.plans
        self.reached = max(self.reached, _stage_fraction(stage, part))
        at = int(_PROGRESS_STEPS * (self.before + self.reached * self.size))
        number = self.number or self.before + 1
        more = self.before + self.size - number
        title = f"{self.title} and {more} more" if more else self.title
        self.outer(
            "sweep",
            at,
            _PROGRESS_STEPS * self.total,
            f"{number} of {self.total}: {title} · {message}",
        )


def _stage_fraction(stage: str, done: float) -> float:
    """The fraction of a batch that is done, by stage; quantizing is short compared with
    evaluating.
    """
    shares = {"quantize": 0.05 * done, "evaluate": 0.05 + 0.95 * done}
    return shares.get(stage, 0.0)
