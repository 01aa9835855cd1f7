"""Triton kernels that read packed codes; importing this module requires Triton.

``TRITON_INTERPRET=1`` runs the same kernels on the CPU, which is how the tests check them. All take
the tensors of :class:`lsq_core.quantization.packed.PackedMatrix` as stored.
"""

# Triton reads annotations when a function is defined, so they are not postponed here.

import triton
import triton.language as tl


@triton.jit
def stored_value(values, ranges, group, inside, META: tl.constexpr, RANGES: tl.constexpr):
    value = tl.load(values + group, mask=inside, other=0).to(tl.float32)
    if RANGES:
        low = tl.load(ranges + group // META * 2, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(ranges + group // META * 2 + 1, mask=inside, other=0.0).to(tl.float32)
        step = (high - low) / 255
        value = value * tl.where(step > 0, step, 1.0) + low
    return value


@triton.jit
def power_of_two(exponent):
    """Return 2^exponent, built from its bits because ``exp2`` may be inexact."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def decode_weights(
    index,
    inside,
    codes,
    scale_values,
    scale_ranges,
    scale_exponent,
    zero_values,
    zero_ranges,
    code_bytes,
    groups,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    META: tl.constexpr,
    AXIS: tl.constexpr,
    SCALE_RANGES: tl.constexpr,
    ZERO_RANGES: tl.constexpr,
    EXPONENT: tl.constexpr,
):
    """Return the weights at positions ``index`` of the matrix in row order, float32."""
    if AXIS == 1:
        group = index // SIZE
        bit = index * BITS
    else:
        group = index % groups
        bit = (group * SIZE + index // groups) * BITS
    byte = bit // 8
    word = tl.load(codes + byte, mask=inside, other=0).to(tl.int32)
    if 8 % BITS != 0:  # a code may continue in the next byte
        more = inside & (byte + 1 < code_bytes)
        word = word | (tl.load(codes + byte + 1, mask=more, other=0).to(tl.int32) << 8)
    code = (word >> (bit % 8).to(tl.int32)) & ((1 << BITS) - 1)
    scale = stored_value(scale_values, scale_ranges, group, inside, META, SCALE_RANGES)
    zero = stored_value(zero_values, zero_ranges, group, inside, META, ZERO_RANGES)
    if EXPONENT:
        exponent = tl.load(scale_exponent).to(tl.int32)
        half = exponent >> 1
        scale = scale * power_of_two(half) * power_of_two(exponent - half)
    return (code.to(tl.float32) - zero) * scale


@triton.jit
def decode(
    weights,
    codes,
    scale_values,
    scale_ranges,
    scale_exponent,
    zero_values,
    zero_ranges,
    count,
    code_bytes,
    groups,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    META: tl.constexpr,
    AXIS: tl.constexpr,
    SCALE_RANGES: tl.constexpr,
    ZERO_RANGES: tl.constexpr,
    EXPONENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    found = decode_weights(
        index,
        inside,
        codes,
        scale_values,
        scale_ranges,
        scale_exponent,
        zero_values,
        zero_ranges,
        code_bytes,
        groups,
        BITS,
        SIZE,
        META,
        AXIS,
        SCALE_RANGES,
        ZERO_RANGES,
        EXPONENT,
    )
    tl.store(weights + index, found.to(weights.dtype.element_ty), mask=inside)


@triton.jit
def multiply(
    outputs,
    inputs,
    codes,
    scale_values,
    scale_ranges,
    scale_exponent,
    zero_values,
    zero_ranges,
    rows,
    columns,
    code_bytes,
    groups,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    META: tl.constexpr,
    AXIS: tl.constexpr,
    SCALE_RANGES: tl.constexpr,
    ZERO_RANGES: tl.constexpr,
    EXPONENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        weights = decode_weights(
            row[:, None] * columns + column[None, :],
            inside,
            codes,
            scale_values,
            scale_ranges,
            scale_exponent,
            zero_values,
            zero_ranges,
            code_bytes,
            groups,
            BITS,
            SIZE,
            META,
            AXIS,
            SCALE_RANGES,
            ZERO_RANGES,
            EXPONENT,
        )
        x = tl.load(inputs + token * columns + column, mask=column < columns, other=0.0)
        total += tl.where(inside, weights * x.to(tl.float32)[None, :], 0.0)
    result = tl.sum(total, 1).to(outputs.dtype.element_ty)
    tl.store(outputs + token * rows + row, result, mask=row < rows)
