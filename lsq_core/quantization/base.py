"""Interfaces of stored matrices and of quantizers that quantize one matrix at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from lsq_core.bits import Config, QuantConfig

#: The high-impact rows of each matrix with mixed rows, by matrix name.
HighImpactRows = Mapping[str, Sequence[int]]


@dataclass(frozen=True, eq=False)
class Grid:
    """The quantization grid of a matrix: ``weight ≈ (code − zero) · scale`` in each group.

    ``scale`` and ``zero`` are float32 of shape (groups,), or (configs, groups) for the grids of
    several configurations with the same groups.
    """

    scale: Tensor
    zero: Tensor

    def __getitem__(self, number: int) -> Grid:
        """Return one of several grids."""
        return Grid(self.scale[number], self.zero[number])


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """A stored (out, in) matrix; subclasses add its tensors as fields."""

    shape: tuple[int, int]
    config: Config
    axis: int

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All stored tensors, by their names in the quantizer's layout."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Measured bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights (out, in), computed in float32 and then cast."""
        raise NotImplementedError

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], config: Config, axis: int
    ) -> Self:
        """Create the matrix from its :attr:`tensors`."""
        raise NotImplementedError


class MatrixQuantizer:
    """A quantizer of single matrices: one file, and one entry in ``QUANTIZERS``."""

    matrix: ClassVar[type[StoredMatrix]]

    def store(self, weight: Tensor, config: QuantConfig, axis: int, metadata: str) -> StoredMatrix:
        """Quantize an (out, in) float32 matrix whose size is a multiple of the group size.

        Never raises for finite weights.
        """
        raise NotImplementedError

    def round_trip(self, weight: Tensor, config: QuantConfig, axis: int, metadata: str) -> Tensor:
        """Quantize a matrix and return it dequantized, float32 (out, in)."""
        return self.store(weight, config, axis, metadata).dequantize()

    def round_trips(
        self, weight: Tensor, configs: Sequence[QuantConfig], axis: int, metadata: str
    ) -> Tensor:
        """Apply :meth:`round_trip` with configurations of one group size: (configs, out, in)."""
        return torch.stack([self.round_trip(weight, c, axis, metadata) for c in configs])

    def levels(self, groups: Tensor, config: QuantConfig) -> Tensor:
        """Return the values of all codes in each group, ascending: (groups, codes).

        ``groups`` are float32 weights (groups, group_size). The values are based on the scale and
        zero before they are rounded for storage.
        """
        raise NotImplementedError


def to_groups(weight: Tensor, group_size: int, axis: int) -> Tensor:
    """Reshape a matrix to (groups, group_size), with the same grouping as ``hqq``.

    With axis 1, a group is ``group_size`` consecutive weights in row order (it may cross rows if
    the group size does not divide the width); with axis 0, every ``numel / group_size``-th weight.
    """
    if axis == 1:
        return weight.reshape(-1, group_size)
    return weight.reshape(group_size, -1).T


def from_groups(groups: Tensor, shape: tuple[int, int], axis: int) -> Tensor:
    """Reshape (…, groups, group_size) back to (…, out, in); the inverse of :func:`to_groups`."""
    return (groups if axis == 1 else groups.mT).reshape(*groups.shape[:-2], *shape)


def round_to_grid(groups: Tensor, grid: Grid, bits: int) -> Tensor:
    """Round each weight of (groups, group_size) to the nearest code of the grid, uint8."""
    return nearest_codes(groups, grid, 2**bits - 1).to(torch.uint8)


def nearest_codes(groups: Tensor, grid: Grid, top: int | Tensor) -> Tensor:
    """Return the nearest code for weights (groups, group_size), float32 (…, groups, group_size).

    ``top`` is the highest code, (configs, 1, 1) for several grids.
    """
    codes = groups / grid.scale[..., None] + grid.zero[..., None]
    return codes.round_().clamp_min_(0).clamp_max_(top)


@cache
def highest_codes(device: torch.device, tops: tuple[int, ...]) -> Tensor:
    """Return the highest codes of several grids, float32 (grids,); copied to a device only once."""
    with torch.inference_mode(False):
        return torch.tensor(tops, dtype=torch.float32, device=device)
