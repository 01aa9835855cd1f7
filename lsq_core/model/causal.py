"""Check that a model predicts each token only from those before it, as perplexity requires."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsq_core.errors import InputError, LsqError, exception_reason

#: Tokens of the check's input; the second half of them is changed.
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
    """Raise :class:`InputError` if a model's output for a token depends on later tokens.

    The model is run on two sequences of equal length with a common prefix. If attention is causal,
    its output for the prefix is the same: masked positions have a weight of exactly 0, and equal
    shapes are computed by the same kernels. Experts, whose batches depend on the routing of all
    tokens, may round differently, hence a tolerance relative to the change after the prefix.

    Parameters
    ----------
    forward
        Returns logits, or any states, (1, tokens, features) for token ids (1, tokens).
    vocabulary
        Number of rows of the embedding.
    context
        Context length of the model in tokens.
    dtype
        The dtype that the model computes in.

    Raises
    ------
    InputError
        If the output depends on later tokens, or the model cannot run on a few tokens at all.
    """
    length = min(_CHECK_TOKENS, context)
    common = length // 2
    if common < 1 or vocabulary < 2:
        return
    # Spread over the vocabulary, because a range of it may be untrained and all alike.
    first = torch.arange(length, device=device)[None] * vocabulary // length
    second = first.clone()
    second[:, common:] = (second[:, common:] + 1 + vocabulary // 3) % vocabulary
    with torch.no_grad():  # unlike inference mode, leaves cached tensors usable for gradients
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
    """Return the model's output for some tokens, turning its errors into :class:`InputError`."""
    try:
        return forward(ids)
    except (LsqError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # the model's own code may raise anything
        raise InputError(
            f"'{name}' cannot be run on {ids.numel()} tokens: {exception_reason(error)}."
        ) from error
