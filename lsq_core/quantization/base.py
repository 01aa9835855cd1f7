"""What a quantizer of matrices is, and what it stores a matrix as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lsq_core.bits import Config, QuantConfig

#: The high-impact rows of each matrix that has mixed rows, by its name.
HighImpactRows = Mapping[str, Sequence[int]]


@dataclass(frozen=True, eq=False)
class Grid:
    """The grid a quantizer chose for a matrix: ``weight ≈ (code − zero) · scale`` in each group.

    ``scale`` and ``zero`` are float32 of shape (groups,).
    """

    scale: Tensor
    zero: Tensor


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """One (out, in) matrix as stored; a subclass's fields beside these are its tensors."""

    shape: tuple[int, int]
    config: Config
    axis: int

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by name, as the quantizer's layout names them."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Measured bytes: of the tensors themselves."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights (out, in), computed in float32 and then cast."""
        raise NotImplementedError

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], config: Config, axis: int
    ) -> Self:
        """The inverse of :attr:`tensors`."""
        raise NotImplementedError


class MatrixQuantizer:
    """A quantizer that takes a matrix by itself: one file, and one entry in ``QUANTIZERS``."""

    matrix: ClassVar[type[StoredMatrix]]

    def store(self, weight: Tensor, config: QuantConfig, axis: int, metadata: str) -> StoredMatrix:
        """Quantize a (out, in) float32 matrix that groups of the configuration fill.

        Raises nothing for finite weights.
        """
        raise NotImplementedError

    def round_trip(self, weight: Tensor, config: QuantConfig, axis: int, metadata: str) -> Tensor:
        """What :meth:`store` and dequantizing make of a matrix, float32 (out, in)."""
        return self.store(weight, config, axis, metadata).dequantize()

    def levels(self, groups: Tensor, config: QuantConfig) -> Tensor:
        """What each code of float32 (groups, group_size) stands for, (groups, codes), ascending.

        Scale and zero are those before they are stored.
        """
        raise NotImplementedError


def to_groups(weight: Tensor, group_size: int, axis: int) -> Tensor:
    """A matrix as (groups, group_size), the way ``hqq`` groups.

    Axis 1 takes ``group_size`` weights in row order (a group may cross rows where it does not
    divide the width); axis 0 takes every ``numel / group_size``-th weight.
    """
    if axis == 1:
        return weight.reshape(-1, group_size)
    return weight.reshape(group_size, -1).T


def from_groups(groups: Tensor, shape: tuple[int, int], axis: int) -> Tensor:
    """The matrix of :func:`to_groups`, put together again."""
    return (groups if axis == 1 else groups.T).reshape(shape)


def round_to_grid(groups: Tensor, grid: Grid, bits: int) -> Tensor:
    """The nearest code (uint8) for each weight of (groups, group_size) on the grid."""
    codes = groups / grid.scale[:, None] + grid.zero[:, None]
    return codes.round_().clamp_(0, 2**bits - 1).to(torch.uint8)
