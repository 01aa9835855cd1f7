"""An actor that quantizes and evaluates plans."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lsq_core.distributed.actor import ModelActor, check_calibration
from lsq_core.distributed.messages import ActorProgress, Measured, Setup, Task
from lsq_core.stages.measure import measure_unsaved
from lsq_core.sweep_progress import stage_fraction

if TYPE_CHECKING:
    from lsq_core.corpus.tokens import TokenStream


class Evaluator(ModelActor):
    """Measures plans on a text whose tokens the driver provides."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._size, self._quantized = 1, 0

    def _measure(self, task: Task, stream: TokenStream) -> Measured:
        session = self.session
        # Arrays from the object store are read-only, which torch would warn about.
        session.provide_stream(task.evaluation, replace(stream, ids=stream.ids.copy()))
        planned = sum(one.plan.planned_bytes for one in task.runs)
        prepare = session.quantize if session.fits_in_memory(planned) else session.quantize_streamed
        self._size, self._quantized, made = len(task.runs), 0, []
        for one in task.runs:
            named = one.plan.calibration or {}
            if "corpus" in named:
                check_calibration(named["calibration"], named["corpus"])
            settings = self.setup.settings
            made.append(prepare(one.plan, one.quantizer, run=one.run, settings=settings))
            self._quantized += 1
        [measured] = measure_unsaved(session, made, [task.evaluation])
        return tuple(measured)

    def _report(self, stage: str, done: int, total: int, message: str) -> None:
        part = done / total if total else 0.0
        if stage == "quantize":
            part = (self._quantized + part) / self._size
        fraction = max(self.position.fraction, stage_fraction(stage, part))
        self.position = ActorProgress(stage, fraction, message)
