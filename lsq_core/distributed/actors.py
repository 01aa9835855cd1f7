"""A driver's actors, one on each device of this machine or of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from lsq_core import devices
from lsq_core.distributed import cluster
from lsq_core.distributed.actor import ModelActor
from lsq_core.distributed.messages import DriverFolders, Setup
from lsq_core.distributed.pool import ActorPool
from lsq_core.errors import InputError, LsqError
from lsq_core.memory import available_memory
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.provenance import device_kind
from lsq_core.quantization.registry import arithmetic_packages
from lsq_core.session import Session

#: Maximum number of actors on a machine without GPUs, unless the cores of each are given.
_CPU_ACTORS = 4
#: Share of an actor's memory for the model and its quantized copy; the rest is for hidden states
#: and logits.
_WEIGHTS_SHARE = 0.5


@dataclass(eq=False)
class Actors:
    """The actors of one kind; a cluster of this machine is started and stopped with them.

    ``address`` is that of a cluster, or :data:`lsq_core.distributed.cluster.LOCAL`. ``cores`` is
    the number of cores per actor on machines without GPUs, by default a quarter of the machine's,
    and ``max_actors`` limits the number of actors. The versions of the packages that ``quantizers``
    compute with must match the driver's. ``kind`` is the class of the actors.
    """

    address: str
    settings: ProfileSettings
    quantizers: Sequence[str]
    cores: int | None = None
    max_actors: int | None = None
    kind: type[ModelActor] = ModelActor
    _open: ExitStack = field(default_factory=ExitStack, init=False)
    _pool: ActorPool | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        cluster.check_address(self.address)
        if self.cores is not None and self.cores < 1:
            raise InputError("An actor needs at least one core; give --actor-cores 1 or more.")
        if self.max_actors is not None and self.max_actors < 1:
            raise InputError("Ray needs at least one actor; give --actors 1 or more.")

    @property
    def is_local(self) -> bool:
        """Whether all actors are on this machine."""
        return self.address == cluster.LOCAL

    def check_device(self, session: Session) -> None:
        """Raise :class:`InputError` if a session names a single device of a kind."""
        if device_kind(session.device) != session.device:
            raise InputError(
                f"Ray uses all devices of one kind; give --device cuda or cpu instead of "
                f"{session.device}."
            )

    def close(self) -> None:
        """Stop the actors, and the cluster if it was started here."""
        self._open.close()

    def pool(self, session: Session) -> ActorPool:
        """Return the actors, which are started on the first call."""
        if self._pool is None:
            device, cores, count = self._local_devices(session)
            count = min(count, self.max_actors or count)
            total = max(cores * count, 1)
            gpus = count if device == "cuda" else 0
            self._open.enter_context(cluster.connection(self.address, total, gpus))
            if not self.is_local:
                device, cores, count = self._cluster_devices(session)
                count = min(count, self.max_actors or count)
            self._pool = ActorPool(self._setup(session, device, cores), count, self.kind)
            self._open.callback(self._pool.close)
        return self._pool

    def _setup(self, session: Session, device: str, cores: int) -> Setup:
        quantizers = {*self.quantizers, self.settings.quantizer}
        packages = {p for name in quantizers for p in arithmetic_packages(name)}
        data = session.store.path.parent
        return Setup(
            session.source,
            device,
            session.dtype,
            cores,
            session.cache_bytes,
            self.settings,
            tuple(sorted(packages)),
            DriverFolders(cluster.own_node(), data, session.checkpoint_folder),
        )

    def _local_devices(self, session: Session) -> tuple[str, int, int]:
        """Return this machine's kind of device, the cores per actor and the number of actors."""
        if not self.is_local:
            return "cpu", 1, 1
        if device_kind(session.device_and_dtype["device"]) == "cuda":
            return "cuda", 1, devices.count_gpus()
        available = devices.count_cores()
        cores = self.cores or max(1, available // _CPU_ACTORS)
        if cores > available:
            raise InputError(
                f"This machine has {available} cores, so no actor can have {cores}; give "
                "--actor-cores a smaller number."
            )
        count = min(available // cores, self._fitting(session))
        return "cpu", cores if count > 1 or self.cores else available, count

    def _fitting(self, session: Session) -> int:
        """Return how many actors fit in memory with a copy of the model each, at least one."""
        import torch

        dtype = getattr(torch, session.device_and_dtype["dtype"])
        weights = session.info.parameters * dtype.itemsize
        return max(1, int(_WEIGHTS_SHARE * available_memory() // weights))

    def _cluster_devices(self, session: Session) -> tuple[str, int, int]:
        """Return the same for a cluster: its GPUs if it has any and the CPU was not requested."""
        nodes = cluster.nodes()
        gpus = sum(node.gpus for node in nodes)
        if session.device == "cuda" and not gpus:
            raise InputError(f"The Ray cluster at {self.address} has no GPU; give --device cpu.")
        if gpus and session.device != "cpu":
            return "cuda", 1, gpus
        cores = self.cores or max(1, min(node.cores for node in nodes) // _CPU_ACTORS)
        count = sum(node.cores // cores for node in nodes)
        if not count:
            raise LsqError(
                f"No node of the Ray cluster at {self.address} has {cores} cores; give "
                "--actor-cores a smaller number."
            )
        return "cpu", cores, count
