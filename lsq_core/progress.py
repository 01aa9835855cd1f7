"""Progress of work, and its time by stage, with each second counted once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

#: Steps in which the progress of one of several items is reported.
PROGRESS_STEPS = 1000
#: Called with the amount of a stage done, the total amount, and a message.
Progress = Callable[[int, int, str], None]
#: Called with a stage, the amount of it done, the total amount, and a message.
ProgressCallback = Callable[[str, int, int, str], None]


def no_progress(done: int, total: int, message: str) -> None:
    """Ignore the progress of a stage."""


def ignore_progress(stage: str, done: int, total: int, message: str) -> None:
    """Ignore the progress of all stages."""


class Clock:
    """Seconds spent on each stage of some work since it started.

    The time of a nested stage is not counted for the enclosing one, so that the stages never add
    up to more than the total.
    """

    def __init__(self) -> None:
        self.start_time = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self._nested_seconds: list[float] = []

    @property
    def total(self) -> float:
        """Seconds since the clock was created."""
        return time.perf_counter() - self.start_time

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the duration of the ``with`` block to a stage."""
        start_time = time.perf_counter()
        self._nested_seconds.append(0.0)
        try:
            yield
        finally:
            taken = time.perf_counter() - start_time
            self.add(name, taken - self._nested_seconds.pop())
            if self._nested_seconds:
                self._nested_seconds[-1] += taken

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to a stage."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def timed(stage: str) -> Callable:
    """Decorate a method to add its duration to a stage of its object's ``clock``."""

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def wrapper(self: Any, *arguments: Any, **options: Any) -> Any:
            with self.clock.stage(stage):
                return method(self, *arguments, **options)

        return wrapper

    return decorate
