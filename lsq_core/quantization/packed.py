"""Packed storage: codes without padding bits, and scale and zero in 8 bits or fp16.

Scales share a power of two, which is stored with them (:mod:`lsq_core.quantization.magnitude`), so
that quantization does not depend on a matrix's magnitude. ``layout.packed`` predicts the size of
these tensors and :attr:`PackedMatrix.nbytes` measures it; the two are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, gcd

import torch
from torch import Tensor

from lsq_core.bits import QuantConfig, is_divisible
from lsq_core.errors import InputError
from lsq_core.quantization import packed_triton
from lsq_core.quantization.base import (
    Grid,
    MatrixQuantizer,
    StoredMatrix,
    from_groups,
    highest_codes,
    nearest_codes,
    to_groups,
)
from lsq_core.quantization.checks import check_weights
from lsq_core.quantization.magnitude import (
    magnitude_exponent,
    normalizing_exponent,
    scale_by_power_of_two,
    storage_exponent,
)

#: A group whose zero point is further out than this is treated as constant.
_FAR_ZERO = 1024.0
#: So is a group at most this fraction as wide as the groups that share its 8-bit range: it would
#: take range from them without any gain of its own. In fp16, each group has its own scale.
_NARROW_RATIO = 2.0**-10
#: So is a group no wider than this in a matrix of ordinary magnitude: too narrow to divide by.
CONSTANT_SPREAD = 2.0**-100
#: Weights decoded at a time on the CPU: 2 MiB of float32, which stay in cache.
_CHUNK_WEIGHTS = 2**19


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes (n,) of ``bits`` each into uint8 (ceil(n·bits/8),), lowest bits first.

    Eight codes share ``bits`` bytes, so 3-bit codes take 3 bits rather than 3.2.
    """
    if bits == 8:
        return codes.clone()
    count = codes.numel()
    eights = torch.nn.functional.pad(codes, (0, -count % 8)).view(-1, 8)
    packed = eights.new_zeros(len(eights), bits)
    for i, byte, shift in _bit_offsets(bits):
        packed[:, byte] |= eights[:, i] << shift
        if shift + bits > 8:
            packed[:, byte + 1] |= eights[:, i] >> (8 - shift)
    return packed.flatten()[: ceil(count * bits / 8)].contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack ``count`` uint8 codes packed by :func:`pack_bits`.

    Each run of codes that fills whole bytes is spread over a word with one byte per code by
    repeatedly splitting it in half: a few operations on words instead of eight on single codes.
    """
    if bits == 8:
        return packed[:count]
    codes_per_run = 8 // gcd(8, bits)  # the fewest codes that fill whole bytes
    length = bits * codes_per_run // 8
    missing = -packed.numel() % length
    padded = torch.nn.functional.pad(packed, (0, missing)) if missing else packed
    first, *others = padded.view(-1, length).unbind(1)
    words = first.new_empty(len(first), dtype=_WORDS[codes_per_run]).copy_(first)
    moved = torch.empty_like(words)
    for i, byte in enumerate(others, 1):
        words |= moved.copy_(byte).bitwise_left_shift_(8 * i)
    run = codes_per_run // 2
    while run:  # move the upper half of each run of codes to where its own bytes begin
        torch.bitwise_and(words, _upper_halves(bits * run, 16 * run, 8 * codes_per_run), out=moved)
        words ^= moved
        words |= moved.bitwise_left_shift_((8 - bits) * run)
        run //= 2
    return words.view(torch.uint8)[:count]


#: Integer dtype with one byte per code, by number of codes.
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _upper_halves(half: int, lane: int, width: int) -> int:
    """Return a mask of ``width`` bits that selects the second ``half`` bits of every ``lane``."""
    return sum((2**half - 1) << start + half for start in range(0, width, lane))


def _bit_offsets(bits: int) -> list[tuple[int, int, int]]:
    """Return the index, first byte and bit offset within that byte of each of eight codes."""
    return [(i, bits * i // 8, bits * i % 8) for i in range(8)]


@dataclass(frozen=True, eq=False)
class Metadata:
    """The stored scale or zero of every group.

    Either fp16 values (groups,), or uint8 codes (groups,) that are evenly spaced between the lowest
    and highest value of a metadata group, fp16 (metadata groups, 2). Scales are multiplied by
    2^exponent, int16 (1,); zero points, which are in units of codes, have no exponent, and neither
    have scales in format 2. For several configurations, each shape has one more leading dimension.
    """

    values: Tensor
    ranges: Tensor | None
    group_size: int = 128
    exponent: Tensor | None = None

    @classmethod
    def store_scale(cls, values: Tensor, metadata: str, group_size: int = 128) -> Metadata:
        """Store scales, float32 (…, groups) of any magnitude, as ``fp16`` or ``8bit``."""
        exponent = storage_exponent(values)
        scaled_values = scale_by_power_of_two(values, -exponent)
        if metadata == "8bit":
            scaled_values = _avoid_clipping(scaled_values, group_size)
        return replace(cls.store(scaled_values, metadata, group_size), exponent=exponent)

    @classmethod
    def store(cls, values: Tensor, metadata: str, group_size: int = 128) -> Metadata:
        """Store float32 values (…, groups) within fp16's range as ``fp16`` or ``8bit``."""
        if metadata == "fp16":
            return cls(values.half(), None, group_size)
        padded = _pad_with_last(values, group_size)
        lowest, negative_highest = padded.amin(-1), -padded.amax(-1)
        ranges = _round_down_to_fp16(torch.stack([lowest, negative_highest], dim=-1))
        ranges[..., 1].neg_()
        low, step = _range_steps(ranges)
        codes = ((padded - low) / step).round_().clamp_(0, 255).to(torch.uint8)
        return cls(_without_padding(codes, values).contiguous(), ranges, group_size)

    def __getitem__(self, number: int) -> Metadata:
        """Return the metadata of one of several configurations."""
        own = {
            name: None if tensor is None else tensor[number]
            for name in ("values", "ranges", "exponent")
            for tensor in [getattr(self, name)]
        }
        return replace(self, **own)

    def scaled(self, exponent: int | Tensor) -> Metadata:
        """Return the values multiplied by 2^exponent; requires metadata with an exponent."""
        return replace(self, exponent=self.exponent + exponent)

    def decode(self) -> Tensor:
        """Return the values as float32 (…, groups)."""
        values = self.values.float()
        if self.ranges is not None:
            low, step = _range_steps(self.ranges)
            padded = _pad_with_last(values, self.group_size)
            values = _without_padding(padded * step + low, self.values)
        return values if self.exponent is None else scale_by_power_of_two(values, self.exponent)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        named = {"values": self.values, "ranges": self.ranges, "exponent": self.exponent}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def _avoid_clipping(scales: Tensor, group_size: int) -> Tensor:
    """Raise the smallest scales (…, groups) if their shared range is too wide for 256 codes.

    Scales that would round to the first code of a range are replaced by the largest of them: a grid
    coarser than a group needs only loses some precision, while one that is too fine clips weights.
    """
    padded = _pad_with_last(scales, group_size)
    lowest, highest = padded.amin(-1, keepdim=True), padded.amax(-1, keepdim=True)
    step = (highest - lowest) / 255
    first = (padded < lowest + step / 2) & (step > lowest)
    raised = torch.where(first, padded, 0).amax(-1, keepdim=True)
    return _without_padding(torch.where(first, raised, padded), scales)


def _pad_with_last(values: Tensor, group_size: int) -> Tensor:
    """Reshape (…, n) to (…, ceil(n / group_size), group_size), padding with the last value."""
    missing = -values.shape[-1] % group_size
    if missing:
        filling = values[..., -1:].expand(*values.shape[:-1], missing)
        values = torch.cat([values, filling], dim=-1)
    return values.unflatten(-1, (-1, group_size))


def _without_padding(padded: Tensor, values: Tensor) -> Tensor:
    """Reshape (…, rows, group_size) back to (…, n), the shape of the unpadded ``values``."""
    return padded.flatten(-2)[..., : values.shape[-1]]


def _range_steps(ranges: Tensor) -> tuple[Tensor, Tensor]:
    low, high = ranges.float().unbind(-1)
    step = (high - low) / 255
    return low[..., None], torch.where(step > 0, step, 1.0)[..., None]


def _round_down_to_fp16(values: Tensor) -> Tensor:
    """Round down to fp16, so that a range contains all its values."""
    half = values.half()
    below = torch.nextafter(half, torch.full_like(half, -torch.inf))
    return torch.where(half.float() > values, below, half)


@dataclass(frozen=True, eq=False)
class PackedMatrix(StoredMatrix):
    """A matrix in this project's packing: codes, scale and zero."""

    codes: Tensor
    scale: Metadata
    zero: Metadata

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by name."""
        named = {"codes": self.codes}
        for part, metadata in (("scale", self.scale), ("zero", self.zero)):
            named |= {f"{part}_{name}": tensor for name, tensor in metadata.tensors.items()}
        return named

    @property
    def uses_triton(self) -> bool:
        """Whether Triton kernels decode it: on a GPU, if they are enabled."""
        return self.codes.is_cuda and packed_triton.enabled()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights (out, in), computed in float32 and then cast.

        A single Triton kernel does this if :attr:`uses_triton`. On the CPU, groups are decoded in
        chunks that fit in cache.
        """
        if self.uses_triton:
            return packed_triton.decode(self, dtype)
        weights = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        size, bits = self.config.group_size, self.config.bits
        groups = weights.view(-1, size) if self.axis == 1 else weights.view(size, -1).T
        scale, zero = self.scale.decode()[:, None], self.zero.decode()[:, None]
        chunk_length = (
            8 * max(_CHUNK_WEIGHTS // size // 8, 1) if weights.device.type == "cpu" else len(groups)
        )
        for start in range(0, len(groups), chunk_length):
            chunk = slice(start, start + chunk_length)
            out = groups[chunk]
            packed = self.codes[start * size * bits // 8 :]
            codes = unpack_bits(packed[: ceil(out.numel() * bits / 8)], bits, out.numel())
            codes = codes.view(out.shape)
            if self.axis == 0:
                codes = codes.T.contiguous().T  # same memory order as the weights
            exact = out if dtype == torch.float32 else torch.empty_like(codes, dtype=torch.float32)
            torch.mul(torch.sub(codes, zero[chunk], out=exact), scale[chunk], out=out)
        return weights

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], config: QuantConfig, axis: int
    ) -> PackedMatrix:
        """Create the matrix from its :attr:`tensors`."""
        scale, zero = (
            Metadata(
                tensors[f"{part}_values"],
                tensors.get(f"{part}_ranges"),
                config.meta_group_size,
                tensors.get(f"{part}_exponent"),
            )
            for part in ("scale", "zero")
        )
        return cls(shape, config, axis, tensors["codes"], scale, zero)


class GridQuantizer(MatrixQuantizer):
    """A quantizer with a uniform grid, with scale and zero computed by :meth:`solve`."""

    matrix = PackedMatrix

    def solve(self, weight: Tensor, config: QuantConfig, axis: int) -> Grid:
        """Compute the grid of an (out, in) float32 matrix of ordinary magnitude.

        Groups are as in :func:`to_groups`. Never raises for finite weights.
        """
        raise NotImplementedError

    def solve_several(self, weight: Tensor, configs: Sequence[QuantConfig], axis: int) -> Grid:
        """Apply :meth:`solve` with several configurations of one group size: (configs, groups)."""
        grids = [self.solve(weight, config, axis) for config in configs]
        return Grid(
            torch.stack([grid.scale for grid in grids]), torch.stack([grid.zero for grid in grids])
        )

    def store(self, weight: Tensor, config: QuantConfig, axis: int, metadata: str) -> PackedMatrix:
        """Quantize and pack.

        The codes are rounded on the grid *as stored*, which compensates for the rounding of scale
        and zero.
        """
        codes, scale, zero, _ = self._quantize_on_stored_grids(weight, [config], axis, metadata)
        packed = pack_bits(codes.flatten().to(torch.uint8), config.bits)
        return PackedMatrix(tuple(weight.shape), config, axis, packed, scale[0], zero[0])

    def round_trip(self, weight: Tensor, config: QuantConfig, axis: int, metadata: str) -> Tensor:
        """See :class:`lsq_core.quantization.base.MatrixQuantizer`; without packing."""
        return self.round_trips(weight, [config], axis, metadata)[0]

    def round_trips(
        self, weight: Tensor, configs: Sequence[QuantConfig], axis: int, metadata: str
    ) -> Tensor:
        """See :class:`lsq_core.quantization.base.MatrixQuantizer`; in one pass, without packing."""
        codes, _, _, grid = self._quantize_on_stored_grids(weight, configs, axis, metadata)
        groups = codes.sub_(grid.zero[..., None]).mul_(grid.scale[..., None])
        return from_groups(groups, tuple(weight.shape), axis)

    def _quantize_on_stored_grids(
        self, weight: Tensor, configs: Sequence[QuantConfig], axis: int, metadata: str
    ) -> tuple[Tensor, Metadata, Metadata, Grid]:
        """Return codes, scale and zero of a float32 matrix of any magnitude, and the decoded grid.

        All configurations have the same group size. The codes are float32
        (configs, groups, group_size).
        """
        exponent = magnitude_exponent(weight)
        normalized = scale_by_power_of_two(weight, -exponent)
        groups = to_groups(normalized, configs[0].group_size, axis)
        grids = self.solve_several(normalized, configs, axis)
        scale, zero = store_grid(groups, grids, configs, metadata)
        top = _highest_codes(configs, weight.device)[..., None]
        decoded = Grid(scale.decode(), zero.decode())
        rounded_on = Grid(_nonzero_scale(decoded.scale), decoded.zero)
        codes = nearest_codes(groups, rounded_on, top)
        grid = Grid(scale_by_power_of_two(decoded.scale, exponent), decoded.zero)
        return codes, scale.scaled(exponent), zero, grid

    def levels(self, groups: Tensor, config: QuantConfig) -> Tensor:
        """See :class:`lsq_core.quantization.base.MatrixQuantizer`."""
        exponent = normalizing_exponent(groups)
        grid = self.solve(scale_by_power_of_two(groups, -exponent), config, axis=1)
        codes = torch.arange(2**config.bits, dtype=torch.float32)
        return scale_by_power_of_two((codes - grid.zero[:, None]) * grid.scale[:, None], exponent)


def quantize_matrix(
    weight: Tensor,
    config: QuantConfig,
    quantizer: MatrixQuantizer,
    *,
    axis: int = 1,
    metadata: str = "8bit",
    name: str = "the matrix",
) -> StoredMatrix:
    """Quantize an (out, in) matrix of any float dtype and store it.

    Raises
    ------
    InputError
        If ``config.group_size`` does not divide the matrix's size.
    LsqError
        If a weight is NaN or infinite, or too large compared with the others.
    """
    if not is_divisible(weight.numel(), config.group_size):
        raise InputError(
            f"{name} ({weight.shape[0]}×{weight.shape[1]}) cannot be divided into groups of "
            f"{config.group_size}; choose a configuration with a smaller group size for it."
        )
    weight = weight.float()
    check_weights({name: weight}, [config], axis)
    return quantizer.store(weight, config, axis, metadata)


def _highest_codes(configs: Sequence[QuantConfig], device: torch.device) -> Tensor:
    """Return the highest code of each configuration, float32 (configs, 1)."""
    return highest_codes(device, tuple(2**config.bits - 1 for config in configs))[:, None]


def store_grid(
    groups: Tensor, grid: Grid, configs: QuantConfig | Sequence[QuantConfig], metadata: str
) -> tuple[Metadata, Metadata]:
    """Return scale and zero as stored, for weights (groups, group_size) of ordinary magnitude.

    ``grid`` is for one configuration, or for several of one group size.
    """
    single = isinstance(configs, QuantConfig)
    meta_group_size = (configs if single else configs[0]).meta_group_size
    top = 2**configs.bits - 1 if single else _highest_codes(configs, groups.device)
    shared = 1 if metadata == "fp16" else meta_group_size
    grid = _stabilize_constant_groups(groups, grid, top, shared)
    scale = Metadata.store_scale(grid.scale, metadata, meta_group_size)
    return scale, Metadata.store(grid.zero, metadata, meta_group_size)


def stored_grid(scale: Metadata, zero: Metadata) -> Grid:
    """Return the grid on which weights are rounded, decoded from the stored scale and zero."""
    return Grid(_nonzero_scale(scale.decode()), zero.decode())


def _nonzero_scale(scale: Tensor) -> Tensor:
    """Replace scales rounded to zero in fp16 or 8 bits with 1, so that codes stay finite."""
    return torch.where(scale == 0, 1.0, scale)


def _stabilize_constant_groups(groups: Tensor, grid: Grid, top: int | Tensor, shared: int) -> Grid:
    """Give (almost) constant groups a scale similar to their neighbours'.

    A constant group has scale 1 and, if it is far from zero, a zero point in the thousands. Either
    would dominate the 8-bit range of ``shared`` groups or overflow fp16. Only the group's value
    matters, so it is expressed by a zero point of ordinary size. ``top`` is the highest code,
    (configs, 1) for several grids.
    """
    spread = groups.amax(1) - groups.amin(1)
    constant = (spread <= CONSTANT_SPREAD) | (grid.zero.abs() > _FAR_ZERO)
    if shared > 1:
        usual = _neighbor_median(spread, ~constant, shared)
        constant |= spread <= _NARROW_RATIO * usual
    value = groups.mean(1)
    typical = _neighbor_median(grid.scale, ~constant, shared)
    own = value.abs() / top
    # Without neighbours, any scale would do for a value of zero; use the largest of the matrix.
    fallback = torch.where(constant, own, grid.scale).amax(-1, keepdim=True)
    typical = torch.where(typical > 0, typical, torch.where(fallback > 0, fallback, 1.0))
    scale = torch.maximum(typical, own)
    return Grid(
        torch.where(constant, scale, grid.scale),
        torch.where(constant, -value / scale, grid.zero),
    )


def _neighbor_median(values: Tensor, mask: Tensor, shared: int) -> Tensor:
    """Return the median of the values in ``mask`` over each run of ``shared`` groups: (…, groups).

    The median is 0 for a run without such values.
    """
    known = torch.where(mask, values, torch.nan)
    missing = -known.shape[-1] % shared
    padded = torch.nn.functional.pad(known, (0, missing), value=torch.nan)
    medians = padded.unflatten(-1, (-1, shared)).nanmedian(-1, keepdim=True).values.nan_to_num(0)
    return _without_padding(medians.expand(*medians.shape[:-1], shared), known)
