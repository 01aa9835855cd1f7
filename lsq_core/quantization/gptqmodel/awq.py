"""AWQ (arXiv 2306.00978): salient input channels are scaled up before rounding.

``gptqmodel`` quantizes; this module decodes, so a saved model does not need the package. The
inverse channel scales are merged into the preceding norms and matrices, which change as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lsq_core.bits import QuantConfig
from lsq_core.quantization.base import StoredMatrix
from lsq_core.quantization.gptqmodel.gptq import unpack_words
from lsq_core.quantization.gptqmodel.process import GptqmodelQuantizer

#: Position of each of eight 4-bit codes in its word; codes of other widths are in order.
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, eq=False)
class AwqMatrix(StoredMatrix):
    """A matrix in ``gptqmodel``'s ``gemm`` format (:func:`lsq_core.quantization.layout.awq`)."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by name."""
        return {"qweight": self.qweight, "qzeros": self.qzeros, "scales": self.scales}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights (out, in), computed in float32 and then cast."""
        codes, zeros = (self._codes(words).float() for words in (self.qweight, self.qzeros))
        groups = codes.view(len(zeros), self.config.group_size, -1)
        weight = (groups - zeros[:, None]) * self.scales.float()[:, None]
        return weight.flatten(0, 1).T.to(dtype)

    def _codes(self, words: Tensor) -> Tensor:
        codes = unpack_words(words, self.config.bits)
        if self.config.bits != 4:
            return codes
        return codes.view(len(words), -1, 8)[:, :, _ORDER].flatten(1)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], config: QuantConfig, axis: int
    ) -> AwqMatrix:
        """Create the matrix from its :attr:`tensors`."""
        return cls(shape, config, axis, **tensors)


class Awq(GptqmodelQuantizer):
    """AWQ with zero points, as published, computed in bfloat16."""

    matrix = AwqMatrix
    method = "awq"

    @staticmethod
    def scale_range(bits: int) -> tuple[float, float]:
        """Return the range that bfloat16 scales support; the package clamps ranges at 10⁻⁵."""
        return 1e-5, torch.finfo(torch.bfloat16).max
