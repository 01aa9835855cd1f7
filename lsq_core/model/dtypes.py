"""Dtypes by their safetensors names; torch is imported only to return its own dtypes.

>>> item_bytes("BF16"), TORCH_NAMES["BF16"]
(2, 'bfloat16')
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Bits per number; formats that are not a multiple of a byte are stored packed.
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
BITS |= dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8)
BITS |= dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
BITS |= dict.fromkeys(("I32", "U32", "F32"), 32)
BITS |= dict.fromkeys(("I64", "U64", "F64", "C64"), 64)
#: torch's names of the dtypes used for stored weights and packed codes.
TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
#: Dtypes of unquantized weights, in the order in which ties are resolved.
FLOATS = ("F64", "F32", "BF16", "F16")
#: Supported compute dtypes, by torch's names.
COMPUTE = ("float32", "bfloat16", "float16")


def item_bytes(name: str) -> int:
    """Return the bytes per number of a dtype that is a multiple of a byte."""
    return BITS[name] // 8


def torch_dtype(name: str) -> torch.dtype | None:
    """Return the torch dtype for a safetensors name, None if it is not in :data:`TORCH_NAMES`."""
    import torch

    return getattr(torch, TORCH_NAMES[name]) if name in TORCH_NAMES else None


def safetensors_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype, or torch's own name if there is none."""
    return _SAFETENSORS_NAMES.get(name := torch_name(dtype), name)


def torch_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without its prefix: ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def config_dtype(config: Mapping[str, object]) -> torch.dtype | None:
    """Return the dtype named in a model's config or its text config, None if neither has one."""
    import torch

    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        named = part.get("dtype") or part.get("torch_dtype")
        found = getattr(torch, str(named).removeprefix("torch."), None)
        if isinstance(found, torch.dtype):
            return found
    return None


_SAFETENSORS_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
