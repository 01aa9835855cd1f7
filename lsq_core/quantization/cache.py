"""Packed matrices that were made before, kept up to so many bytes."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

from lsq_core.quantization.base import StoredMatrix


class PackedMatrixCache:
    """What plans of one model share: each packed matrix by everything that it depends on.

    Beyond ``limit`` bytes the least recently used ones are let go. Models that hold a matrix share
    its tensors, so what is remembered takes memory of its own only once no model holds it.
    ``saved_seconds`` is the time that those which were asked for again took when they were made.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.saved_seconds = limit, 0, 0.0
        self._entries: OrderedDict[Hashable, tuple[StoredMatrix, float]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], StoredMatrix]) -> StoredMatrix:
        """The matrix of a key, made now if it isn't remembered."""
        if key in self._entries:
            self._entries.move_to_end(key)
            packed, seconds = self._entries[key]
            self.saved_seconds += seconds
            return packed
        start_time = time.perf_counter()
        packed = make()
        if packed.nbytes <= self.limit:
            self._entries[key] = packed, time.perf_counter() - start_time
            self.bytes += packed.nbytes
        while self.bytes > self.limit:
            _, (oldest, _) = self._entries.popitem(last=False)
            self.bytes -= oldest.nbytes
        return packed
