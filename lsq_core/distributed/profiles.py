"""The driver's side of a profile on Ray.

Metrics with :attr:`lsq_core.profiling.metrics.base.Metric.splits_by_layer` are divided into tasks
of a few layers. Of the others, those measured on the forward walk are one task, and those measured
on the backward walk another.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from lsq_core.corpus.registry import corpus_identity
from lsq_core.distributed.actor import ModelActor
from lsq_core.distributed.actors import Actors
from lsq_core.distributed.messages import Description, Failure, ProfileTask
from lsq_core.distributed.pool import MAX_MOVES, TURN_S, ActorPool, RemoteActor
from lsq_core.distributed.start_watch import StartWatch, death_reason, wait_until_ready
from lsq_core.errors import InputError, LsqError
from lsq_core.model.info import ModelInfo
from lsq_core.profiling.metrics import METRICS
from lsq_core.profiling.profile import Profile, join_layers
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.progress import PROGRESS_STEPS
from lsq_core.provenance import device_kind
from lsq_core.session import Session
from lsq_core.stages.profile import model_profile_key

#: Tasks per actor when layers are split: several, so that actors finish at about the same time.
_TASKS_PER_ACTOR = 2


@dataclass(frozen=True)
class RayProfiler:
    """Measures a profile's metrics on Ray (a :data:`lsq_core.stages.profile.Measurer`).

    For the fields see :class:`lsq_core.distributed.actors.Actors`.
    """

    address: str
    cores: int | None = None
    max_actors: int | None = None
    kind: type[ModelActor] = ModelActor

    def __call__(
        self, session: Session, settings: ProfileSettings, metrics: Sequence[str]
    ) -> Iterator[Profile]:
        """Start the actors and measure metrics; see :func:`measure_on`."""
        actors = Actors(self.address, settings, (), self.cores, self.max_actors, self.kind)
        actors.check_device(session)
        with closing(actors):
            yield from measure_on(actors, session, settings, metrics)


def measure_on(
    actors: Actors, session: Session, settings: ProfileSettings, metrics: Sequence[str]
) -> Iterator[Profile]:
    """Measure metrics on actors, and yield each group of them as it is finished.

    Raises
    ------
    InputError
        If a node has other versions or another model than the driver, or computes on another kind
        of device or in another dtype, which identify a profile.
    LsqError
        If no actor can be started, or a task fails.
    """
    key, corpus = model_profile_key(session, settings), corpus_identity(settings.calibration)
    session.unload()  # frees memory for the actors, whose number depends on it
    session.report("profile", 0, 1, "starting actors")
    pool = actors.pool(session)
    for description in wait_until_ready(session, pool):
        _check_place(session, description)
    groups = split(session.info, metrics, _TASKS_PER_ACTOR * len(pool.actors))
    tasks = [
        [ProfileTask(settings, key, corpus, names, layers) for layers in own]
        for names, own in groups
    ]
    yield from _Dispatcher(session, pool, tasks).run()


def split(
    info: ModelInfo, metrics: Sequence[str], parts: int
) -> list[tuple[tuple[str, ...], list[range | None]]]:
    """Return groups of metrics with the layers of each task, None for all; the longest first.

    Metrics that split by layer form one group each, except that those that need only the weights
    share a group.
    """
    whole, apart = {}, {}
    for name in metrics:
        metric = METRICS[name]
        if not metric.splits_by_layer:
            whole.setdefault(metric.needs_gradients, []).append(name)
        else:
            apart.setdefault(name if metric.needs_calibration else "", []).append(name)
    groups = [(tuple(names), [None]) for names in whole.values()]
    # Metrics that need only the weights come last: they take the least time.
    for key in sorted(apart, reverse=True):
        groups.append((tuple(apart[key]), [*_layer_ranges(info, apart[key], parts)]))
    return groups


def _layer_ranges(info: ModelInfo, metrics: Sequence[str], parts: int) -> Iterator[range]:
    """Yield consecutive ranges of layers of about equal effort, at most ``parts`` of them."""
    made = [METRICS[name]() for name in metrics]
    matrices = Counter(matrix.layer for matrix in info.matrices)
    effort = {
        layer: count * sum(metric.effort(layer, info.layers) for metric in made)
        for layer, count in sorted(matrices.items())
    }
    share, start, given, done = sum(effort.values()) / parts, 0, 0, 0
    for layer in effort:
        done += effort[layer]
        if done >= share * (given + 1) or layer == max(effort):
            yield range(start, layer + 1)
            start, given = layer + 1, given + 1


@dataclass(eq=False)
class _Dispatcher:
    """Distributes the tasks of several groups to the actors of a pool."""

    session: Session
    pool: ActorPool
    groups: list[list[ProfileTask]]
    _tasks: list[ProfileTask] = field(init=False)
    _pending: list[int] = field(init=False)
    _done: dict[int, Profile] = field(default_factory=dict)
    _moves: Counter[int] = field(default_factory=Counter)
    _watch: StartWatch = field(init=False)

    def __post_init__(self) -> None:
        self._watch = StartWatch(self.session, self.pool)
        self._tasks = [task for group in self.groups for task in group]
        self._pending = list(range(len(self._tasks)))

    def run(self) -> Iterator[Profile]:
        """Yield the profile of each group once its tasks are done."""
        remaining, start = [], 0
        for group in self.groups:
            remaining.append(range(start, start + len(group)))
            start += len(group)
        while remaining:
            self._assign()
            for answer in self.pool.wait(TURN_S):
                self._take(answer.actor, answer.value)
            self._watch.check()
            self._tell()
            for numbers in [own for own in remaining if self._done.keys() >= set(own)]:
                remaining.remove(numbers)
                yield join_layers([self._done[number] for number in numbers])

    def _assign(self) -> None:
        for actor in self.pool.actors:
            if actor.is_idle and self._pending:
                number = self._pending.pop(0)
                self.pool.submit(actor, "profile", self._tasks[number], (number,))

    def _take(self, actor: RemoteActor, value: object) -> None:
        if isinstance(value, Exception):
            self._replace(actor, death_reason(value))
        elif actor.description is None:
            self._watch.admit(actor, value)
            _check_place(self.session, actor.description)
        elif isinstance(value, Failure):
            if value.trace:
                print(value.trace, file=sys.stderr)
            kind = InputError if value.kind == "input" else LsqError
            raise kind(f"{value.host}: {value.reason}")
        else:
            [number], actor.task, actor.items = actor.items, None, ()
            self._done[number] = value

    def _replace(self, actor: RemoteActor, reason: str) -> None:
        """Replace an actor that died, and put its tasks first in the queue."""
        for number in actor.items:
            self._moves[number] += 1
            if self._moves[number] > MAX_MOVES:
                raise LsqError(
                    f"The actors measuring {_describe(self._tasks[number])} died "
                    f"{self._moves[number]} times, most recently on {actor.description.host} "
                    f"because {reason}."
                )
        self._pending = [*actor.items, *self._pending]
        actor.items, actor.task = (), None
        self._watch.replace(actor, reason)

    def _tell(self) -> None:
        working = [actor for actor in self.pool.actors if actor.task]
        part = len(self._done) + sum(actor.progress.fraction for actor in working)
        ready = sum(actor.description is not None for actor in self.pool.actors)
        told = [f"{actor.number}: {_describe(actor.task)}" for actor in working]
        self.session.report(
            "profile",
            int(PROGRESS_STEPS * part),
            PROGRESS_STEPS * len(self._tasks),
            " · ".join([f"{len(working)} of {ready} actors working", *told[:4]]),
        )


def place_difference(session: Session, where: Mapping[str, str]) -> str:
    """Return how an actor's kind of device or dtype differs from the driver's, '' if not at all.

    ``where`` has a ``device`` and a ``dtype``.
    """
    own, its = (
        f"{device_kind(place['device'])} in {place['dtype']}"
        for place in (session.device_and_dtype, where)
    )
    return "" if own == its else f"computes on {its}, and this machine on {own}"


def _check_place(session: Session, description: Description) -> None:
    if difference := place_difference(session, description.where):
        raise InputError(
            f"{description.host} {difference}; give --device and --dtype, or measure the profile "
            "from a machine of that kind."
        )


def _describe(task: ProfileTask) -> str:
    """Describe a task in words, such as ``loss_impact of layers 1 to 4``."""
    names = ", ".join(task.metrics)
    if task.layers is None:
        return names
    first, last = task.layers.start + 1, task.layers.stop
    return f"{names} of layer {last}" if first == last else f"{names} of layers {first} to {last}"
