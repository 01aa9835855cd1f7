"""The solver's steps on the CPU, compiled once a process has enough work for that to pay off.

Compiling takes 10 to 20 seconds the first time on a machine and a few seconds if the result is in
the compiler's cache (``TORCHINDUCTOR_CACHE_DIR``); it then saves about two thirds of the steps'
time. How much a process will solve is not known in advance. So the steps run eagerly until
compiling would have cost as much as they did, and no job takes much more than twice its best time.

The zero points are bitwise identical either way unless errors are so large that they survive the
shrinking: sums of codes are integers, which add up exactly in any order.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lsq_core.errors import exception_reason

#: Weights that one variant of the steps must have solved before it is compiled.
COMPILE_AFTER_WEIGHTS = 2**31
#: Pieces with fewer weights always run eagerly: they gain nothing, and single groups would require
#: a separate compilation.
MIN_COMPILED_WEIGHTS = 2**14

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SolverBackend:
    """What runs the solver's steps, and why nothing faster does."""

    name: str
    reason: str = ""


class AdaptiveSteps:
    """The solver's steps, compiled once that pays off.

    Weights are counted, and the steps compiled, separately for each group dimension and with and
    without shrinking.
    """

    def __init__(self, eager: Callable) -> None:
        self.eager = eager
        self._compiled: Callable | None = None
        self._weights_solved: Counter[tuple[int, bool]] = Counter()
        self._forced: bool | None = None
        self._failure = ""

    def __call__(
        self,
        scaled: Tensor,
        mean: Tensor,
        scale: Tensor,
        zero: Tensor,
        top: Tensor,
        dim: int,
        shrinks: bool,
    ) -> tuple[Tensor, Tensor]:
        """See ``_eager_steps`` in :mod:`lsq_core.quantization.hqq.solver`."""
        inputs = (scaled, mean, scale, zero, top, dim, shrinks)
        variant = (dim, shrinks)
        self._weights_solved[variant] += scaled.numel()
        if scaled.numel() < MIN_COMPILED_WEIGHTS or not self._should_compile(variant):
            return self.eager(*inputs)
        if self._compiled is None:
            self._compiled = torch.compile(self.eager, dynamic=True)
        try:
            return self._compiled(*inputs)
        except Exception as error:  # the eager steps work even where the compiler fails
            self._failure = f"compiling failed: {exception_reason(error)}"
            _log.warning("%s; continuing without compilation", self._failure)
            return self.eager(*inputs)

    @property
    def backend(self) -> SolverBackend:
        """The current backend, ``compiled`` or ``eager``, and the reason if it is eager."""
        if any(self._should_compile(variant) for variant in [*self._weights_solved, (-1, False)]):
            return SolverBackend("compiled")
        if self._forced is False:
            return SolverBackend("eager", "requested")
        solved = max(self._weights_solved.values(), default=0)
        return SolverBackend(
            "eager",
            self._failure
            or _missing_compiler()
            or f"compiling pays after {COMPILE_AFTER_WEIGHTS / 1e6:,.0f} million weights; "
            f"{solved / 1e6:,.0f} million were solved so far",
        )

    @contextmanager
    def force_compiled(self, compiled: bool) -> Iterator[None]:
        """Compile from the first weight on, or never, within a ``with`` block."""
        before, self._forced = self._forced, compiled
        try:
            yield
        finally:
            self._forced = before

    def _should_compile(self, variant: tuple[int, bool]) -> bool:
        if self._forced is False or self._failure or _missing_compiler():
            return False
        return bool(self._forced) or self._weights_solved[variant] >= COMPILE_AFTER_WEIGHTS


def _missing_compiler() -> str:
    """Return why nothing can be compiled on this machine, or an empty string."""
    return _find_missing_compiler(os.environ.get("CXX"), os.environ.get("PATH"))


@cache
def _find_missing_compiler(named: str | None, path: str | None) -> str:
    """Search for a compiler; cached, since this takes as long as a few steps of a small matrix."""
    if any(shutil.which(name, path=path) for name in ([named] if named else ["g++", "clang++"])):
        return ""
    return f"there is no C++ compiler ({named or 'g++ or clang++'})"
