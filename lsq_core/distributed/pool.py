"""The driver's view of the actors of a cluster and their answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from lsq_core.distributed.actor import ModelActor
from lsq_core.distributed.messages import ActorProgress, Description, Failure, Setup

#: Maximum number of times a task is moved to another actor because its actor died.
MAX_MOVES = 3
#: Seconds for which a driver waits for answers before doing other work.
TURN_S = 0.2
#: Seconds between two progress requests to an actor.
PROGRESS_EVERY_S = 0.5


@dataclass(eq=False)
class RemoteActor:
    """An actor: its number, its description (once it is ready) and its current task."""

    number: int
    handle: object
    description: Description | None = None
    task: object | None = None
    #: Numbers of the driver's items in the task.
    items: tuple[int, ...] = ()
    progress: ActorProgress = field(default_factory=ActorProgress)
    #: Number of items measured.
    measured: int = 0
    asked: float = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether the actor is ready and has no task."""
        return self.description is not None and self.task is None


@dataclass(frozen=True)
class Answer:
    """An actor's description, the result of its task, a failure, or the exception if it died."""

    actor: RemoteActor
    value: Description | Failure | Exception | object


class ActorPool:
    """Actors of one kind, each started on whichever node has room for it."""

    def __init__(self, setup: Setup, count: int, kind: type[ModelActor]) -> None:
        import ray

        resources = {"num_cpus": setup.cores, "num_gpus": int(setup.device == "cuda")}
        remote = ray.remote(
            max_restarts=0, max_task_retries=0, concurrency_groups={"watch": 1}, **resources
        )
        self._class, self._ray, self.setup = remote(kind), ray, setup
        self.actors: list[RemoteActor] = []
        #: Removed actors.
        self.lost: list[RemoteActor] = []
        self._answers: dict[object, RemoteActor] = {}
        self._progress: dict[object, RemoteActor] = {}
        for _ in range(count):
            self.start()

    def start(self) -> RemoteActor:
        """Start another actor; it answers once a node has room for it."""
        handle = self._class.remote(self.setup)
        actor = RemoteActor(len(self.actors) + len(self.lost) + 1, handle)
        self.actors.append(actor)
        self._answers[handle.describe.remote()] = actor
        return actor

    def submit(
        self,
        actor: RemoteActor,
        method: str,
        task: object,
        items: tuple[int, ...],
        *inputs: object,
    ) -> None:
        """Call a method of an idle actor with a task; ``inputs`` are references to more arguments.

        ``items`` are the driver's numbers of what the task is about.
        """
        actor.task, actor.items, actor.progress = task, items, ActorProgress()
        self._answers[getattr(actor.handle, method).remote(task, *inputs)] = actor

    def wait(self, seconds: float) -> Iterator[Answer]:
        """Wait up to ``seconds`` for an answer, and yield all answers available by then."""
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
                continue  # it was already removed because of another answer
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
        """Request the progress of each ready actor, if the last request is old enough."""
        waiting, now = set(self._progress.values()), time.monotonic()
        for actor in self.actors:
            due = now - actor.asked >= PROGRESS_EVERY_S
            if actor.description is not None and actor not in waiting and due:
                actor.asked = now
                progress = actor.handle.progress.options(concurrency_group="watch")
                self._progress[progress.remote()] = actor

    def remove(self, actor: RemoteActor) -> None:
        """Kill an actor if it is still alive, and drop its pending answers."""
        self.actors.remove(actor)
        self.lost.append(actor)
        for waiting in (self._answers, self._progress):
            for reference in [key for key, own in waiting.items() if own is actor]:
                del waiting[reference]
        with suppress(Exception):  # Ray raises various exceptions for a dead actor
            self._ray.kill(actor.handle)

    def close(self) -> None:
        """Kill all actors."""
        for actor in list(self.actors):
            self.remove(actor)
