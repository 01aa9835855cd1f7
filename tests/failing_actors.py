"""Ray actors that fail in the ways tests need; the actor processes import this module."""

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
    """Kills itself in the first task that any such actor gets, recorded in the driver's folder."""

    def _evaluate(self, task: EvaluationTask, stream: TokenStream) -> Measured:
        killed = self.setup.folders.data / "killed"
        if not killed.exists():
            killed.touch()
            kill_itself()
        return super()._evaluate(task, stream)


class ProfilerKilledOnce(ModelActor):
    """Kills itself in the first task on a subset of layers, recorded in the driver's folder."""

    def _profile(self, task: ProfileTask) -> Profile:
        killed = self.setup.folders.data / "killed"
        if task.layers is not None and not killed.exists():
            killed.touch()
            kill_itself()
        return super()._profile(task)


class KilledByLayer(ModelActor):
    """Kills itself in every task that includes the second layer; records each time."""

    def _profile(self, task: ProfileTask) -> Profile:
        if task.layers is not None and 1 in task.layers:
            with (self.setup.folders.data / "killed").open("a") as file:
                file.write("killed\n")
            kill_itself()
        return super()._profile(task)


class KilledByPlan(ModelActor):
    """Kills itself in every task with an MXQ plan for 2.6 bits; records each task's plan count."""

    def _evaluate(self, task: EvaluationTask, stream: TokenStream) -> Measured:
        requests = [one.plan.request for one in task.runs]
        if any((one.method, one.budget) == ("mxq", "2.6bpp") for one in requests):
            with (self.setup.folders.data / "killed").open("a") as file:
                file.write(f"{len(requests)}\n")
            kill_itself()
        return super()._evaluate(task, stream)


class OnePlanAtATime(ModelActor):
    """Has memory for only one plan at a time; records each task's plan count."""

    def _evaluate(self, task: EvaluationTask, stream: TokenStream) -> Measured:
        with (self.setup.folders.data / "sizes").open("a") as file:
            file.write(f"{len(task.runs)}\n")
        if len(task.runs) > 1:
            raise DeviceMemoryError("cpu ran out of memory.")
        return super()._evaluate(task, stream)


class NoMemory(ModelActor):
    """Runs out of memory on every plan."""

    def _evaluate(self, task: EvaluationTask, stream: TokenStream) -> Measured:
        raise DeviceMemoryError("cpu ran out of memory.")


class OlderTorch(ModelActor):
    """Reports another version of torch, on another host."""

    def _describe(self) -> Description:
        own = super()._describe()
        return replace(own, host="node-b", versions=own.versions | {"torch": "2.0.0"})


class OtherModel(ModelActor):
    """Reports another model under the same name, on another host."""

    def _describe(self) -> Description:
        return replace(super()._describe(), host="node-b", fingerprint="0" * 16)


class NoPackage(ModelActor):
    """Cannot be created, as if the project were not installed."""

    def __init__(self, setup: object) -> None:
        raise ModuleNotFoundError("No module named 'lsq_core'")
