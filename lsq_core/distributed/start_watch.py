"""Check that actors start with the driver's model and versions, and explain why one died."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from lsq_core.distributed.messages import Description, Failure
from lsq_core.distributed.pool import TURN_S, ActorPool, RemoteActor
from lsq_core.errors import InputError, LsqError
from lsq_core.provenance import run_dependencies, versions
from lsq_core.session import Session

#: Number of consecutive failed starts after which no further actor is started.
_MAX_FAILED_STARTS = 3
#: Seconds to wait after the first failed start, doubled after each further one: Ray takes a while
#: to notice that a node is gone, and keeps starting actors there until then.
_RETRY_S = 1.0
#: Seconds to wait for the first actor to be ready, and then for the slower ones.
_START_TIMEOUT_S, _OTHERS_TIMEOUT_S = 300.0, 60.0


@dataclass(eq=False)
class StartWatch:
    """Makes sure that actors start and that they have the driver's model and versions."""

    session: Session
    pool: ActorPool
    _failed_starts: int = 0
    _since: float = field(default_factory=time.monotonic)

    def admit(self, actor: RemoteActor, answer: Description | Failure) -> None:
        """Admit an actor that has answered with its description.

        Raises
        ------
        InputError, LsqError
            If its model or versions differ from the driver's, or it failed to open the model.
        """
        if isinstance(answer, Failure):
            kind = InputError if answer.kind == "input" else LsqError
            raise kind(f"{answer.host} cannot be used: {answer.reason}")
        _check_versions(answer, self.pool.setup.packages)
        if answer.fingerprint != self.session.info.fingerprint:
            raise InputError(
                f"{self.session.source.name} on {answer.host} is not the driver's model (their "
                "weights or configs differ); copy the driver's there."
            )
        actor.description, self._failed_starts = answer, 0

    def replace(self, actor: RemoteActor, reason: str) -> None:
        """Start another actor to replace one that died.

        If several in a row died before they were ready, as on a node that is gone, the others
        continue without it.

        Raises
        ------
        LsqError
            If there are no others.
        """
        self._since = time.monotonic()
        if actor.description is None:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                if any(other.description for other in self.pool.actors if other is not actor):
                    return
                raise LsqError(
                    f"{self._failed_starts} actors died one after the other before they were "
                    f"ready; the last one, because {reason}."
                )
            time.sleep(_RETRY_S * 2 ** (self._failed_starts - 1))
        self.pool.start()

    def check(self) -> None:
        """Raise :class:`LsqError` if no device has been free for too long."""
        if any(actor.description for actor in self.pool.actors):
            self._since = time.monotonic()
        elif time.monotonic() - self._since > _START_TIMEOUT_S:
            raise LsqError(
                f"No device of the Ray cluster was free within {_START_TIMEOUT_S:.0f} s; 'ray "
                "status' shows what is using them."
            )


def wait_until_ready(session: Session, pool: ActorPool) -> list[Description]:
    """Return the descriptions of the actors that are ready, without waiting for the slowest.

    Raises
    ------
    InputError, LsqError
        If none can be started, or a node's model or versions differ from the driver's.
    """
    watch, first = StartWatch(session, pool), None
    while True:
        for answer in pool.wait(TURN_S):
            if isinstance(answer.value, Exception):
                watch.replace(answer.actor, death_reason(answer.value))
            else:
                watch.admit(answer.actor, answer.value)
        watch.check()
        ready = [actor.description for actor in pool.actors if actor.description]
        first = first or (time.monotonic() if ready else None)
        late = first is not None and time.monotonic() - first > _OTHERS_TIMEOUT_S
        if ready and (late or len(ready) == len(pool.actors)):
            return ready


def _check_versions(described: Description, packages: Sequence[str]) -> None:
    """Raise :class:`InputError` if a node's versions differ from the driver's."""
    own, its = versions(*packages), described.versions
    names = ("lsq", "numpy", *run_dependencies({}, packages))
    different = [name for name in names if own.get(name) != its.get(name)]
    if different:
        told = ", ".join(f"{name} {its.get(name)} instead of {own.get(name)}" for name in different)
        raise InputError(f"{described.host} has {told}; install the driver's versions there.")


def death_reason(error: Exception) -> str:
    """Return why an actor died, as a clause."""
    text = f"{type(error).__name__} {error}"
    if "OutOfMemory" in text or "memory pressure" in text:
        return "its node ran out of memory"
    if "NodeDied" in text or "node has died" in text or "node was terminated" in text:
        return "its node died"
    if "creation task" in text:
        last = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
        return f"it could not be started: {last}"
    return "its process was killed or crashed"
