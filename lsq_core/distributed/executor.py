"""Make a sweep's items on Ray: on every device of this machine, or of a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from lsq_core import devices
from lsq_core.distributed import cluster
from lsq_core.distributed.dispatch import Dispatcher, wait_until_ready
from lsq_core.distributed.evaluator import Evaluator
from lsq_core.distributed.messages import DriverFolders, Setup
from lsq_core.distributed.pool import ActorPool
from lsq_core.distributed.status import write_actors
from lsq_core.errors import InputError, LsqError
from lsq_core.memory import available_memory
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.provenance import device_kind
from lsq_core.quantization.registry import arithmetic_packages
from lsq_core.session import Session
from lsq_core.sweep_state import Sweep

#: Actors that a machine without GPUs has at most, unless one says how many cores each gets.
_CPU_ACTORS = 4
#: Of an actor's memory, what goes to the model and its copy by a plan; the rest is for hidden
#: states and logits.
_WEIGHTS_SHARE = 0.5


@dataclass(eq=False)
class OnRay:
    """Makes a sweep's items by an actor a device; the session plans and stores.

    ``address`` is that of a cluster, or :data:`lsq_core.distributed.cluster.LOCAL`; ``cores`` are
    those of each actor on machines without GPUs, by default the machine's divided by four, and
    there are ``actors`` at most.
    ``settings`` and ``quantizers`` are the sweep's; ``evaluator`` is the class of the actors.
    """

    address: str
    settings: ProfileSettings
    quantizers: Sequence[str]
    cores: int | None = None
    actors: int | None = None
    evaluator: type[Evaluator] = Evaluator
    _open: ExitStack = field(default_factory=ExitStack, init=False)
    _pool: ActorPool | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        cluster.check_address(self.address)
        if self.cores is not None and self.cores < 1:
            raise InputError("An actor needs at least one core; give --actor-cores 1 or more.")
        if self.actors is not None and self.actors < 1:
            raise InputError("A sweep on Ray needs at least one actor; give --actors 1 or more.")

    def places(self, session: Session) -> Sequence[Mapping[str, str]]:
        """Where the actors measure; on this machine, that is where the session computes."""
        if device_kind(session.device) != session.device:
            raise InputError(
                f"Sweeps on Ray use every device of a kind; give --device cuda or cpu instead of "
                f"{session.device}."
            )
        if session.checkpoint_folder is not None:
            write_actors(session.checkpoint_folder, [])  # those of a driver before are gone
        if self.address == cluster.LOCAL:
            return ()  # nothing is started while nothing has to be made
        pool = self._started_pool(session)
        described = wait_until_ready(session, pool)
        return [dict(pairs) for pairs in {tuple(sorted(one.where.items())) for one in described}]

    def run(self, sweep: Sweep) -> None:
        """Make every pending item."""
        if not sweep.pending():
            return
        streams = {sweep.requested[n].evaluation for n in sweep.pending()}
        stored = sum(sweep.session.stream(request).ids.nbytes for request in streams)
        sweep.session.unload()  # the actors need the memory, and are as many as have it
        pool = self._started_pool(sweep.session, stored)
        Dispatcher(sweep, pool).run()

    def close(self) -> None:
        """End the actors, and the cluster that began here."""
        self._open.close()

    def _started_pool(self, session: Session, stored_bytes: int = 0) -> ActorPool:
        """The actors, begun once."""
        if self._pool is None:
            device, cores, count = self._local_devices(session)
            count = min(count, self.actors or count)
            total = max(cores * count, 1)
            gpus = count if device == "cuda" else 0
            self._open.enter_context(cluster.connection(self.address, total, gpus, stored_bytes))
            if self.address != cluster.LOCAL:
                device, cores, count = self._cluster_devices(session)
                count = min(count, self.actors or count)
            self._pool = ActorPool(self._setup(session, device, cores), count, self.evaluator)
            self._open.callback(self._pool.close)
        return self._pool

    def _setup(self, session: Session, device: str, cores: int) -> Setup:
        packages = {p for name in self.quantizers for p in arithmetic_packages(name)}
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
        """The kind of this machine's devices, the cores of an actor on one, and how many."""
        if self.address != cluster.LOCAL:
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
        """How many actors have the memory for a copy of the model, at least one."""
        import torch

        dtype = getattr(torch, session.device_and_dtype["dtype"])
        weights = session.info.parameters * dtype.itemsize
        return max(1, int(_WEIGHTS_SHARE * available_memory() // weights))

    def _cluster_devices(self, session: Session) -> tuple[str, int, int]:
        """The same of the cluster: its GPUs, unless there are none or the CPU was asked for."""
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
