"""Whether a model predicts each token from those before it alone, as a perplexity supposes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsq_core.errors import InputError, LsqError, exception_reason

#: Tokens that a model reads for the check; the second half of them is exchanged.
_CHECK_TOKENS = 8


def check_causal(
    name: str,
    forward: Callable[[Tensor], Tensor],
    *,
    vocabulary: int,
    context: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise :class:`InputError` when what a model says of a token depends on later tokens.

    The model reads two sequences of equal length that begin alike. Where attention is causal,
    what it says of the common beginning is the same: masked positions have a weight of exactly 0,
    and equal shapes are computed by equal kernels. Experts, whose batches depend on the routing of
    all tokens, may round differently, hence a tolerance relative to the change further on.

    Parameters
    ----------
    forward
        Gives logits, or any states, (1, tokens, features) for token ids (1, tokens).
    vocabulary
        Rows of the embedding.
    context
        Tokens that the model can read at once.
    dtype
        What the model computes in.

    Raises
    ------
    InputError
        When it depends on them, or the model cannot read a few tokens at all.
    """
    length = min(_CHECK_TOKENS, context)
    common = length // 2
    if common < 1 or vocabulary < 2:
        return
    # Spread over the vocabulary, because a stretch of it may be untrained and all alike.
    first = torch.arange(length, device=device)[None] * vocabulary // length
    second = first.clone()
    second[:, common:] = (second[:, common:] + 1 + vocabulary // 3) % vocabulary
    with torch.no_grad():  # tensors that a module stores stay usable for gradients
        change = (
            _run_forward(name, forward, first).float() - _run_forward(name, forward, second).float()
        )
    tolerance = max(1e-4, 4 * torch.finfo(dtype).eps)
    if change[:, :common].norm() > tolerance * change[:, common:].norm():
        raise InputError(
            f"'{name}' is not a causal language model: changing later tokens changes its output "
            "for earlier ones, as in an encoder, so it has no perplexity; give a decoder, or set "
            "is_decoder to true in config.json if it was trained as one."
        )


def _run_forward(name: str, forward: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """What the model says of some tokens, or why it says nothing, as an error for people."""
    try:
        return forward(ids)
    except (LsqError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # the model's own code, whatever it does
        raise InputError(
            f"'{name}' cannot be run on {ids.numel()} tokens: {exception_reason(error)}."
        ) from error
