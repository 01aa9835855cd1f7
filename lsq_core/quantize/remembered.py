"""Packed matrices that were made before, kept up to so many bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from lsq_core.quantize.packed import PackedMatrix


class Remembered:
    """What plans of one model share: each packed matrix by everything that it depends on.

    Beyond ``limit`` bytes the least recently used ones are let go. Models that hold a matrix share
    its tensors, so what is remembered takes memory of its own only once no model holds it.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._kept: OrderedDict[Hashable, PackedMatrix] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], PackedMatrix]) -> PackedMatrix:
        """The matrix of a key, made now if it isn't remembered."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        packed = make()
        if packed.nbytes <= self.limit:
            self._kept[key] = packed
            self.bytes += packed.nbytes
        while self.bytes > self.limit:
            _, oldest = self._kept.popitem(last=False)
            self.bytes -= oldest.nbytes
        return packed
