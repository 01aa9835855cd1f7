"""What a quantizer is: it finds codes, scale and zero of one matrix at one configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lsq_core.config import QuantConfig


@dataclass(frozen=True, eq=False)
class Grid:
    """The grid a quantizer chose for a matrix: ``weight ≈ (code − zero) · scale`` in each group.

    ``scale`` and ``zero`` are float32 of shape (groups,).
    """

    scale: Tensor
    zero: Tensor


class Quantizer(Protocol):
    """One file a quantizer, one entry in ``lsq_core.quantize.QUANTIZERS``."""

    name: str
    title: str

    def solve(self, weight: Tensor, config: QuantConfig, axis: int) -> Grid:
        """Find the grid of a (out, in) float32 matrix.

        Groups are those of :func:`to_groups`. Raises nothing for finite weights.
        """
        ...


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
