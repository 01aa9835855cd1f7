"""Names, shapes and dtypes of the tensors in which a matrix is stored. Needs no torch.

Planned bytes, the audit of saved files, and loading all use these layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, prod

from lsq_core.bits import FP16_BITS, Config, MixedRows, QuantConfig
from lsq_core.model.dtypes import item_bytes

#: Shape and safetensors dtype name of each stored tensor of a matrix.
TensorLayout = dict[str, tuple[tuple[int, ...], str]]
#: Maps the shape (out, in), configuration and metadata format to the stored tensors.
Layout = Callable[[tuple[int, int], Config, str], TensorLayout]

#: Number of NF4 scales that share a second-level scale in double quantization.
NESTED_BLOCK = 256


def packed(shape: tuple[int, int], config: Config, metadata: str) -> TensorLayout:
    """Return this project's packing: codes without padding bits; 8-bit or fp16 scale and zero.

    The scales, or the weights if stored in fp16, share a power of two, which takes 2 bytes per
    matrix. Mixed rows are two packed matrices and an index of the high-impact rows.
    """
    if isinstance(config, MixedRows):
        return _packed_rows(shape, config, metadata)
    if config.bits == FP16_BITS:
        return {"weights": (shape, "F16"), "exponent": ((1,), "I16")}
    numel = prod(shape)
    groups = ceil(numel / config.group_size)
    tensors: TensorLayout = {"codes": ((ceil(numel * config.bits / 8),), "U8")}
    for part in ("scale", "zero"):
        if metadata == "fp16":
            tensors[f"{part}_values"] = ((groups,), "F16")
        else:
            tensors[f"{part}_values"] = ((groups,), "U8")
            tensors[f"{part}_ranges"] = ((ceil(groups / config.meta_group_size), 2), "F16")
    tensors["scale_exponent"] = ((1,), "I16")
    return tensors


def _packed_rows(shape: tuple[int, int], config: MixedRows, metadata: str) -> TensorLayout:
    (out, width), count = shape, config.high_rows(shape[0])
    tensors: TensorLayout = {"rows": row_index_layout(out, config)}
    for part, rows, own in (("high", count, config.high), ("low", out - count, config.low)):
        if rows:
            part_tensors = packed((rows, width), own, metadata)
            tensors |= {f"{part}_{name}": entry for name, entry in part_tensors.items()}
    return tensors


def row_index_layout(out_features: int, config: MixedRows) -> tuple[tuple[int], str]:
    """Return the high-impact rows' index: a bitmap or sorted row numbers, whichever is smaller."""
    bitmap, listed = config.index_sizes(out_features)
    if bitmap < listed:
        return (bitmap,), "U8"
    count = config.high_rows(out_features)
    return (count,), "I32" if listed > item_bytes("I16") * count else "I16"


def nf4(shape: tuple[int, int], config: QuantConfig, metadata: str) -> TensorLayout:
    """Return NF4's layout: two codes per byte, and each block's largest magnitude in float32."""
    numel = prod(shape)
    blocks = ceil(numel / config.group_size)
    return {"codes": ((ceil(numel / 2),), "U8"), "absmax": ((blocks,), "F32")}


def nf4_dq(shape: tuple[int, int], config: QuantConfig, metadata: str) -> TensorLayout:
    """Return :func:`nf4` with the magnitudes, minus their mean, in 8 bits in blocks of 256."""
    codes, (blocks, _) = nf4(shape, config, metadata).values()
    return {
        "codes": codes,
        "absmax": (blocks, "U8"),
        "absmax_scale": ((ceil(blocks[0] / NESTED_BLOCK),), "F32"),
        "absmax_mean": ((1,), "F32"),
    }


def gptq(shape: tuple[int, int], config: QuantConfig, metadata: str) -> TensorLayout:
    """Return ``gptqmodel``'s GPTQ layout: codes packed along inputs, zeros packed along outputs.

    ``g_idx`` is the group of each input.
    """
    (out, width), groups = shape, ceil(shape[1] / config.group_size)
    return {
        "qweight": ((width * config.bits // 32, out), "I32"),
        "qzeros": ((groups, out * config.bits // 32), "I32"),
        "scales": ((groups, out), "F16"),
        "g_idx": ((width,), "I32"),
    }


def awq(shape: tuple[int, int], config: QuantConfig, metadata: str) -> TensorLayout:
    """Return ``gptqmodel``'s AWQ layout (GEMM): codes and zeros both packed along outputs."""
    (out, width), groups = shape, ceil(shape[1] / config.group_size)
    return {
        "qweight": ((width, out * config.bits // 32), "I32"),
        "qzeros": ((groups, out * config.bits // 32), "I32"),
        "scales": ((groups, out), "BF16"),
    }


def layout_for_format(stored: TensorLayout, format: int) -> TensorLayout:
    """Return the tensors of a layout that exist in a format version; exponents exist since 3."""
    if format >= 3:
        return stored
    return {name: entry for name, entry in stored.items() if not name.endswith("exponent")}


def stored_bytes(stored: TensorLayout) -> int:
    """Return the total bytes of all tensors."""
    return sum(prod(shape) * item_bytes(dtype) for shape, dtype in stored.values())
