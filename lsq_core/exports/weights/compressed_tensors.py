"""Folders in compressed-tensors' format ``pack-quantized``.

It also represents a weight as ``(code − zero) · scale``, but its zero points are integers, so the
full-precision weights are rounded again. Codes and zero points are bit streams, lowest bits first,
in 32-bit words. Source: ``compressed_tensors`` 0.20.

A symmetric grid has its zero point in the middle of the codes, and its scale is found by search. An
asymmetric one has HQQ's scale and the integer zero point below or above HQQ's. transformers 5.23
refuses to load packed zero points, even those of compressed-tensors' own checkpoints; vLLM reads
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lsq_core.errors import LsqError
from lsq_core.exports.weights.base import Export, ExportMatrix, StoredType
from lsq_core.exports.weights.packed_folder import PackedFolder
from lsq_core.model.dtypes import item_bytes, torch_dtype
from lsq_core.quantization.packed import pack_bits, unpack_bits

if TYPE_CHECKING:
    from torch import Tensor

_FORMAT = "pack-quantized"
_WORD = 32
#: Bytes of a matrix's shape: rows and columns, int64.
_SHAPE_BYTES = 16
#: Number of scales tried for a group on a symmetric grid, and the smallest as a fraction of the
#: scale at which the lowest code is the group's largest magnitude.
_SCALES, _LEAST_SCALE = 24, 0.3


@dataclass(frozen=True)
class CompressedTensors(PackedFolder):
    """Rounds weights again on symmetric grids, which transformers can load."""

    title: ClassVar[str] = "compressed-tensors"
    parts: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale", "weight_shape")
    symmetric: ClassVar[bool] = True

    def stored_type(self, matrix: ExportMatrix) -> StoredType:
        """See :class:`WeightExporter`."""
        group_size = self.group_size(matrix)
        if group_size is None:
            return self.full_precision(matrix)
        bits, rows, width = matrix.config.bits, matrix.out_features, matrix.in_features
        groups = width // group_size
        words = rows * ceil(width * bits / _WORD)
        words += 0 if self.symmetric else ceil(rows * bits / _WORD) * groups
        size = 4 * words + item_bytes(self.dtype) * rows * groups + _SHAPE_BYTES
        return StoredType(f"int{bits}, groups of {group_size}", size, False, bits, group_size)

    def encode(self, export: Export, name: str, stored: StoredType) -> dict[str, Tensor]:
        """See :class:`PackedFolder`."""
        weight = export.weight(name)
        rows, dtype = weight.shape[0], torch_dtype(self.dtype)
        groups = weight.reshape(-1, stored.group_size)
        if self.symmetric:
            codes, scale = round_symmetrically(groups, stored.bits, dtype)
            zeros = {}
        else:
            codes, scale, whole = self._round_to_whole_zeros(export, name, stored, groups)
            packed_zeros = _pack_rows(whole.view(rows, -1).T, stored.bits)
            zeros = {"weight_zero_point": packed_zeros.T.contiguous()}
        if not bool(scale.isfinite().all()):
            raise LsqError(
                f"{name} has scales beyond the range of {self.dtype}, in which compressed-tensors "
                "keeps them; save it as lsq."
            )
        return {
            "weight_packed": _pack_rows(codes.view(rows, -1), stored.bits),
            "weight_scale": scale.to(dtype).view(rows, -1),
            "weight_shape": torch.tensor(weight.shape),
        } | zeros

    def _round_to_whole_zeros(
        self, export: Export, name: str, stored: StoredType, groups: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return a matrix's codes, scale and integer zero points, based on its original grid."""
        packed = export.packed(name)
        repeats = packed.config.group_size // stored.group_size
        scale, zero = (
            part.decode().cpu().repeat_interleave(repeats) for part in (packed.scale, packed.zero)
        )
        kept = scale.to(torch_dtype(self.dtype)).float()
        codes, whole = round_to_whole_zeros(groups, kept, zero, stored.bits)
        return codes, kept, whole

    def decode(self, tensors: Mapping[str, Tensor], bits: int, group_size: int) -> Tensor:
        """See :class:`PackedFolder`; uses compressed-tensors itself if it is installed."""
        if find_spec("compressed_tensors") is not None:
            return self._decode_by_package(tensors, bits, group_size)
        return self.decode_here(tensors, bits, group_size)

    def decode_here(self, tensors: Mapping[str, Tensor], bits: int, group_size: int) -> Tensor:
        """Decode as :meth:`decode` does, without the package."""
        rows, width = tensors["weight_shape"].tolist()
        scale = tensors["weight_scale"].float()[..., None]
        codes = _unpack_rows(tensors["weight_packed"], bits, width).view(rows, -1, group_size)
        if self.symmetric:
            return ((codes.float() - 2 ** (bits - 1)) * scale).view(rows, width)
        zeros = _unpack_rows(tensors["weight_zero_point"].T, bits, rows).T
        return ((codes.float() - zeros[..., None].float()) * scale).view(rows, width)

    def _decode_by_package(
        self, tensors: Mapping[str, Tensor], bits: int, group_size: int
    ) -> Tensor:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        scheme = QuantizationScheme(
            targets=[], weights=self._weight_arguments(bits, group_size), format=_FORMAT
        )
        exact = dict(tensors) | {"weight_scale": tensors["weight_scale"].float()}
        compressor = BaseCompressor.get_value_from_registry(_FORMAT)
        return compressor.decompress(exact, scheme)["weight"]

    def _weight_arguments(self, bits: int, group_size: int) -> dict[str, Any]:
        return {
            "num_bits": bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group",
            "group_size": group_size,
        }

    def config(self, config: dict[str, Any], export: Export) -> dict[str, Any]:
        """See :class:`PackedFolder`."""
        groups: dict[tuple[int, int], list[str]] = {}
        for name, stored in export.types.items():
            if stored.bits:
                groups.setdefault((stored.bits, stored.group_size), []).append(name)
        quantization = {
            "quant_method": "compressed-tensors",
            "format": _FORMAT,
            "quantization_status": "compressed",
            "config_groups": {
                f"b{bits}g{group_size}": {
                    "targets": names,
                    "weights": self._weight_arguments(bits, group_size),
                }
                for (bits, group_size), names in sorted(groups.items())
            },
            "ignore": self._left_alone(export),
        }
        return config | {"quantization_config": quantization}

    def _left_alone(self, export: Export) -> list[str]:
        """Return the linear modules that are not quantized."""
        linear = [n for n, m in export.quantized.named_modules() if type(m) is torch.nn.Linear]
        return linear + [name for name, stored in export.types.items() if not stored.bits]

    def quantized_modules(self, config: dict[str, Any]) -> dict[str, tuple[int, int]]:
        """See :class:`PackedFolder`."""
        groups = config["quantization_config"]["config_groups"].values()
        return {
            name: (group["weights"]["num_bits"], group["weights"]["group_size"])
            for group in groups
            for name in group["targets"]
        }


@dataclass(frozen=True)
class CompressedTensorsAsymmetric(CompressedTensors):
    """Rounds weights again on grids with integer zero points, which are stored packed."""

    title: ClassVar[str] = "compressed-tensors, asymmetric"
    parts: ClassVar[tuple[str, ...]] = (*CompressedTensors.parts, "weight_zero_point")
    symmetric: ClassVar[bool] = False


def round_symmetrically(groups: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round float32 weights (groups, group_size) on grids whose zero point is 2^(bits − 1).

    Returns uint8 codes (groups, group_size) and scales (groups,), float32 but exact in ``dtype``.
    Each group gets the scale with the smallest squared error among those tried.
    """
    middle = 2 ** (bits - 1)
    largest = groups.abs().amax(1) / middle
    best = torch.full_like(largest, torch.inf)
    codes, scales = torch.zeros_like(groups, dtype=torch.uint8), torch.zeros_like(largest)
    for share in torch.linspace(_LEAST_SCALE, middle / (middle - 1), _SCALES).tolist():
        scale = (largest * share).to(dtype).float()
        tried = groups / torch.where(scale == 0, 1.0, scale)[:, None]
        tried = tried.round_().clamp_(-middle, middle - 1)
        error = (tried * scale[:, None] - groups).square().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
        codes = torch.where(better[:, None], (tried + middle).to(torch.uint8), codes)
    return codes, scales


def round_to_whole_zeros(
    groups: Tensor, scale: Tensor, zero: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Round float32 weights (groups, group_size) on grids with integer zero points.

    ``scale`` and ``zero`` are float32 (groups,). Returns uint8 codes (groups, group_size) and zero
    points (groups,): for each group, ``zero`` rounded down or up and clamped to the range of codes,
    whichever gives the smaller squared error.
    """
    top = 2**bits - 1
    steps = groups / torch.where(scale == 0, 1.0, scale)[:, None]
    candidates = []
    for whole in (zero.floor(), zero.ceil()):
        whole = whole.clamp(0, top)
        codes = (steps + whole[:, None]).round_().clamp_(0, top)
        error = ((codes - whole[:, None]) * scale[:, None] - groups).square().sum(1)
        candidates.append((codes.to(torch.uint8), whole.to(torch.uint8), error))
    (low_codes, low, low_error), (high_codes, high, high_error) = candidates
    upper = high_error < low_error
    return torch.where(upper[:, None], high_codes, low_codes), torch.where(upper, high, low)


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of uint8 codes (rows, n) into words, int32 (rows, ceil(n · bits / 32))."""
    fill = -codes.shape[1] % _WORD  # 32 codes fill whole words at any width
    padded = torch.nn.functional.pad(codes, (0, fill)).contiguous()
    words = pack_bits(padded.flatten(), bits).view(torch.int32).view(len(codes), -1)
    return words[:, : ceil(codes.shape[1] * bits / _WORD)].contiguous()


def _unpack_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack the first ``count`` codes of each row from :func:`_pack_rows`, uint8 (rows, count)."""
    padded = torch.nn.functional.pad(words, (0, -words.shape[1] % bits)).contiguous()
    codes = padded.numel() * _WORD // bits
    return unpack_bits(padded.view(torch.uint8).flatten(), bits, codes).view(len(words), -1)[
        :, :count
    ]
