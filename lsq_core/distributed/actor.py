"""An actor: holds a model on one device, and evaluates plans or measures metrics with it."""

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
    EvaluationTask,
    Failure,
    Measured,
    ProfileTask,
    Setup,
)
from lsq_core.errors import DeviceMemoryError, InputError, LsqError, exception_reason
from lsq_core.model.info import ModelInfo
from lsq_core.provenance import machine, versions
from lsq_core.session import Session
from lsq_core.stages.measure import measure_unsaved
from lsq_core.stages.profile import measure_metrics
from lsq_core.store.store import Store
from lsq_core.sweep_progress import stage_fraction

if TYPE_CHECKING:
    from lsq_core.corpus.tokens import TokenStream
    from lsq_core.profiling.profile import Profile

T = TypeVar("T")


class _NoStore(Store):
    """A store without a database, since only the driver writes to one.

    Its folder is used for the hidden states of full precision.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lsq.duckdb"

    def model(self, fingerprint: str) -> ModelInfo | None:
        """Return None: no models are stored."""
        return None

    def save_model(self, info: ModelInfo) -> None:
        """Do nothing: the driver stores the model."""


class ModelActor:
    """Holds a model on one device.

    Errors are returned as a :class:`Failure`, because not all of them can be pickled.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup, self.node = setup, own_node()
        self.position = ActorProgress()
        #: Plans of the current task, and how many of them are quantized; 0 while profiling.
        self._plans = self._quantized = 0

    def describe(self) -> Description | Failure:
        """Find the model on this node, downloading it if necessary, and describe the node."""
        return self._try(self._describe)

    def evaluate(self, task: EvaluationTask, stream: TokenStream) -> Measured | Failure:
        """Quantize and evaluate plans on a text, whose tokens the driver provides."""
        return self._work(lambda: self._evaluate(task, stream))

    def profile(self, task: ProfileTask) -> Profile | Failure:
        """Measure metrics on some layers."""
        return self._work(lambda: self._profile(task))

    def progress(self) -> ActorProgress:
        """Return the progress of the current task; called while the task runs."""
        return self.position

    def _work(self, step: Callable[[], T]) -> T | Failure:
        def work() -> T:
            import torch

            if self.setup.device == "cpu":
                torch.set_num_threads(self.setup.cores)  # a setting of this thread
            return step()

        try:
            return self._try(work)
        finally:
            self.position, self._plans = ActorProgress(), 0

    def _evaluate(self, task: EvaluationTask, stream: TokenStream) -> Measured:
        session = self.session
        # Arrays from the object store are read-only, which torch would warn about.
        session.provide_stream(task.evaluation, replace(stream, ids=stream.ids.copy()))
        planned = sum(one.plan.planned_bytes for one in task.runs)
        prepare = session.quantize if session.fits_in_memory(planned) else session.quantize_streamed
        self._plans, self._quantized, made = len(task.runs), 0, []
        for one in task.runs:
            named = one.plan.calibration or {}
            if "corpus" in named:
                _check_calibration(named["calibration"], named["corpus"])
            settings = self.setup.settings
            made.append(prepare(one.plan, one.quantizer, run=one.run, settings=settings))
            self._quantized += 1
        [measured] = measure_unsaved(session, made, [task.evaluation])
        return tuple(measured)

    def _profile(self, task: ProfileTask) -> Profile:
        _check_calibration(task.settings.calibration, task.corpus)
        return measure_metrics(
            self.session, task.settings, task.profile, task.metrics, "profile", task.layers
        )

    def _open(self) -> Session:
        """Return the session that measures on this node."""
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

    def _report(self, stage: str, done: int, total: int, message: str) -> None:
        fraction = done / total if total else 0.0
        if self._plans:
            if stage == "quantize":
                fraction = (self._quantized + fraction) / self._plans
            fraction = max(self.position.fraction, stage_fraction(stage, fraction))
        self.position = ActorProgress(stage, fraction, message)

    def _try(self, step: Callable[[], T]) -> T | Failure:
        try:
            return step()
        except LsqError as error:
            failure = _failure(error)
        except Exception as error:
            reason = f"{type(error).__name__}: {exception_reason(error)} (see the log)"
            failure = Failure(platform.node(), "other", reason, traceback.format_exc())
        self._free_memory()  # held by the exception's frames until now
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
    """Return the device with its number on this node: Ray shows an actor only its own GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    return f"GPU {visible}" if device.startswith("cuda") else "CPU"


def _check_calibration(named: str, identity: str) -> None:
    """Raise :class:`InputError` if a calibration text on this node differs from the driver's.

    ``identity`` is :func:`lsq_core.corpus.registry.corpus_identity` of the text on the driver.
    """
    if corpus_identity(named) != identity:
        raise InputError(
            f"The calibration corpus {named} on {platform.node()} is not the driver's; copy it "
            "there."
        )
