"""Decoding packed codes on a GPU, by itself or while multiplying: kernels in Triton.

PyTorch decodes a matrix in some twenty operations, each of which reads and writes all of it.
Here one kernel reads the codes, the scale and the zero point of each group as they are stored, and
writes weights; another one multiplies a few tokens by them, and the weights are never written.
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
    """What is read here of :class:`lsq_core.quantization.packed.Metadata`."""

    values: Tensor
    ranges: Tensor | None
    group_size: int
    exponent: Tensor | None


class PackedMatrix(Protocol):
    """What is read here of :class:`lsq_core.quantization.packed.PackedMatrix`."""

    shape: tuple[int, int]
    config: QuantConfig
    axis: int
    codes: Tensor
    scale: Metadata
    zero: Metadata


#: Weights that one program decodes, and the rows and columns of the tile of one that multiplies.
DECODED_WEIGHTS = 1024
ROWS, COLUMNS = 32, 128
#: The most tokens that are multiplied while decoding; from there on decoding costs little beside
#: multiplying, for which PyTorch's product is made.
MAX_TOKENS = 8


#: The environment variable that turns the kernels on with ``1``. They pass in Triton's interpreter
#: and compile for a GPU, but none has run them yet, so PyTorch decodes unless they are asked for.
SWITCH = "LSQ_TRITON"


@cache
def available() -> bool:
    """Whether Triton is installed; PyTorch for CUDA brings it."""
    return find_spec("triton") is not None


def enabled() -> bool:
    """Whether the kernels are turned on, and Triton is installed."""
    return os.environ.get(SWITCH) == "1" and available()


def decode(matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """The weights (out, in) of a matrix, computed in float32 and then cast.

    Any bits and group size, groups that cross rows, both axes, scale and zero in 8 bits or fp16.
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
    """``inputs`` (tokens, in) times the transposed weights: (tokens, out), in the inputs' dtype.

    Sums are float32. It is meant for up to :data:`MAX_TOKENS` tokens.
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
    """The stored tensors in the order that kernels take them; one that is absent is never read."""

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
