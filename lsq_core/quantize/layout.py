"""Which tensors a matrix is stored in: names, shapes and dtypes, told without torch.

What a plan will occupy, what a saved file is audited against, and the empty tensors that a file
is read into all come from here.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, prod

from lsq_core.config import QuantConfig

#: Shape of each stored tensor of a matrix and its dtype's name in a safetensors header.
Stored = dict[str, tuple[tuple[int, ...], str]]
#: (out, in), configuration, metadata format to what is stored.
Layout = Callable[[tuple[int, int], QuantConfig, str], Stored]

#: Bytes of a number by its dtype's name.
ITEMSIZE = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I32": 4, "I64": 8}
#: Scales of NF4 blocks that share one of their own, when they are quantized in turn.
NESTED_BLOCK = 256


def packed(shape: tuple[int, int], config: QuantConfig, metadata: str) -> Stored:
    """This project's packing: codes to the bit; scale and zero in 8 bits or fp16."""
    numel = prod(shape)
    groups = ceil(numel / config.group_size)
    tensors: Stored = {"codes": ((ceil(numel * config.bits / 8),), "U8")}
    for part in ("scale", "zero"):
        if metadata == "fp16":
            tensors[f"{part}_values"] = ((groups,), "F16")
        else:
            tensors[f"{part}_values"] = ((groups,), "U8")
            tensors[f"{part}_ranges"] = ((ceil(groups / config.meta_group_size), 2), "F16")
    return tensors


def nf4(shape: tuple[int, int], config: QuantConfig, metadata: str) -> Stored:
    """Two codes a byte, and the largest magnitude of each block in float32."""
    numel = prod(shape)
    blocks = ceil(numel / config.group_size)
    return {"codes": ((ceil(numel / 2),), "U8"), "absmax": ((blocks,), "F32")}


def nf4_dq(shape: tuple[int, int], config: QuantConfig, metadata: str) -> Stored:
    """As :func:`nf4`, the largest magnitudes less their mean in 8 bits, in blocks of 256."""
    codes, (blocks, _) = nf4(shape, config, metadata).values()
    return {
        "codes": codes,
        "absmax": (blocks, "U8"),
        "absmax_scale": ((ceil(blocks[0] / NESTED_BLOCK),), "F32"),
        "absmax_mean": ((1,), "F32"),
    }


def gptq(shape: tuple[int, int], config: QuantConfig, metadata: str) -> Stored:
    """``gptqmodel``'s GPTQ: words down the inputs, zeros along the outputs, a group an input."""
    (out, width), groups = shape, ceil(shape[1] / config.group_size)
    return {
        "qweight": ((width * config.bits // 32, out), "I32"),
        "qzeros": ((groups, out * config.bits // 32), "I32"),
        "scales": ((groups, out), "F16"),
        "g_idx": ((width,), "I32"),
    }


def awq(shape: tuple[int, int], config: QuantConfig, metadata: str) -> Stored:
    """``gptqmodel``'s AWQ in its GEMM format: words and zeros both along the outputs."""
    (out, width), groups = shape, ceil(shape[1] / config.group_size)
    return {
        "qweight": ((width, out * config.bits // 32), "I32"),
        "qzeros": ((groups, out * config.bits // 32), "I32"),
        "scales": ((groups, out), "BF16"),
    }


def stored_bytes(stored: Stored) -> int:
    """Bytes of all tensors together."""
    return sum(prod(shape) * ITEMSIZE[dtype] for shape, dtype in stored.values())
