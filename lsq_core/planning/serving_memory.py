"""Budgets that fit a device's memory and leave room for the context."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lsq_core.model.info import ModelInfo
from lsq_core.planning.problem import Problem
from lsq_core.units import GIB

#: Common memory sizes of accelerators, in GiB.
MEMORY_SIZES_GIB = (8, 12, 16, 24, 80)
#: Tokens of context to reserve memory for, capped at the model's context length.
CONTEXT_TOKENS = 4096
#: Bytes reserved for activations and the runtime.
WORKING_BYTES = GIB // 2


@dataclass(frozen=True)
class MemoryBudget:
    """A memory size, and the budget for linear weights (nominal bits per parameter) that fits it.

    ``bits`` may be out of reach for any plan, or even negative. ``context_bytes`` is None if the
    size of keys and values is unknown; no memory is then reserved for the context.
    """

    gib: int
    bits: float
    tokens: int
    context_bytes: int | None
    other_bytes_known: bool = True

    @property
    def summary(self) -> str:
        """A description of what fits in memory."""
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
    """Return a budget for each of :data:`MEMORY_SIZES_GIB` within which every plan fits."""
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
    """Return the bytes of a token's keys and values in fp16, or None if unknown.

    They are the outputs of ``k_proj`` and ``v_proj`` if the model has these modules, and are
    computed from the heads in the config otherwise.
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
    """Return the largest ratio of stored to nominal bytes over matrices and allowed options."""
    stored = problem.planned(metadata)
    return float(np.where(problem.allowed, stored / problem.bytes, 1.0).max())
