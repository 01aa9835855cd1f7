"""How far some work is, and where its time goes: seconds by stage, each counted once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

#: Steps by which the progress of one of several things is reported.
PROGRESS_STEPS = 1000
#: Called with how much of one stage is done, of how much, and what is being done.
Progress = Callable[[int, int, str], None]
#: Called with a stage, how much of it is done, of how much, and what is being done.
ProgressCallback = Callable[[str, int, int, str], None]


def no_progress(done: int, total: int, message: str) -> None:
    """Report nothing of a stage."""


def ignore_progress(stage: str, done: int, total: int, message: str) -> None:
    """Report nothing of any stage."""


class Clock:
    """Seconds spent on each stage of some work since it began.

    A stage that another one contains counts for itself, and not for the one around it, so that
    stages never add up to more than the whole.
    """

    def __init__(self) -> None:
        self.start_time = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self._nested_seconds: list[float] = []

    @property
    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self.start_time

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what a ``with`` takes under a name."""
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
        """Count seconds under a name."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def timed(stage: str) -> Callable:
    """Count what a method of an object with a ``clock`` takes under a stage's name."""

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def wrapper(self: Any, *arguments: Any, **options: Any) -> Any:
            with self.clock.stage(stage):
                return method(self, *arguments, **options)

        return wrapper

    return decorate
