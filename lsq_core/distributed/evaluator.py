"""What an actor does: it holds a model on its device, and measures plans as it is told."""

from __future__ import annotations

import gc
import os
import platform
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lsq_core import paths
from lsq_core.corpus.registry import corpus_identity
from lsq_core.distributed.cluster import own_node
from lsq_core.distributed.messages import (
    ActorProgress,
    Description,
    Failure,
    Measured,
    PlannedRun,
    Setup,
    Task,
)
from lsq_core.errors import DeviceMemoryError, InputError, LsqError, exception_reason
from lsq_core.model.info import ModelInfo
from lsq_core.provenance import machine, versions
from lsq_core.session import Session
from lsq_core.stages.measure import measure_unsaved
from lsq_core.store.store import Store
from lsq_core.sweep_progress import stage_fraction

if TYPE_CHECKING:
    from lsq_core.corpus.tokens import TokenStream

T = TypeVar("T")


class _NoStore(Store):
    """The store of a session that keeps nothing: the driver alone writes its database.

    Full precision's hidden states are kept in its folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lsq.duckdb"

    def model(self, fingerprint: str) -> ModelInfo | None:
        """Nothing is known of any model."""
        return None

    def save_model(self, info: ModelInfo) -> None:
        """The driver has it."""


class Evaluator:
    """Measures plans on one device. What goes wrong is returned, since not all can be pickled."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.node = setup, own_node()
        self.position = ActorProgress()
        self._size, self._quantized = 1, 0

    def describe(self) -> Description | Failure:
        """Find the model here, fetching it where that is needed, and say what is here."""
        return self._try(self._describe)

    def measure(self, task: Task, stream: TokenStream) -> Measured | Failure:
        """Quantize and evaluate plans on a text, of which the driver gives the tokens."""
        try:
            return self._try(lambda: self._measure(task, stream))
        finally:
            self.position = ActorProgress()

    def progress(self) -> ActorProgress:
        """How far the task is; asked for while it is done."""
        return self.position

    def _open(self) -> Session:
        """The session that measures here."""
        setup, same_node = self.setup, self.setup.folders.node == self.node
        folder = setup.folders.data if same_node else paths.data_folder()
        session = Session(setup.source, _NoStore(folder), setup.device, setup.dtype, self._report)
        session.checkpoint_folder = setup.folders.checkpoint if same_node else None
        session.cache_bytes = setup.cache_bytes
        return session

    def _describe(self) -> Description:
        self.session = session = self._open()
        where = session.device_and_dtype
        return Description(
            node=self.node,
            host=platform.node(),
            pid=os.getpid(),
            device_name=_device_name(where["device"]),
            where=where | {"machine": machine(where["device"])},
            fingerprint=session.info.fingerprint,
            versions=versions(*self.setup.packages),
            fits=session.fits_in_memory(),
        )

    def _measure(self, task: Task, stream: TokenStream) -> Measured:
        import torch

        session = self.session
        if self.setup.device == "cpu":
            torch.set_num_threads(self.setup.cores)  # of this thread, which evaluates
        # What comes from the object store cannot be written, of which torch would warn.
        session.provide_stream(task.evaluation, replace(stream, ids=stream.ids.copy()))
        planned = sum(one.plan.planned_bytes for one in task.runs)
        prepare = session.quantize if session.fits_in_memory(planned) else session.quantize_streamed
        self._size, self._quantized, made = len(task.runs), 0, []
        for one in task.runs:
            _check_calibration(one)
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

    def _try(self, step: Callable[[], T]) -> T | Failure:
        try:
            return step()
        except LsqError as error:
            failure = _failure(error)
        except Exception as error:
            reason = f"{type(error).__name__}: {exception_reason(error)} (see the log)"
            failure = Failure(platform.node(), "other", reason, traceback.format_exc())
        self._free_memory()  # which the exception's frames held until now
        return failure

    def _free_memory(self) -> None:
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _failure(error: LsqError) -> Failure:
    kinds = {InputError: "input", DeviceMemoryError: "memory"}
    kind = next((name for own, name in kinds.items() if isinstance(error, own)), "other")
    return Failure(platform.node(), kind, str(error))


def _device_name(device: str) -> str:
    """A device as this node numbers it: Ray hides all GPUs but one of an actor."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    return f"GPU {visible}" if device.startswith("cuda") else "CPU"


def _check_calibration(one: PlannedRun) -> None:
    """Raise :class:`InputError` where a plan's calibration text is another one on this node."""
    named = one.plan.calibration or {}
    if "corpus" in named and corpus_identity(named["calibration"]) != named["corpus"]:
        raise InputError(
            f"The calibration corpus {named['calibration']} on {platform.node()} is not the "
            "driver's; copy it there."
        )
