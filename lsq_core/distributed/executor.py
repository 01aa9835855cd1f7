"""Executes a sweep on Ray: on every device of this machine, or of a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lsq_core.distributed.actor import ModelActor
from lsq_core.distributed.actors import Actors
from lsq_core.distributed.dispatch import Dispatcher
from lsq_core.distributed.profiles import measure_on, place_difference
from lsq_core.distributed.start_watch import wait_until_ready
from lsq_core.distributed.status import write_actors
from lsq_core.profiling.profile import Profile
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.session import Session
from lsq_core.stages.profile import measure_here
from lsq_core.sweep_state import Sweep


class RayExecutor:
    """Executes a sweep with one actor per device; the driver plans and stores.

    ``settings`` and ``quantizers`` are those of the sweep; for the other arguments see
    :class:`lsq_core.distributed.actors.Actors`.
    """

    def __init__(
        self,
        address: str,
        settings: ProfileSettings,
        quantizers: Sequence[str],
        cores: int | None = None,
        max_actors: int | None = None,
        kind: type[ModelActor] = ModelActor,
    ) -> None:
        self._actors = Actors(address, settings, quantizers, cores, max_actors, kind)
        self._remote_places: Sequence[Mapping[str, str]] = ()

    def places(self, session: Session) -> Sequence[Mapping[str, str]]:
        """Return where the actors compute; () on this machine, where the session does too."""
        self._actors.check_device(session)
        if session.checkpoint_folder is not None:
            write_actors(session.checkpoint_folder, [])  # remove those of an earlier driver
        if self._actors.is_local:
            return ()  # so that nothing is started if there is nothing to do
        described = wait_until_ready(session, self._actors.pool(session))
        different = {tuple(sorted(one.where.items())) for one in described}
        self._remote_places = [dict(pairs) for pairs in different]
        return self._remote_places

    def measure_profile(
        self, session: Session, settings: ProfileSettings, metrics: Sequence[str]
    ) -> Iterator[Profile]:
        """Measure profile metrics on the actors; see :func:`.profiles.measure_on`.

        A profile belongs to the device kind and dtype that the session plans with, so actors of
        a cluster that compute otherwise leave it to this machine.
        """
        for where in self._remote_places:
            if difference := place_difference(session, where):
                note = f"the profile is measured here: the cluster {difference}"
                session.report("note", 0, 1, note)
                return measure_here(session, settings, metrics)
        return measure_on(self._actors, session, settings, metrics)

    def run(self, sweep: Sweep) -> None:
        """Execute every pending item."""
        if not sweep.pending():
            return
        sweep.session.unload()  # frees memory for the actors, whose number depends on it
        Dispatcher(sweep, self._actors.pool(sweep.session)).run()

    def close(self) -> None:
        """Stop the actors, and the cluster if it was started here."""
        self._actors.close()
