"""Mixed rows: a matrix whose high-impact rows are stored with more bits than the rest ([C]).

Both parts are packed like any matrix. The index of the high-impact rows is stored with them and
included in the size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsq_core.bits import FP16_BITS, Config, MixedRows, QuantConfig
from lsq_core.errors import InputError
from lsq_core.quantization.base import MatrixQuantizer, StoredMatrix
from lsq_core.quantization.checks import check_finite
from lsq_core.quantization.layout import row_index_layout
from lsq_core.quantization.magnitude import scale_by_power_of_two, storage_exponent
from lsq_core.quantization.packed import (
    PackedMatrix,
    pack_bits,
    quantize_matrix,
    unpack_bits,
)

#: Quantizes and stores some rows of a matrix with a configuration.
PackPart = Callable[[Tensor, QuantConfig], StoredMatrix]


@dataclass(frozen=True)
class _Shape:
    out_features: int
    in_features: int


@dataclass(frozen=True, eq=False)
class HalfMatrix(StoredMatrix):
    """Rows stored in fp16 and scaled by 2^exponent, int16 (1,), so that any magnitude fits.

    Saved models of format 2 have no exponent.
    """

    weights: Tensor
    exponent: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by name."""
        part_tensors = {"weights": self.weights, "exponent": self.exponent}
        return {name: tensor for name, tensor in part_tensors.items() if tensor is not None}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights (rows, in), computed in float32 and then cast."""
        if self.exponent is None:
            return self.weights.to(dtype)
        return scale_by_power_of_two(self.weights.float(), self.exponent).to(dtype)

    @classmethod
    def store(cls, weight: Tensor, config: QuantConfig, axis: int) -> HalfMatrix:
        """Store (rows, in) weights of any float dtype; lossless for fp16 weights."""
        weight = weight.float()
        exponent = storage_exponent(weight.flatten())
        part_tensors = scale_by_power_of_two(weight, -exponent).half()
        return cls(tuple(weight.shape), config, axis, part_tensors, exponent)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], config: QuantConfig, axis: int
    ) -> HalfMatrix:
        """Create the matrix from its :attr:`tensors`."""
        return cls(shape, config, axis, **tensors)


@dataclass(frozen=True, eq=False)
class PackedRows(StoredMatrix):
    """A matrix of mixed rows: the high-impact rows, the other rows, and the index.

    ``index`` is a bitmap, uint8 (ceil(out / 8),), or the sorted row numbers, int16 or int32
    (rows,). ``high`` is None if the ratio rounds to no rows.
    """

    index: Tensor
    high: StoredMatrix | None
    low: StoredMatrix

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by name."""
        row_list = {"rows": self.index}
        for name, part in (("high", self.high), ("low", self.low)):
            part_tensors = part.tensors if part is not None else {}
            row_list |= {f"{name}_{key}": tensor for key, tensor in part_tensors.items()}
        return row_list

    @property
    def is_high(self) -> Tensor:
        """Mask of the high-impact rows, bool (out,)."""
        if self.index.dtype == torch.uint8:
            return unpack_bits(self.index, 1, self.shape[0]).bool()
        marked = torch.zeros(self.shape[0], dtype=torch.bool, device=self.index.device)
        marked[self.index.long()] = True
        return marked

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights (out, in), computed in float32 and then cast."""
        low = self.low.dequantize(dtype)
        if self.high is None:
            return low
        marked, weight = self.is_high, low.new_empty(self.shape)
        weight[marked] = self.high.dequantize(dtype)
        weight[~marked] = low
        return weight

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], config: MixedRows, axis: int
    ) -> PackedRows:
        """Create the matrix from its :attr:`tensors`."""
        part_tensors: dict[str, dict[str, Tensor]] = {"high": {}, "low": {}}
        for name, tensor in tensors.items():
            part, _, key = name.partition("_")
            if key:
                part_tensors[part][key] = tensor
        (out, width), count = shape, config.high_rows(shape[0])
        high = None
        if count:
            kind = HalfMatrix if config.high_bits == FP16_BITS else PackedMatrix
            high = kind.from_tensors(part_tensors["high"], (count, width), config.high, axis)
        low = PackedMatrix.from_tensors(part_tensors["low"], (out - count, width), config.low, axis)
        return cls(shape, config, axis, tensors["rows"], high, low)


def quantize_config(
    weight: Tensor,
    config: Config,
    quantizer: MatrixQuantizer,
    *,
    rows: Sequence[int] | None = None,
    axis: int = 1,
    metadata: str = "8bit",
    name: str = "the matrix",
) -> StoredMatrix:
    """Quantize an (out, in) matrix with any configuration.

    ``rows`` are the numbers of the high-impact rows, for a mixed-row configuration.

    Raises
    ------
    InputError, LsqError
        See :func:`lsq_core.quantization.packed.quantize_matrix` and :func:`pack_rows`.
    """

    def pack(part: Tensor, own: QuantConfig) -> StoredMatrix:
        return quantize_matrix(part, own, quantizer, axis=axis, metadata=metadata, name=name)

    if isinstance(config, QuantConfig):
        return pack(weight, config)
    return pack_rows(weight, config, rows, axis, pack, pack, name)


def pack_rows(
    weight: Tensor,
    config: MixedRows,
    rows: Sequence[int] | None,
    axis: int,
    pack_high: PackPart,
    pack_low: PackPart,
    name: str = "the matrix",
) -> PackedRows:
    """Split an (out, in) matrix into high-impact ``rows`` and the others, and pack each part.

    Raises
    ------
    InputError
        If the number of rows does not match the ratio, or rows cannot be divided into groups.
    LsqError
        If a weight is NaN or infinite.
    """
    shape = (weight.shape[0], weight.shape[1])
    if not config.fits(_Shape(*shape)):
        raise InputError(
            f"{name} ({shape[0]}×{shape[1]}) has rows that cannot be divided into groups of "
            f"{config.group_size}; choose a smaller group size."
        )
    count = config.high_rows(shape[0])
    row_list = [] if rows is None else sorted(set(map(int, rows)))
    if len(row_list) != count:
        raise InputError(
            f"{name} needs {count} high-impact rows for {config.name}, but {len(row_list)} "
            "were given."
        )
    check_finite(weight, name)
    row_numbers = torch.tensor(row_list, dtype=torch.int64, device=weight.device)
    marked = torch.zeros(shape[0], dtype=torch.bool, device=weight.device)
    marked[row_numbers] = True
    high: StoredMatrix | None = None
    if count and config.high_bits == FP16_BITS:
        high = HalfMatrix.store(weight[row_numbers], config.high, axis)
    elif count:
        high = pack_high(weight[row_numbers], config.high)
    low = pack_low(weight[~marked], config.low)
    return PackedRows(
        shape, config, axis, _encode_row_index(row_numbers, marked, config), high, low
    )


def _encode_row_index(row_numbers: Tensor, marked: Tensor, config: MixedRows) -> Tensor:
    """Encode the high-impact rows in the form given by the layout: a bitmap or row numbers."""
    _, dtype = row_index_layout(len(marked), config)
    if dtype == "U8":
        return pack_bits(marked.to(torch.uint8), 1)
    return row_numbers.to(torch.int16 if dtype == "I16" else torch.int32)
