"""What a driver and its actors tell each other."""

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
    """Folders of the driver, which its actors use as well where they run on the same node.

    ``data`` is where full precision's hidden states are kept, ``checkpoint`` where a job keeps what
    it has so far, if it is one.
    """

    node: str
    data: Path
    checkpoint: Path | None


@dataclass(frozen=True)
class Setup:
    """What an actor is made for: a model on a device of its node.

    ``device`` is ``cpu`` or ``cuda``, the one GPU that it has; ``cores`` are the threads that it
    computes with on a CPU. ``packages`` are those whose versions it tells beside the usual ones.
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
    """What an actor says of itself: where it is and what it would measure with.

    ``where`` has the device, the dtype and the machine in words; ``fits`` tells whether the model
    fits the device's memory.
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
    """A run to be made: its id, which the driver chose, the plan, and the quantizer."""

    run: str
    plan: Plan
    quantizer: str


@dataclass(frozen=True)
class Task:
    """Plans to quantize and to evaluate together on one text."""

    runs: tuple[PlannedRun, ...]
    evaluation: EvaluationRequest


@dataclass(frozen=True)
class ProfileTask:
    """Metrics to measure on some layers, None for all of them.

    ``profile`` is the id of the profile, and ``corpus`` the identity of its calibration text.
    """

    profile: str
    corpus: str
    metrics: tuple[str, ...]
    layers: range | None = None


@dataclass(frozen=True)
class Failure:
    """Why an actor on a host could not do what it was asked for.

    ``kind`` is ``input`` (:class:`lsq_core.errors.InputError`), ``memory`` or ``other``;
    ``trace`` is that of a defect.
    """

    host: str
    kind: str
    reason: str
    trace: str = ""


@dataclass(frozen=True)
class ActorProgress:
    """How far an actor is with its task, 0 to 1, and what it is doing."""

    stage: str = ""
    fraction: float = 0.0
    message: str = ""


#: What comes of a task: a run each.
Measured = tuple[MeasuredRun, ...]
