"""What a quantizer is, and what it stores a matrix as."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from lsq_core.config import Config, QuantConfig

if TYPE_CHECKING:
    from pathlib import Path

    from lsq_core.load import LoadedModel
    from lsq_core.model import Matrix
    from lsq_core.profile import ProfileSettings
    from lsq_core.quantize.remembered import Remembered

Progress = Callable[[int, int, str], None]
#: The high-impact rows of each matrix that has mixed rows, by its name.
Rows = Mapping[str, Sequence[int]]


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


class Quantizer(Protocol):
    """One file a quantizer, one entry in ``lsq_core.quantize.QUANTIZERS``."""

    #: What it stores a matrix as that has one configuration.
    matrix: ClassVar[type[StoredMatrix]]

    def quantize_model(
        self,
        loaded: LoadedModel,
        choice: Mapping[Matrix, Config],
        settings: ProfileSettings,
        progress: Progress,
        *,
        rows: Rows | None = None,
        remembered: Remembered | None = None,
        folder: Path | None = None,
    ) -> nn.Module:
        """A quantized copy of a loaded model; the original stays as it was.

        ``settings`` say how weights are grouped, how scale and zero are stored, and which text
        is read for calibration; a quantizer takes from them what it needs. One that works matrix
        by matrix does not make again what is ``remembered`` of this very model. One that takes
        long keeps in ``folder``, which is for these arguments alone, what it has so far, and goes
        on from there; ``remembered`` counts the seconds that this saves.

        Raises
        ------
        InputError, LsqError
            When the model or the text cannot be taken.
        """
        ...


class MatrixQuantizer:
    """A quantizer that takes a matrix by itself; it says how in :meth:`store`."""

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

    def quantize_model(
        self,
        loaded: LoadedModel,
        choice: Mapping[Matrix, Config],
        settings: ProfileSettings,
        progress: Progress,
        *,
        rows: Rows | None = None,
        remembered: Remembered | None = None,
        folder: Path | None = None,
    ) -> nn.Module:
        """See :class:`Quantizer`: matrix by matrix."""
        from lsq_core.quantize.apply import quantize_model

        return quantize_model(
            loaded.model,
            choice,
            self,
            rows=rows,
            axis=settings.axis,
            metadata=settings.metadata,
            progress=progress,
            remembered=remembered,
        )


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
