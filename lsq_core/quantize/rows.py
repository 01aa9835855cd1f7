"""Mixed rows: a matrix whose high-impact rows are stored at more bits than the rest ([C]).

Both parts are packed as any matrix is; beside them lies which rows are the high-impact ones, and
its bytes count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsq_core.config import HALF, Config, MixedRows, QuantConfig
from lsq_core.errors import InputError
from lsq_core.quantize.base import Quantizer
from lsq_core.quantize.packed import (
    PackedMatrix,
    check_finite,
    pack_bits,
    quantize_matrix,
    unpack_bits,
)


@dataclass(frozen=True)
class _Shape:
    out_features: int
    in_features: int


@dataclass(frozen=True, eq=False)
class HalfMatrix:
    """Rows kept in fp16 as they are; it has what :class:`PackedMatrix` has."""

    weights: Tensor
    config: QuantConfig

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by name."""
        return {"weights": self.weights}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights (rows, in)."""
        return self.weights.to(dtype)


@dataclass(frozen=True, eq=False)
class PackedRows:
    """One matrix as stored: the high-impact rows, the rest, and which rows are which.

    ``index`` is a bitmap, uint8 (ceil(out / 8),), or the sorted row numbers, int16 or int32
    (rows,). ``high`` is None where the ratio of the rows rounds to none.
    """

    index: Tensor
    high: PackedMatrix | HalfMatrix | None
    low: PackedMatrix
    shape: tuple[int, int]
    config: MixedRows
    axis: int

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by name."""
        named = {"rows": self.index}
        for name, part in (("high", self.high), ("low", self.low)):
            held = part.tensors if part is not None else {}
            named |= {f"{name}_{key}": tensor for key, tensor in held.items()}
        return named

    @property
    def nbytes(self) -> int:
        """Measured bytes: of the tensors themselves."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def is_high(self) -> Tensor:
        """Which rows are high-impact, bool (out,)."""
        if self.index.dtype == torch.uint8:
            return unpack_bits(self.index, 1, self.shape[0]).bool()
        marked = torch.zeros(self.shape[0], dtype=torch.bool, device=self.index.device)
        marked[self.index.long()] = True
        return marked

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights (out, in), computed in float32 and then cast."""
        low = self.low.dequantize(dtype)
        if self.high is None:
            return low
        marked, weight = self.is_high, low.new_empty(self.shape)
        weight[marked] = self.high.dequantize(dtype)
        weight[~marked] = low
        return weight

    @classmethod
    def empty(
        cls, shape: tuple[int, int], config: MixedRows, axis: int, metadata: str
    ) -> PackedRows:
        """Tensors of the right shapes and dtypes on the meta device, to be filled from a file."""
        rows = torch.arange(config.high_rows(shape[0]))
        index = _store_index(rows, shape, config).to("meta")
        high = None
        if len(rows) and config.high_bits == HALF:
            weights = torch.empty(len(rows), shape[1], dtype=torch.float16, device="meta")
            high = HalfMatrix(weights, config.high)
        elif len(rows):
            high = PackedMatrix.empty((len(rows), shape[1]), config.high, axis, metadata)
        rest = (shape[0] - len(rows), shape[1])
        low = PackedMatrix.empty(rest, config.low, axis, metadata)
        return cls(index, high, low, shape, config, axis)

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], shape: tuple[int, int], config: MixedRows, axis: int
    ) -> PackedRows:
        """The inverse of :attr:`tensors`."""
        held: dict[str, dict[str, Tensor]] = {"high": {}, "low": {}}
        for name, tensor in tensors.items():
            part, _, key = name.partition("_")
            if key:
                held[part][key] = tensor
        count, high = config.high_rows(shape[0]), None
        if count and config.high_bits == HALF:
            high = HalfMatrix(held["high"]["weights"], config.high)
        elif count:
            part = (count, shape[1])
            high = PackedMatrix.from_tensors(held["high"], part, config.high, axis)
        rest = (shape[0] - count, shape[1])
        low = PackedMatrix.from_tensors(held["low"], rest, config.low, axis)
        return cls(tensors["rows"], high, low, shape, config, axis)


#: A matrix as stored, whatever its configuration.
Packed = PackedMatrix | PackedRows


def packed_kind(config: Config) -> type[Packed]:
    """What a matrix of this configuration is stored as."""
    return PackedRows if isinstance(config, MixedRows) else PackedMatrix


def quantize_config(
    weight: Tensor,
    config: Config,
    quantizer: Quantizer,
    *,
    rows: Tensor | None = None,
    axis: int = 1,
    metadata: str = "8bit",
    name: str = "the matrix",
) -> Packed:
    """Quantize a (out, in) matrix at any configuration.

    ``rows`` are the numbers of the high-impact rows, int64; only mixed rows read them.

    Raises
    ------
    InputError, LsqError
        As :func:`lsq_core.quantize.packed.quantize_matrix`; and when rows are missing.
    """

    def pack(part: Tensor, own: QuantConfig) -> PackedMatrix:
        return quantize_matrix(part, own, quantizer, axis=axis, metadata=metadata, name=name)

    if isinstance(config, QuantConfig):
        return pack(weight, config)
    return pack_rows(weight, config, rows, axis, pack, pack, name)


def pack_rows(
    weight: Tensor,
    config: MixedRows,
    rows: Tensor | None,
    axis: int,
    pack_high: Callable[[Tensor, QuantConfig], PackedMatrix],
    pack_low: Callable[[Tensor, QuantConfig], PackedMatrix],
    name: str = "the matrix",
) -> PackedRows:
    """Part a (out, in) matrix into high-impact ``rows`` and the rest, and pack each its own way.

    Raises
    ------
    InputError
        When there are not as many rows as the ratio says, or groups don't fill a row.
    LsqError
        When a weight is NaN or infinite.
    """
    shape = (weight.shape[0], weight.shape[1])
    if not config.fits(_Shape(*shape)):
        raise InputError(
            f"{name} ({shape[0]}×{shape[1]}) has rows that cannot be cut into groups of "
            f"{config.group_size}; choose a smaller group size."
        )
    count = config.high_rows(shape[0])
    if rows is None or len(rows.unique()) != count:
        raise InputError(
            f"{name} needs {count} high-impact rows for {config.name}, and "
            f"{0 if rows is None else len(rows.unique())} are named."
        )
    check_finite(weight, name)
    rows = rows.to(weight.device).sort().values
    marked = torch.zeros(shape[0], dtype=torch.bool, device=weight.device)
    marked[rows] = True
    high: PackedMatrix | HalfMatrix | None = None
    if count and config.high_bits == HALF:
        high = HalfMatrix(weight[rows].half(), config.high)
    elif count:
        high = pack_high(weight[rows], config.high)
    low = pack_low(weight[~marked], config.low)
    return PackedRows(_store_index(rows, shape, config), high, low, shape, config, axis)


def _store_index(rows: Tensor, shape: tuple[int, int], config: MixedRows) -> Tensor:
    """The sorted ``rows`` as a bitmap or as their numbers, whichever is smaller."""
    bitmap, listed = config.index_sizes(shape[0])
    if listed <= bitmap:
        return rows.to(torch.int16 if shape[0] <= 2**15 else torch.int32)
    marked = torch.zeros(shape[0], dtype=torch.uint8, device=rows.device)
    marked[rows] = 1
    return pack_bits(marked, 1)
