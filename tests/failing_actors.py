"""Actors on Ray that fail in the ways that tests need; actors import this module."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import TYPE_CHECKING

from lsq_core.distributed.actor import ModelActor
from lsq_core.errors import DeviceMemoryError

if TYPE_CHECKING:
    from lsq_core.corpus.tokens import TokenStream
    from lsq_core.distributed.messages import Description, EvaluationTask, Measured, ProfileTask
    from lsq_core.profiling.profile import Profile


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KilledOnce(ModelActor):
    """Is killed in the first task that any of them has; a file in the driver's folder says so."""

    def _evaluate(self, task: EvaluationTask, stream: TokenStream) -> Measured:
        killed = self.setup.folders.data / "killed"
        if not killed.exists():
            killed.touch()
            kill_itself()
        return super()._evaluate(task, stream)


class ProfilerKilledOnce(ModelActor):
    """Is killed in the first task on some layers; a file in the driver's folder says so."""

    def _profile(self, task: ProfileTask) -> Profile:
        killed = self.setup.folders.data / "killed"
        if task.layers is not None and not killed.exists():
            killed.touch()
            kill_itself()
        return super()._profile(task)


class KilledByLayer(ModelActor):
    """Is killed by each task that the second layer is in; counts how often."""

    def _profile(self, task: ProfileTask) -> Profile:
        if task.layers is not None and 1 in task.layers:
            with (self.setup.folders.data / "killed").open("a") as file:
                file.write("killed\n")
            kill_itself()
        return super()._profile(task)


class KilledByPlan(ModelActor):
    """Is killed by each plan of MXQ for 2.6 bits; counts how often in the driver's folder."""

    def _evaluate(self, task: EvaluationTask, stream: TokenStream) -> Measured:
        requests = [one.plan.request for one in task.runs]
        if any((one.method, one.budget) == ("mxq", "2.6bpp") for one in requests):
            with (self.setup.folders.data / "killed").open("a") as file:
                file.write(f"{len(requests)}\n")
            kill_itself()
        return super()._evaluate(task, stream)


class OnePlanAtATime(ModelActor):
    """Has memory for one plan."""

    def _evaluate(self, task: EvaluationTask, stream: TokenStream) -> Measured:
        with (self.setup.folders.data / "sizes").open("a") as file:
            file.write(f"{len(task.runs)}\n")
        if len(task.runs) > 1:
            raise DeviceMemoryError("cpu ran out of memory.")
        return super()._evaluate(task, stream)


class NoMemory(ModelActor):
    """Has memory for no plan."""

    def _evaluate(self, task: EvaluationTask, stream: TokenStream) -> Measured:
        raise DeviceMemoryError("cpu ran out of memory.")


class OlderTorch(ModelActor):
    """Has another torch."""

    def _describe(self) -> Description:
        own = super()._describe()
        return replace(own, host="node-b", versions=own.versions | {"torch": "2.0.0"})


class OtherModel(ModelActor):
    """Has another model under the same name."""

    def _describe(self) -> Description:
        return replace(super()._describe(), host="node-b", fingerprint="0" * 16)


class NoPackage(ModelActor):
    """Cannot be made, as where the project is not installed."""

    def __init__(self, setup: object) -> None:
        raise ModuleNotFoundError("No module named 'lsq_core'")
