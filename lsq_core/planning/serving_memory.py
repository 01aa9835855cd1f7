"""What a memory buys: the budget that fits a card of a given size with room for context."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lsq_core.model.info import ModelInfo
from lsq_core.planning.problem import Problem
from lsq_core.units import GIB

#: Memories that people have, in GiB as cards count them.
MEMORY_SIZES_GIB = (8, 12, 16, 24, 80)
#: Tokens of context to keep room for, or the model's whole context where that is shorter.
CONTEXT_TOKENS = 4096
#: Left free for activations and the runtime, in bytes.
WORKING_BYTES = GIB // 2


@dataclass(frozen=True)
class MemoryBudget:
    """A memory, and the budget of linear weights (nominal bits a parameter) that fits it.

    ``bits`` may lie outside of what any plan takes, and even below zero. ``context_bytes`` is None
    where the model doesn't tell its key-value heads; then no room is kept for context.
    """

    gib: int
    bits: float
    tokens: int
    context_bytes: int | None
    other_bytes_known: bool = True

    @property
    def summary(self) -> str:
        """What fits, in words."""
        rest = (
            "" if self.other_bytes_known else " Embeddings and LM head, of unknown size, are extra."
        )
        if self.context_bytes is None:
            without = "without context, because its number of KV heads is unknown"
            return f"Fits in {self.gib} GiB {without}.{rest}"
        return (
            f"Fits in {self.gib} GiB with {self.tokens:,} tokens of fp16 context "
            f"({self.context_bytes / GIB:.2f} GiB) and {WORKING_BYTES / GIB:g} GiB workspace."
            f"{rest}"
        )


def memory_budgets(info: ModelInfo, problem: Problem, metadata: str) -> list[MemoryBudget]:
    """The budget that fits each of :data:`MEMORY_SIZES_GIB`, whatever plan is made of it."""
    tokens = min(CONTEXT_TOKENS, info.context or CONTEXT_TOKENS)
    per_token = context_bytes_per_token(info)
    context = None if per_token is None else per_token * tokens
    overhead = _stored_per_nominal(problem, metadata)
    budgets = []
    for gib in MEMORY_SIZES_GIB:
        room = gib * GIB - info.other_bytes - WORKING_BYTES - (context or 0)
        bits = 8 * room / overhead / problem.total
        budgets.append(
            MemoryBudget(gib, bits, tokens, context, other_bytes_known=info.other_bytes > 0)
        )
    return budgets


def context_bytes_per_token(info: ModelInfo) -> int | None:
    """Bytes of keys and values that a token keeps, in fp16; None where the model doesn't tell.

    They are the outputs of ``k_proj`` and ``v_proj`` where there are such, else what the config
    says of heads.
    """
    own = [m.out_features for m in info.matrices if m.type.endswith(("k_proj", "v_proj"))]
    if own:
        return 2 * sum(own)
    config = info.config.get("text_config", info.config)
    heads = config.get("num_attention_heads") or config.get("n_head")
    width = config.get("hidden_size") or config.get("n_embd")
    if not heads or not width:
        return None
    each = config.get("head_dim") or width // heads
    return 2 * 2 * info.layers * (config.get("num_key_value_heads") or heads) * each


def _stored_per_nominal(problem: Problem, metadata: str) -> float:
    """The most that a matrix occupies against its nominal bytes, by any allowed option."""
    stored = np.array(problem.planned(metadata))
    return float(np.where(problem.allowed, stored / problem.bytes, 1.0).max())
