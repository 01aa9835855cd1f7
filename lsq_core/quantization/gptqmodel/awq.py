"""AWQ (arXiv 2306.00978): inputs that matter are scaled up before rounding, and down before that.

Quantized by ``gptqmodel``; read and multiplied by here, so a saved model doesn't need it. The
scales go into the norms and matrices before, so more than the matrices changes.
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

#: Where each of eight 4-bit codes lies in its word; other widths lie in order.
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, eq=False)
class AwqMatrix(StoredMatrix):
    """The tensors of ``gptqmodel``'s ``gemm`` format, as :func:`..layout.awq`."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by name."""
        return {"qweight": self.qweight, "qzeros": self.qzeros, "scales": self.scales}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights (out, in), computed in float32 and then cast."""
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
        """The inverse of :attr:`tensors`."""
        return cls(shape, config, axis, **tensors)


class Awq(GptqmodelQuantizer):
    """Zero points beside scales, as its authors have it, computed in bfloat16."""

    matrix = AwqMatrix
    method = "awq"

    @staticmethod
    def scale_range(bits: int) -> tuple[float, float]:
        """Scales are bfloat16, but the package takes no group to be narrower than 10⁻⁵."""
        return 1e-5, torch.finfo(torch.bfloat16).max
