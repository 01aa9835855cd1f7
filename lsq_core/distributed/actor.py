"""What an actor does: it holds a model on its device, and works on it as it is told."""

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


class ModelActor(ABC):
    """Holds a model on one device. What goes wrong is returned, since not all can be pickled."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.node = setup, own_node()
        self.position = ActorProgress()

    def describe(self) -> Description | Failure:
        """Find the model here, fetching it where that is needed, and say what is here."""
        return self._try(self._describe)

    def measure(self, task: object, *inputs: object) -> object | Failure:
        """Do a task; ``inputs`` are what the driver gives to it by reference."""
        try:
            return self._try(lambda: self._measure_here(task, *inputs))
        finally:
            self.position = ActorProgress()

    def progress(self) -> ActorProgress:
        """How far the task is; asked for while it is done."""
        return self.position

    @abstractmethod
    def _measure(self, task: object, *inputs: object) -> object:
        """Do a task, or raise."""

    def _measure_here(self, task: object, *inputs: object) -> object:
        import torch

        if self.setup.device == "cpu":
            torch.set_num_threads(self.setup.cores)  # of this thread, which does the task
        return self._measure(task, *inputs)

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

    def _report(self, stage: str, done: int, total: int, message: str) -> None:
        """Note how far the task is: as far as its stage, unless a class knows better."""
        self.position = ActorProgress(stage, done / total if total else 0.0, message)

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


def check_calibration(named: str, identity: str) -> None:
    """Raise :class:`InputError` where a calibration text is another one on this node.

    ``identity`` is the text's own, as :func:`lsq_core.corpus.registry.corpus_identity` has it for
    the driver.
    """
    if corpus_identity(named) != identity:
        raise InputError(
            f"The calibration corpus {named} on {platform.node()} is not the driver's; copy it "
            "there."
        )
