"""Run a sweep's items on Ray, on every device of this machine or of a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lsq_core.distributed.actors import Actors
from lsq_core.distributed.dispatch import Dispatcher
from lsq_core.distributed.evaluator import Evaluator
from lsq_core.distributed.start_watch import wait_until_ready
from lsq_core.distributed.status import write_actors
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.session import Session
from lsq_core.sweep_state import Sweep


class OnRay:
    """Runs a sweep's items with one actor per device; the session plans and stores.

    ``settings`` and ``quantizers`` are the sweep's, and ``kind`` is the class of the actors; for
    the other parameters see :class:`lsq_core.distributed.actors.Actors`.
    """

    def __init__(
        self,
        address: str,
        settings: ProfileSettings,
        quantizers: Sequence[str],
        cores: int | None = None,
        most: int | None = None,
        kind: type[Evaluator] = Evaluator,
    ) -> None:
        self._actors = Actors(kind, address, settings, quantizers, cores, most)

    def places(self, session: Session) -> Sequence[Mapping[str, str]]:
        """Return where the actors measure; empty if on this machine, as the session does."""
        self._actors.check_device(session)
        if session.checkpoint_folder is not None:
            write_actors(session.checkpoint_folder, [])  # clear a previous driver's rows
        if self._actors.is_local:
            return ()  # start no actor until an item needs one
        described = wait_until_ready(session, self._actors.pool(session))
        return [dict(pairs) for pairs in {tuple(sorted(one.where.items())) for one in described}]

    def run(self, sweep: Sweep) -> None:
        """Run every pending item."""
        if not sweep.pending():
            return
        streams = {sweep.requested[n].evaluation for n in sweep.pending()}
        stored = sum(sweep.session.stream(request).ids.nbytes for request in streams)
        sweep.session.unload()  # the actors need the memory, which limits their number
        Dispatcher(sweep, self._actors.pool(sweep.session, stored)).run()

    def close(self) -> None:
        """Stop the actors, and the cluster if it was started here."""
        self._actors.close()
