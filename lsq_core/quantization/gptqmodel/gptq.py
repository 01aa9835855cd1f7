"""GPTQ (arXiv 2210.17323): rounds one input channel at a time and compensates in the others.

``gptqmodel`` quantizes; this module decodes, so a saved model does not need the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lsq_core.bits import QuantConfig
from lsq_core.quantization.base import StoredMatrix
from lsq_core.quantization.gptqmodel.process import GptqmodelQuantizer
from lsq_core.quantization.packed import unpack_bits


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Unpack codes (rows, n), uint8, from int32 (rows, n·bits/32), lowest bits first.

    A code may span two words, as 3-bit codes do.
    """
    count = words.shape[1] * 32 // bits
    stream = words.contiguous().view(torch.uint8).flatten()
    return unpack_bits(stream, bits, len(words) * count).view(len(words), count)


@dataclass(frozen=True, eq=False)
class GptqMatrix(StoredMatrix):
    """A matrix in ``gptqmodel``'s ``gptq`` format (:func:`lsq_core.quantization.layout.gptq`)."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by name."""
        return {
            "qweight": self.qweight,
            "qzeros": self.qzeros,
            "scales": self.scales,
            "g_idx": self.g_idx,
        }

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights (out, in), computed in float32 and then cast."""
        codes = unpack_words(self.qweight.T, self.config.bits)
        # The format stores zeros minus one, in as many bits as a code.
        zeros = (unpack_words(self.qzeros, self.config.bits) + 1) & (2**self.config.bits - 1)
        zeros, scales = zeros.T[:, self.g_idx].float(), self.scales.T[:, self.g_idx].float()
        return (codes.float().sub_(zeros).mul_(scales)).to(dtype)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], config: QuantConfig, axis: int
    ) -> GptqMatrix:
        """Create the matrix from its :attr:`tensors`."""
        return cls(shape, config, axis, **tensors)


class Gptq(GptqmodelQuantizer):
    """GPTQ with ``gptqmodel``'s defaults: symmetric, inputs in original order, 5 % damping."""

    matrix = GptqMatrix
    method = "gptq"

    @staticmethod
    def scale_range(bits: int) -> tuple[float, float]:
        """Return the range supported by fp16 scales.

        Below 2⁻¹⁸ they have less than six bits left; 65,504 is their maximum.
        """
        return (2**bits - 1) * 2.0**-18, (2**bits - 1) * 65504.0
