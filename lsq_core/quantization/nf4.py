"""4-bit NormalFloat (QLoRA, arXiv 2305.14314 §3), computed by ``bitsandbytes``.

A code selects one of sixteen quantiles of a normal distribution, which is multiplied by the largest
magnitude of its block. The tables are constants of the format and are not stored with a matrix.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from lsq_core.bits import QuantConfig
from lsq_core.quantization.base import MatrixQuantizer, StoredMatrix
from lsq_core.quantization.layout import NESTED_BLOCK
from lsq_core.quantization.magnitude import normalizing_exponent, scale_by_power_of_two


def _bitsandbytes() -> ModuleType:
    """Import the package's functions, silencing its advice on matmul kernels (not used here)."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes import functional

    return functional


@cache
def _quantiles(device: torch.device) -> Tensor:
    """Return the sixteen values of NF4, float32, ascending from −1 to 1."""
    return _bitsandbytes().get_4bit_type("nf4", device=device)


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    """Return the 256 float32 values of the 8-bit type used by double quantization."""
    return _bitsandbytes().create_dynamic_map().to(device)


@dataclass(frozen=True, eq=False)
class Nf4Matrix(StoredMatrix):
    """Two codes per byte, the earlier one in the high half; magnitudes are float32 (blocks,)."""

    codes: Tensor
    absmax: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by name."""
        return {"codes": self.codes, "absmax": self.absmax}

    @property
    def magnitudes(self) -> Tensor:
        """The largest magnitude of each block, float32 (blocks,)."""
        return self.absmax

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights (out, in), computed in float32 and then cast."""
        halves = torch.stack([self.codes >> 4, self.codes & 15], dim=1)
        values = _quantiles(self.codes.device)[halves.flatten().int()]
        blocks = values.view(-1, self.config.group_size) * self.magnitudes[:, None]
        return blocks.view(self.shape).to(dtype)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], config: QuantConfig, axis: int
    ) -> Nf4Matrix:
        """Create the matrix from its :attr:`tensors`."""
        return cls(shape, config, axis, **tensors)


@dataclass(frozen=True, eq=False)
class Nf4DoubleMatrix(Nf4Matrix):
    """Magnitudes, minus their mean, stored as uint8 codes in blocks that share a float32 scale."""

    absmax_scale: Tensor
    absmax_mean: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by name."""
        nested = {"absmax_scale": self.absmax_scale, "absmax_mean": self.absmax_mean}
        return super().tensors | nested

    @property
    def magnitudes(self) -> Tensor:
        """The largest magnitude of each block, float32 (blocks,)."""
        values = _dynamic_map(self.absmax.device)[self.absmax.int()]
        scale = self.absmax_scale.repeat_interleave(NESTED_BLOCK)[: len(values)]
        return values * scale + self.absmax_mean


class Nf4(MatrixQuantizer):
    """NF4 in blocks of the configuration's group size."""

    matrix: type[Nf4Matrix] = Nf4Matrix
    double = False

    def store(self, weight: Tensor, config: QuantConfig, axis: int, metadata: str) -> Nf4Matrix:
        """See :class:`lsq_core.quantization.base.MatrixQuantizer`; ``metadata`` is not used.

        The stored float32 magnitudes include the matrix's power of two. It is removed only while
        the package computes, whose sums and inverses could otherwise overflow or underflow.
        """
        exponent = normalizing_exponent(weight)
        codes, state = _bitsandbytes().quantize_4bit(
            scale_by_power_of_two(weight, -exponent).contiguous(),
            blocksize=config.group_size,
            quant_type="nf4",
            compress_statistics=self.double,
        )
        tensors = {"codes": codes.flatten(), "absmax": state.absmax}
        if self.double:
            tensors["absmax_scale"] = scale_by_power_of_two(state.state2.absmax, exponent)
            tensors["absmax_mean"] = scale_by_power_of_two(state.offset.reshape(1), exponent)
        else:
            tensors["absmax"] = scale_by_power_of_two(state.absmax, exponent)
        return self.matrix.from_tensors(tensors, tuple(weight.shape), config, axis)

    def levels(self, groups: Tensor, config: QuantConfig) -> Tensor:
        """See :class:`lsq_core.quantization.base.MatrixQuantizer`."""
        return groups.abs().amax(1, keepdim=True) * _quantiles(groups.device)


class Nf4Double(Nf4):
    """NF4 with double quantization: the magnitudes are quantized as well."""

    matrix = Nf4DoubleMatrix
    double = True
