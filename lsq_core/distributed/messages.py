"""Messages between a driver and its actors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.model.source import ModelSource
from lsq_core.planning.plan import Plan
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.stages.measure import MeasuredRun


@dataclass(frozen=True)
class DriverFolders:
    """Folders of the driver, also used by its actors on the same node.

    ``data`` stores the hidden states of full precision; ``checkpoint`` stores the partial results
    of a job, if the driver is one.
    """

    node: str
    data: Path
    checkpoint: Path | None


@dataclass(frozen=True)
class Setup:
    """The configuration of an actor: a model on a device of its node.

    ``device`` is ``cpu`` or ``cuda`` (its only GPU); ``cores`` is the number of threads used on a
    CPU. ``packages`` are those whose versions it reports besides the usual ones.
    """

    source: ModelSource
    device: str
    dtype: str
    cores: int
    cache_bytes: int
    settings: ProfileSettings
    packages: tuple[str, ...]
    folders: DriverFolders


@dataclass(frozen=True)
class Description:
    """An actor's description of itself: where it runs and what it measures with.

    ``where`` has the device, the dtype and the machine in words; ``fits`` is whether the model
    fits in the device's memory.
    """

    node: str
    host: str
    pid: int
    device_name: str
    where: dict[str, str]
    fingerprint: str
    versions: dict[str, str]
    fits: bool


@dataclass(frozen=True)
class PlannedRun:
    """A run to measure: its id, chosen by the driver, the plan and the quantizer."""

    run: str
    plan: Plan
    quantizer: str


@dataclass(frozen=True)
class EvaluationTask:
    """Plans to quantize and evaluate together on one text."""

    runs: tuple[PlannedRun, ...]
    evaluation: EvaluationRequest


@dataclass(frozen=True)
class ProfileTask:
    """Metrics to measure on the given layers, None for all.

    ``profile`` is the id of the profile, and ``corpus`` identifies its calibration text.
    """

    settings: ProfileSettings
    profile: str
    corpus: str
    metrics: tuple[str, ...]
    layers: range | None = None


@dataclass(frozen=True)
class Failure:
    """The reason why an actor on a host failed.

    ``kind`` is ``input`` (:class:`lsq_core.errors.InputError`), ``memory`` or ``other``;
    ``trace`` is the traceback of an unexpected exception.
    """

    host: str
    kind: str
    reason: str
    trace: str = ""


@dataclass(frozen=True)
class ActorProgress:
    """An actor's progress with its task (``fraction``, 0 to 1), and its current stage."""

    stage: str = ""
    fraction: float = 0.0
    message: str = ""


#: The result of an evaluation task: one run per plan.
Measured = tuple[MeasuredRun, ...]
