"""An actor: holds a model on its device and carries out the driver's tasks on it."""

from __future__ import annotations

import gc
import os
import platform
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lsq_core import paths
from lsq_core.corpus.registry import corpus_identity
from lsq_core.distributed.cluster import own_node
from lsq_core.distributed.messages import ActorProgress, Description, Failure, Setup
from lsq_core.errors import DeviceMemoryError, InputError, LsqError, exception_reason
from lsq_core.model.info import ModelInfo
from lsq_core.provenance import machine, versions
from lsq_core.session import Session
from lsq_core.store.store import Store

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


class ModelActor(ABC):
    """Holds a model on one device. Errors are returned, since not all exceptions can be pickled."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.node = setup, own_node()
        self.position = ActorProgress()

    def describe(self) -> Description | Failure:
        """Open the model on this node, downloading it if necessary, and describe the actor."""
        return self._try(self._describe)

    def measure(self, task: object, *inputs: object) -> object | Failure:
        """Do a task; ``inputs`` are the arguments that the driver passes by reference."""
        try:
            return self._try(lambda: self._measure_here(task, *inputs))
        finally:
            self.position = ActorProgress()

    def progress(self) -> ActorProgress:
        """Return the progress of the current task; called while it runs."""
        return self.position

    @abstractmethod
    def _measure(self, task: object, *inputs: object) -> object:
        """Do a task and return its result."""

    def _measure_here(self, task: object, *inputs: object) -> object:
        import torch

        if self.setup.device == "cpu":
            torch.set_num_threads(self.setup.cores)  # set in the thread that runs the task
        return self._measure(task, *inputs)

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
        """Record the progress of the task, by default that of its stage."""
        self.position = ActorProgress(stage, done / total if total else 0.0, message)

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


def check_calibration(named: str, identity: str) -> None:
    """Raise :class:`InputError` if a calibration text on this node differs from the driver's.

    ``identity`` is :func:`lsq_core.corpus.registry.corpus_identity` of the text on the driver.
    """
    if corpus_identity(named) != identity:
        raise InputError(
            f"The calibration corpus {named} on {platform.node()} is not the driver's; copy it "
            "there."
        )
