"""Figures per scored token: negative log-likelihood, KL divergence from a reference, agreement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lsq_core.errors import LsqError
from lsq_core.evaluation.branches import Branch, Walk
from lsq_core.evaluation.walked import WalkedModel
from lsq_core.model.dtypes import torch_name

#: The most logits of one model in memory at a time: 256 MiB in float32 on a GPU, enough to keep it
#: busy, and 16 MiB on a CPU, where more is slower.
MAX_BATCH_LOGITS = {"cpu": 2**22, "cuda": 2**26}
#: The same for models that run as a whole, whose slices are at least a window.
_MAX_WHOLE_LOGITS = 2**26

#: Figures per scored token; the last three only with a reference.
NAMES = ("nll", "kl", "agreed", "squared_change")
#: Figures by name, each (windows, scored) of one batch.
Figures = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class PredictedTokens:
    """A model's predictions for some tokens.

    ``log_probs`` (windows, tokens, vocabulary) is float32; ``nll`` (windows, tokens) is float64,
    in nats.
    """

    log_probs: Tensor
    nll: Tensor

    @classmethod
    def from_logits(cls, logits: Tensor, targets: Tensor) -> PredictedTokens:
        """Build from ``logits`` (windows, tokens, vocabulary) and ``targets`` (windows, tokens)."""
        log_probs = logits.float().log_softmax(-1)
        picked = -log_probs.gather(-1, targets[..., None])[..., 0]
        return cls(log_probs, picked.double())

    @cached_property
    def _probs(self) -> Tensor:
        return self.log_probs.exp()

    @cached_property
    def _likeliest(self) -> Tensor:
        return self.log_probs.argmax(-1)

    def compare(self, expected: PredictedTokens) -> tuple[Tensor, Tensor, Tensor]:
        """Compare with the expected predictions.

        Returns tensors (windows, tokens) on the device: the KL divergence from ``expected`` in
        nats, whether the most likely token agrees, and the squared change of the target's
        log-probability.
        """
        if expected is self:
            unchanged = torch.zeros_like(self.nll)
            return unchanged, torch.ones_like(unchanged), unchanged
        change = expected.log_probs - self.log_probs
        kl = change.mul_(expected._probs).sum(-1)
        return kl, self._likeliest == expected._likeliest, (self.nll - expected.nll).square_()


def score_batch(walk: Walk, number: int, scored: int, compared: bool) -> Tensor:
    """Compute each model's figures for the last ``scored`` tokens of a batch's windows.

    The final norm and the LM head run on slices of these tokens, so that the vocabulary size does
    not limit the batch size. If ``compared``, the first model is the reference. The figures are
    float64 (models, names, windows, scored) on the device, for :func:`read_figures`.
    """
    ids = walk.batches[number]
    shape = len(walk.models), len(NAMES) if compared else 1, len(ids), scored
    figures = torch.zeros(shape, dtype=torch.float64, device=ids.device)
    for rows, tokens in _slices(walk, ids, scored):
        expected = None
        first = tokens.start - (ids.shape[1] - scored - 1)
        columns = slice(first, first + tokens.stop - tokens.start)
        for branch in walk.branches:  # the first contains the reference
            predicted = _predict(walk, branch, number, rows, tokens)
            found = (predicted.nll,)
            if compared:
                expected = expected or predicted
                found += predicted.compare(expected)
            for member in branch.members:
                for own, values in zip(figures[member], found, strict=True):
                    own[rows, columns] = values
    walk.report(number, len(walk.models))
    return figures


def read_figures(walk: Walk, number: int, figures: Tensor) -> list[Figures]:
    """Return each model's figures for a batch from the output of :func:`score_batch`.

    Raises
    ------
    LsqError
        If a model's predictions are not finite; names the first module whose output isn't.
    """
    read = figures.cpu().numpy()
    broken = ~np.isfinite(read).all(axis=(1, 3))  # (models, windows)
    if broken.any():
        member = int(broken.any(1).argmax())
        ids = walk.batches[number][broken[member].nonzero()[0]]
        raise LsqError(_not_finite_message(walk.models[member], ids))
    return [dict(zip(NAMES, own, strict=False)) for own in read]


def _predict(
    walk: Walk, branch: Branch, number: int, rows: slice, tokens: slice
) -> PredictedTokens:
    """Predict the tokens that follow those of a slice."""
    ids = walk.batches[number][rows]
    targets = ids[:, tokens.start + 1 : tokens.stop + 1]
    model = walk.models[branch.members[0]]
    with walk.measured(branch.members):
        logits = model.logits(branch.hidden[number][rows], ids, tokens)
        return PredictedTokens.from_logits(logits, targets)


def _slices(walk: Walk, ids: Tensor, scored: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of windows, and of the tokens whose logits predict the scored ones.

    They are full windows if the logits of at least one fit, else parts of a single window.
    """
    model = walk.models[0]
    vocabulary = model.model.config.get_text_config().vocab_size
    most = MAX_BATCH_LOGITS[ids.device.type] if model.splits_tokens else _MAX_WHOLE_LOGITS
    first, stop = ids.shape[1] - scored - 1, ids.shape[1] - 1
    rows = max(1, most // (scored * vocabulary))
    tokens = min(scored, max(1, most // vocabulary)) if model.splits_tokens else scored
    for row in range(0, len(ids), rows):
        for token in range(first, stop, tokens):
            yield slice(row, min(row + rows, len(ids))), slice(token, min(token + tokens, stop))


def _not_finite_message(model: WalkedModel, ids: Tensor) -> str:
    """Return an error message naming the first executed module whose output is not finite."""
    found = model.first_not_finite(ids)
    dtype = torch_name(next(model.model.parameters()).dtype)
    first = f"the first is that of {found}" if found else "the first are its logits"
    suggestion = "bfloat16 or float32" if dtype == "float16" else "another plan or dtype"
    return (
        f"{model.what} has no perplexity: its outputs in {dtype} are not finite numbers, and "
        f"{first}; try {suggestion}."
    )
