"""Triton kernels that decode packed codes on a GPU, either separately or during a multiplication.

PyTorch decodes a matrix in about twenty operations, each of which reads and writes the entire
matrix. Here, one kernel reads the stored codes, scales and zero points and writes the weights;
another multiplies a few tokens by the weights without writing them to memory.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from lsq_core.bits import QuantConfig


class Metadata(Protocol):
    """The attributes of :class:`lsq_core.quantization.packed.Metadata` used here."""

    values: Tensor
    ranges: Tensor | None
    group_size: int
    exponent: Tensor | None


class PackedMatrix(Protocol):
    """The attributes of :class:`lsq_core.quantization.packed.PackedMatrix` used here."""

    shape: tuple[int, int]
    config: QuantConfig
    axis: int
    codes: Tensor
    scale: Metadata
    zero: Metadata


#: Weights per program when decoding, and rows and columns of a program's tile when multiplying.
DECODED_WEIGHTS = 1024
ROWS, COLUMNS = 32, 128
#: Maximum number of tokens to multiply while decoding; beyond this, decoding is cheap compared with
#: multiplying, which PyTorch does better.
MAX_TOKENS = 8


#: Environment variable that enables the kernels when set to ``1``. They pass in Triton's
#: interpreter and compile for a GPU, but none has run them yet, so PyTorch decodes by default.
SWITCH = "LSQ_TRITON"


@cache
def available() -> bool:
    """Return whether Triton is installed, as it is with PyTorch for CUDA."""
    return find_spec("triton") is not None


def enabled() -> bool:
    """Return whether the kernels are enabled and Triton is installed."""
    return os.environ.get(SWITCH) == "1" and available()


def decode(matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """Return the weights (out, in) of a matrix, computed in float32 and then cast.

    Supports any bits and group size, groups that cross rows, both axes, and 8-bit or fp16 metadata.
    """
    import triton

    from lsq_core.quantization import packed_kernels

    weights = torch.empty(matrix.shape, dtype=dtype, device=matrix.codes.device)
    count = weights.numel()
    with torch.cuda.device(weights.device if weights.is_cuda else -1):
        packed_kernels.decode[(triton.cdiv(count, DECODED_WEIGHTS),)](
            weights, *_stored(matrix), count, **_constants(matrix), BLOCK=DECODED_WEIGHTS
        )
    return weights


def multiply(matrix: PackedMatrix, inputs: Tensor) -> Tensor:
    """Multiply ``inputs`` (tokens, in) by the transposed weights: (tokens, out), same dtype.

    Sums are float32. Intended for up to :data:`MAX_TOKENS` tokens.
    """
    import triton

    from lsq_core.quantization import packed_kernels

    inputs = inputs.contiguous()
    tokens, (rows, columns) = len(inputs), matrix.shape
    outputs = torch.empty(tokens, rows, dtype=inputs.dtype, device=inputs.device)
    with torch.cuda.device(inputs.device if inputs.is_cuda else -1):
        packed_kernels.multiply[(triton.cdiv(rows, ROWS), tokens)](
            outputs,
            inputs,
            *_stored(matrix),
            rows,
            columns,
            **_constants(matrix),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
        )
    return outputs


def _stored(matrix: PackedMatrix) -> tuple[Tensor, ...]:
    """Return the stored tensors in the kernels' order, with unread placeholders for absent ones."""

    def parts(metadata: Metadata) -> tuple[Tensor, ...]:
        absent = metadata.values
        ranges, exponent = metadata.ranges, metadata.exponent
        return (
            metadata.values,
            absent if ranges is None else ranges,
            absent if exponent is None else exponent,
        )

    return (matrix.codes, *parts(matrix.scale), *parts(matrix.zero)[:2])


def _constants(matrix: PackedMatrix) -> dict[str, object]:
    size = matrix.config.group_size
    return {
        "code_bytes": matrix.codes.numel(),
        "groups": matrix.shape[0] * matrix.shape[1] // size,
        "BITS": matrix.config.bits,
        "SIZE": size,
        "META": matrix.scale.group_size,
        "AXIS": matrix.axis,
        "SCALE_RANGES": matrix.scale.ranges is not None,
        "ZERO_RANGES": matrix.zero.ranges is not None,
        "EXPONENT": matrix.scale.exponent is not None,
    }
