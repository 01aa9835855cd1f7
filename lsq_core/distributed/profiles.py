"""The driver's side of a profile on Ray: distribute the metrics over tasks and join the results.

Metrics that split by layer (:attr:`lsq_core.profiling.metrics.base.Metric.splits_by_layer`) are
measured a few layers per task. Of the others, those of the forward walk through the blocks form one
task, and those of the backward walk another.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from lsq_core.corpus.registry import corpus_identity
from lsq_core.distributed.actors import Actors
from lsq_core.distributed.messages import Failure, ProfileTask
from lsq_core.distributed.pool import MAX_MOVES, TURN_S, ActorPool, RemoteActor
from lsq_core.distributed.profiler import Profiler
from lsq_core.distributed.start_watch import StartWatch, death_reason
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
class ProfileOnRay:
    """Measures a profile's metrics with one actor per device (:class:`..stages.profile.Measurer`).

    ``kind`` is the class of the actors; for the other fields see :class:`.actors.Actors`.
    """

    address: str
    cores: int | None = None
    most: int | None = None
    kind: type[Profiler] = Profiler

    def __call__(
        self, session: Session, settings: ProfileSettings, metrics: Sequence[str]
    ) -> Iterator[Profile]:
        """Measure metrics, and yield a profile for each group of metrics as it is completed.

        Raises
        ------
        InputError
            If a node's package versions, model, kind of device or dtype differ from the driver's.
        LsqError
            If no actor can be started, or one failed.
        """
        quantizers = [settings.quantizer]
        actors = Actors(self.kind, self.address, settings, quantizers, self.cores, self.most)
        actors.check_device(session)
        task = ProfileTask(
            model_profile_key(session, settings), corpus_identity(settings.calibration), ()
        )
        session.unload()  # the actors need the memory, which limits their number
        with closing(actors):
            pool = actors.pool(session)
            groups = split(session.info, metrics, _TASKS_PER_ACTOR * len(pool.actors))
            tasks = [[replace(task, metrics=m, layers=each) for each in own] for m, own in groups]
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
                self.pool.submit(actor, self._tasks[number], (number,))

    def _take(self, actor: RemoteActor, value: object) -> None:
        if isinstance(value, Exception):
            self._replace(actor, death_reason(value))
        elif actor.description is None:
            self._watch.admit(actor, value)
            self._check_place(actor)
        elif isinstance(value, Failure):
            if value.trace:
                print(value.trace, file=sys.stderr)
            kind = InputError if value.kind == "input" else LsqError
            raise kind(f"{value.host}: {value.reason}")
        else:
            [number], actor.task, actor.items = actor.items, None, ()
            self._done[number] = value
            actor.measured += 1

    def _check_place(self, actor: RemoteActor) -> None:
        """Raise if an actor's device kind or dtype, which key the profile, is not the driver's."""
        own, its = self.session.device_and_dtype, actor.description.where
        its = {"device": device_kind(its["device"]), "dtype": its["dtype"]}
        own = {"device": device_kind(own["device"]), "dtype": own["dtype"]}
        if own != its:
            raise InputError(
                f"{actor.description.host} computes on {its['device']} in {its['dtype']}, and this "
                f"machine on {own['device']} in {own['dtype']}; give --device and --dtype, or "
                "measure the profile from a machine of that kind."
            )

    def _replace(self, actor: RemoteActor, reason: str) -> None:
        """Replace an actor that died, and put its tasks first in the queue."""
        for number in actor.items:
            self._moves[number] += 1
            if self._moves[number] > MAX_MOVES:
                raise LsqError(
                    f"The actors that measured {_describe(self._tasks[number])} died "
                    f"{self._moves[number]} times; the last one, on {actor.description.host}, "
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


def _describe(task: ProfileTask) -> str:
    """Describe a task in words, such as ``loss_impact of layers 1 to 4``."""
    names = ", ".join(task.metrics)
    if task.layers is None:
        return names
    first, last = task.layers.start + 1, task.layers.stop
    return f"{names} of layer {last}" if first == last else f"{names} of layers {first} to {last}"
