"""Small random models of any architecture, from its default config shrunk by rules."""

from __future__ import annotations

import re

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

HIDDEN, HEADS, KEY_VALUE_HEADS, LAYERS, EXPERTS, CONTEXT = 64, 4, 2, 3, 4, 256
VOCABULARY = 4096
#: Maximum number of parameters of a small model.
MAX_PARAMETERS = 20_000_000

#: Sizes for a config's numbers by name; the first pattern that matches applies.
_RULES: list[tuple[str, int]] = [
    (r"vocab_size|pad_vocab.*|vocabulary_size", VOCABULARY),
    (r"(num|n)_shared_experts|n_group|topk_group|num_expert_group.*|(mamba_)?n_?groups", 1),
    (r".*(per_tok|per_token|top_?k|topk).*|moe_k|n_activated.*", 2),
    (
        r".*(num_.*experts|n_routed_experts|num_experts|n_experts|num_zero_experts|zero_expert_num).*",
        EXPERTS,
    ),
    (r"first_k_dense_replace|num_dense_layers|num_nextn.*|moe_layer_start_index", 1),
    (r".*(hidden_layers|num_layers|n_layers?|decoder_layers|encoder_layers|num_blocks)$", LAYERS),
    (
        r".*(num_key_value_heads|num_kv_heads|n_kv_heads|num_key_value_groups|multi_query_group_num|"
        r"num_attention_groups|n_head_kv|swa_num_key_value_heads)",
        KEY_VALUE_HEADS,
    ),
    (r".*(num_(\w+_)?heads|n_heads?|attention_heads|num_heads)$", HEADS),
    (r".*(q_lora_rank|kv_lora_rank|lora_rank).*", 32),
    (r"rotary_dim", 8),
    (
        r".*(head_dim|rope_dim|headdim|head_size|d_kv|v_head_dim|kv_channels|attention_key_size|attention_head_size)$",
        HIDDEN // HEADS,
    ),
    (
        r".*(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|n_inner|mlp_dim|inner_dim|d_inner|"
        r"ffn_size|expansion_dim|lru_width|feed_forward.*size|dff|hidden_dim)$",
        2 * HIDDEN,
    ),
    (
        r".*(hidden_size|d_model|n_embd|dim_model|embedding_size|word_embed_proj_dim|dim|emb_dim|"
        r"embedding_dim|model_dim|residual_dim|hidden_size_per_layer_input)$",
        HIDDEN,
    ),
    (
        r".*(max_position_embeddings|n_positions|max_seq_len|max_sequence_length|context_length|"
        r"model_max_length|max_target_positions|max_source_positions|n_ctx)$",
        CONTEXT,
    ),
    (r".*(sliding_window|window_size|chunk_size|attention_chunk_size|block_size)$", 64),
    (r".*(state_size|d_state|ssm_state_size|time_step_rank|dt_rank)$", 16),
]
#: Lists with one entry per layer.
_PER_LAYER_LIST = re.compile(
    r"layer_types|.*layers?_block_type|.*_pattern|layers|mlp_layer_types|"
    r".*_layer_list|no_rope_layers|.*_layer_ids|.*_layer_idx|block_types"
)


class BuildError(Exception):
    """A class can't be built small by the rules; the message says why."""


def architectures() -> dict[str, str]:
    """Return class names by model type, each class once, under its shortest model type."""
    types: dict[str, str] = {}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        types[name] = min(types.get(name, model_type), model_type, key=len)
    return {model_type: name for name, model_type in types.items()}


#: Values for fields that a config has but leaves at None.
_REQUIRED_DEFAULTS = {
    "head_dim": HIDDEN // HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "layer_types": ["full_attention"] * LAYERS,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
}
#: Fields that a config computes from others and that must not be passed.
_DERIVED_FIELDS = ("qk_head_dim",)
#: Values per model type that no rule about single fields can derive.
_MODEL_TYPE_OVERRIDES = {
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["mamba", "hybrid", "mamba", "mamba", "hybrid"],
        "layer_types": None,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HIDDEN // HEADS,
    },
    "zamba2": {
        "num_hidden_layers": 5,
        "layers_block_type": ["mamba", "hybrid", "mamba", "mamba", "hybrid"],
        "hybrid_layer_ids": [1, 4],
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HIDDEN // HEADS,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"vocab_size_per_layer_input": 4096, "num_kv_shared_layers": 0},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32]},
    "xmod": {"default_language": "en_XX"},
}


def small_config(model_type: str) -> PreTrainedConfig:
    """Return the default config of a model type with every size shrunk by the rules."""
    kind = type(AutoConfig.for_model(model_type))
    default = kind().to_dict()
    changed = _shrink_config(default) | _MODEL_TYPE_OVERRIDES.get(model_type, {})
    config = kind(**changed)
    missing = {k: v for k, v in _REQUIRED_DEFAULTS.items() if getattr(config, k, v) is None}
    return kind(**changed | missing) if missing else config


def _shrink_config(values: dict) -> dict:
    """Return the entries of a config that change; a nested config is returned in full."""
    changed: dict[str, object] = {}
    layers = next(
        (v for k, v in values.items() if _size_for(k) == LAYERS and isinstance(v, int)), 0
    )
    for name, value in values.items():
        if name in _DERIVED_FIELDS:
            continue
        if name.endswith("_config") and isinstance(value, dict) and "per_layer" not in name:
            changed[name] = {k: v for k, v in value.items() if k != "transformers_version"}
            changed[name] |= _shrink_config(value)
        elif name.endswith("token_id"):
            if _clamp_token_id(value) != value:
                changed[name] = _clamp_token_id(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            size = _size_for(name)
            if size is not None and (size < value or name.endswith("vocab_size")):
                changed[name] = size
        elif isinstance(value, list) and (
            _PER_LAYER_LIST.fullmatch(name) or len(value) == layers > LAYERS
        ):
            changed[name] = _shorten_layer_list(value)
        elif isinstance(value, dict) and value and all(str(k).isdigit() for k in value):
            changed[name] = {k: v for k, v in value.items() if int(k) < LAYERS}
    if "kv_lora_rank" in values:  # latent attention has one key per query head
        changed["num_key_value_heads"] = HEADS
    return changed


def _clamp_token_id(value: object) -> object:
    """Clamp a token id, or a list of ids, to the vocabulary."""
    if isinstance(value, list):
        return [_clamp_token_id(v) for v in value]
    return min(value, VOCABULARY - 1) if isinstance(value, int) else value


def _size_for(name: str) -> int | None:
    return next((size for pattern, size in _RULES if re.fullmatch(pattern, name)), None)


def _shorten_layer_list(entries: list) -> list:
    """Return one entry per layer, with as many of the different kinds as fit."""
    kinds = list(dict.fromkeys(map(str, entries)))
    first = [entries[[str(e) for e in entries].index(kind)] for kind in kinds]
    return (first + entries)[:LAYERS]


def small_model(model_type: str, seed: int = 0) -> torch.nn.Module:
    """Return a random model in float32.

    Raises :class:`BuildError` if the model can't be built or remains too large.
    """
    torch.manual_seed(seed)
    try:
        config = small_config(model_type)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > MAX_PARAMETERS:
            raise BuildError(f"{size:,} parameters are left")
        model = AutoModelForCausalLM.from_config(config)
    except BuildError:
        raise
    except Exception as error:
        raise BuildError(f"{type(error).__name__}: {error}".split("\n")[0]) from error
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.05)
    return model.eval()
