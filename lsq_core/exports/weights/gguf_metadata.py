"""Metadata of GGUF files, and the row order that llama.cpp expects.

Source: llama.cpp, ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lsq_core.errors import InputError
from lsq_core.exports.names import gguf_architecture
from lsq_core.exports.weights.base import Export

if TYPE_CHECKING:
    from gguf import GGUFWriter

#: Metadata key of the plan and its provenance.
PROVENANCE_KEY = "lsq.provenance"


def write_metadata(writer: GGUFWriter, export: Export) -> None:
    """Write the architecture's sizes, its rotary embeddings, and the export's provenance."""
    config, provenance = export.files.config, export.provenance
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    writer.add_name(str(provenance["source"]).rstrip("/").rpartition("/")[2])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = rope_settings(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope["rope_type"] == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    sizes: dict[str, int] = {}
    for stored in export.types.values():
        sizes[stored.name] = sizes.get(stored.name, 0) + stored.bytes
    writer.add_file_type(file_type(max(sizes, key=sizes.get)))
    writer.add_quantization_version(2)
    writer.add_string(PROVENANCE_KEY, json.dumps(dict(provenance)))


def file_type(largest: str) -> int:
    """Return llama.cpp's number for a file whose largest share of bytes is in a tensor type.

    Mixes of a K-quant have several numbers; that of the medium mix stands for the type.
    """
    from gguf import LlamaFileType

    if largest == "F32":
        return LlamaFileType.ALL_F32
    names = f"MOSTLY_{largest}", f"MOSTLY_{largest}_M"
    return next(LlamaFileType[name] for name in names if name in LlamaFileType.__members__)


# --- rotary embeddings ------------------------------------------------------------------------


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary settings by transformers' current names, always including ``rope_type``."""
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    if "rope_theta" not in rope and config.get("rope_theta"):
        rope["rope_theta"] = config["rope_theta"]
    return rope


def check_rope(config: Mapping[str, Any]) -> None:
    """Raise :class:`InputError` if the type of rotary embeddings is not supported."""
    kind = rope_settings(config)["rope_type"]
    if kind not in ("default", "linear", "llama3"):
        raise InputError(
            "The export to GGUF supports rotary embeddings of the types default, linear and "
            f"llama3, not {kind}; save it as lsq."
        )


def rope_factors(config: Mapping[str, Any]) -> np.ndarray | None:
    """Return the divisors of Llama 3's rotary frequencies, float32 (head_dim / 2,); else None."""
    rope = rope_settings(config)
    if rope["rope_type"] != "llama3":
        return None
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    context = rope.get("original_max_position_embeddings", 8192)
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    turns = context * rope.get("rope_theta", 10000.0) ** -exponents / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def row_order(config: Mapping[str, Any], name: str, rows: int) -> np.ndarray | None:
    """Return the order of the rows of q or k, (rows,), if llama.cpp rotates neighbouring ones.

    transformers rotates row i of a head together with row i + head_dim / 2. None if the order does
    not change.
    """
    match = re.search(r"\.(q|k)_proj(\.(weight|bias))?$", name)
    if match is None or gguf_architecture(config) != "llama":
        return None
    heads = config["num_attention_heads"]
    if match[1] == "k":
        heads = config.get("num_key_value_heads") or heads
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)
