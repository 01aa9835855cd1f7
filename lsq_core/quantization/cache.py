"""A least-recently-used cache of packed matrices, limited in bytes."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

from lsq_core.quantization.base import StoredMatrix


class PackedMatrixCache:
    """Packed matrices for all plans of one model, keyed by everything they depend on.

    Above ``limit`` bytes, the least recently used ones are evicted. Quantized models share the
    tensors of their matrices with the cache. ``saved_seconds`` is the total time that it originally
    took to quantize the matrices returned from the cache.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.saved_seconds = limit, 0, 0.0
        self._entries: OrderedDict[Hashable, tuple[StoredMatrix, float]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], StoredMatrix]) -> StoredMatrix:
        """Return the matrix for a key, computed by ``make`` if it is not cached."""
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
