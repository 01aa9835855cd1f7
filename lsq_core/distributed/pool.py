"""The actors of a cluster as the driver sees them, and what they answer."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from lsq_core.distributed.actor import ModelActor
from lsq_core.distributed.messages import ActorProgress, Description, Failure, Setup

#: How often a task goes to another actor after the one that had it died.
MAX_MOVES = 3
#: Seconds that a driver waits for answers before it looks after other things.
TURN_S = 0.2
#: Seconds between two questions about how far an actor is.
PROGRESS_EVERY_S = 0.5


@dataclass(eq=False)
class RemoteActor:
    """An actor: its number, what it said of itself once it is ready, and what it is doing."""

    number: int
    handle: object
    description: Description | None = None
    task: object | None = None
    #: Numbers of the driver's items that the task is of.
    items: tuple[int, ...] = ()
    progress: ActorProgress = field(default_factory=ActorProgress)
    #: Items that it measured.
    measured: int = 0
    asked: float = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether it is ready and has nothing to do."""
        return self.description is not None and self.task is None


@dataclass(frozen=True)
class Answer:
    """What an actor answered: of itself, of a task; or the exception of one that died."""

    actor: RemoteActor
    value: Description | Failure | Exception | object


class ActorPool:
    """Actors of one kind; one that died is replaced, on whichever node has room for it."""

    def __init__(self, setup: Setup, count: int, kind: type[ModelActor]) -> None:
        import ray

        resources = {"num_cpus": setup.cores, "num_gpus": int(setup.device == "cuda")}
        remote = ray.remote(
            max_restarts=0, max_task_retries=0, concurrency_groups={"watch": 1}, **resources
        )
        self._class, self._ray, self.setup = remote(kind), ray, setup
        self.actors: list[RemoteActor] = []
        #: Actors that are gone.
        self.lost: list[RemoteActor] = []
        self._answers: dict[object, RemoteActor] = {}
        self._progress: dict[object, RemoteActor] = {}
        for _ in range(count):
            self.start()

    def start(self) -> RemoteActor:
        """Make another actor; it answers once its node has room for it."""
        handle = self._class.remote(self.setup)
        actor = RemoteActor(len(self.actors) + len(self.lost) + 1, handle)
        self.actors.append(actor)
        self._answers[handle.describe.remote()] = actor
        return actor

    def submit(
        self, actor: RemoteActor, task: object, items: tuple[int, ...], *inputs: object
    ) -> None:
        """Give an idle actor a task; ``inputs`` are references to what it is done with."""
        actor.task, actor.items, actor.progress = task, items, ActorProgress()
        self._answers[actor.handle.measure.remote(task, *inputs)] = actor

    def wait(self, seconds: float) -> Iterator[Answer]:
        """The answers that come within so many seconds of the first, if any does."""
        self._ask_progress()
        pending = [*self._answers, *self._progress]
        if not pending:
            time.sleep(seconds)
            return
        self._ray.wait(pending, num_returns=1, timeout=seconds)
        ready, _ = self._ray.wait(pending, num_returns=len(pending), timeout=0)
        for reference in ready:
            actor = self._answers.pop(reference, None)
            asked = actor is None
            actor = actor or self._progress.pop(reference, None)
            if actor is None or actor not in self.actors:
                continue  # it was found dead by another answer
            try:
                value = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                self.remove(actor)
                print(f"Actor {actor.number} is gone: {error}", file=sys.stderr)
                yield Answer(actor, error)
                continue
            if asked:
                actor.progress = value if actor.task else ActorProgress()
            else:
                yield Answer(actor, value)

    def _ask_progress(self) -> None:
        """Ask each actor that is ready how far it is, if the last answer is old enough."""
        waiting, now = set(self._progress.values()), time.monotonic()
        for actor in self.actors:
            due = now - actor.asked >= PROGRESS_EVERY_S
            if actor.description is not None and actor not in waiting and due:
                actor.asked = now
                progress = actor.handle.progress.options(concurrency_group="watch")
                self._progress[progress.remote()] = actor

    def remove(self, actor: RemoteActor) -> None:
        """End an actor, if it is not dead yet, and forget what it was asked."""
        self.actors.remove(actor)
        self.lost.append(actor)
        for waiting in (self._answers, self._progress):
            for reference in [key for key, own in waiting.items() if own is actor]:
                del waiting[reference]
        with suppress(Exception):  # Ray has several for one that is gone
            self._ray.kill(actor.handle)

    def close(self) -> None:
        """End every actor."""
        for actor in list(self.actors):
            self.remove(actor)
