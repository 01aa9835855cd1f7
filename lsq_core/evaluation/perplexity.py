"""Perplexity by two named protocols, distance to full precision, and speed (method §6).

A protocol's windows are laid over a token stream that begins with the tokenizer's
beginning-of-sequence token, where it has one; every later window has that token in the place of
its first. So a window never exceeds the model's context, and each token but the stream's first
is predicted at most once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lsq_core.errors import LsqError
from lsq_core.evaluation.protocol import EvaluationText, make_windows
from lsq_core.evaluation.result import EvaluationPair
from lsq_core.evaluation.window_sums import (
    MAX_BATCH_LOGITS,
    Checkpoint,
    PredictedTokens,
    WindowSums,
    locate_not_finite,
)
from lsq_core.progress import Progress, no_progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

#: Tokens of a batch by device: they fit the caches of a CPU, and fill a GPU.
_MAX_BATCH_TOKENS = {"cpu": 2**11, "cuda": 2**15}


def evaluate_models(
    models: Sequence[nn.Module],
    texts: Sequence[EvaluationText],
    *,
    bos: int | None,
    reference: nn.Module | None = None,
    progress: Progress = no_progress,
    checkpoints: Sequence[Sequence[Path | None]] | None = None,
) -> Iterator[list[EvaluationPair]]:
    """Measure the perplexity of several models, and of a reference, in one pass over the texts.

    A batch of windows, which may be of several texts, goes through the reference once and then
    through each model; no logits outlive their batch. A window that is the beginning of another
    one is scored with it.

    Parameters
    ----------
    bos
        The beginning-of-sequence token, or None where the tokenizer has none.
    reference
        The full-precision model to compare the predictions with.
    checkpoints
        For each text one file per model, or None. The windows scored so far are saved there every
        few seconds, and windows of an existing file are not scored again; it must be of the same
        models, token stream and protocol.

    Yields
    ------
    A pair for each model and one text: for the first text as soon as it is scored, then for the
    next one.

    Raises
    ------
    InputError
        When a text has a token that the models' embedding has no row for.
    LsqError
        When a model's predictions are not finite; names the first module whose output isn't.
    """
    from lsq_core.model.loading import check_token_ids

    for text in texts:
        check_token_ids(models[0], [int(text.ids.max()), *([] if bos is None else [bos])])
    files = checkpoints or [[None] * len(models)] * len(texts)
    text_passes = [_TextPass(text, bos, paths) for text, paths in zip(texts, files, strict=True)]
    unfinished = list(text_passes)
    for _ in _score_pending(models, reference, text_passes, progress):
        while unfinished and unfinished[0].is_complete:
            yield unfinished.pop(0).finish(reference is not None)


def _score_pending(
    models: Sequence[nn.Module],
    reference: nn.Module | None,
    text_passes: Sequence[_TextPass],
    progress: Progress,
) -> Iterator[None]:
    """Score the windows that no checkpoint contains; yields before the first and after each batch.

    Each batch's texts are checkpointed before the next one is scored.
    """
    device = next(models[0].parameters()).device
    pending = _batches(text_passes, models[0].config.get_text_config().vocab_size, device.type)
    total = sum(len(text_pass.windows) for text_pass in text_passes)
    done = total - sum(
        len(text_pass.passes[number]) for text_pass in text_passes for number in text_pass.pending
    )
    for file in (file for text_pass in text_passes for file in text_pass.files):
        if file.damage:
            progress(done, total, f"{file.damage} Its windows are scored again.")
    progress(done, total, f"window {done} of {total}")
    yield
    for batch in pending:
        passes = [(text_passes[text], number) for text, number in batch]
        _score(models, reference, passes, device)
        done += sum(len(text_pass.passes[number]) for text_pass, number in passes)
        for text_pass in {text: text_passes[text] for text, _ in batch}.values():
            text_pass.save()
        progress(done, total, f"window {done} of {total}")
        yield


class _TextPass:
    """One text's windows, and the sums of each model (and the reference) over them."""

    def __init__(
        self, text: EvaluationText, bos: int | None, checkpoints: Sequence[Path | None]
    ) -> None:
        import torch

        ids = text.ids if bos is None else np.concatenate([[bos], text.ids])
        self.stream, self.bos, self.protocol = torch.from_numpy(ids), bos, text.protocol
        self.windows = make_windows(len(ids), text.protocol)
        count = len(self.windows)
        #: Numbers of the windows that begin at the same token, shortest first: one pass reads them.
        self.passes = [
            list(numbers)
            for _, numbers in itertools.groupby(range(count), lambda k: self.windows[k].start)
        ]
        self.model_totals = [(WindowSums(count), WindowSums(count)) for _ in checkpoints]
        pairs = zip(checkpoints, self.model_totals, strict=True)
        self.files = [Checkpoint(path, model_totals) for path, model_totals in pairs]
        for file in self.files:
            file.restore()

    @property
    def pending(self) -> list[int]:
        """Passes over windows that some model has not scored yet."""
        counts = np.stack([own.counts for own, _ in self.model_totals])
        unread = (counts == 0).any(axis=0)
        return [number for number, windows in enumerate(self.passes) if unread[windows].any()]

    @property
    def is_complete(self) -> bool:
        """Whether every window is scored."""
        return not self.pending

    def shape(self, number: int) -> tuple[int, int]:
        """Tokens that a pass reads, and how many of them it scores."""
        windows = [self.windows[k] for k in self.passes[number]]
        return windows[-1].stop - windows[-1].start, sum(window.scored for window in windows)

    def ids(self, number: int) -> Tensor:
        """The tokens (length,) of a pass."""
        longest = self.windows[self.passes[number][-1]]
        ids = self.stream[longest.start : longest.stop].clone()
        if self.bos is not None:
            ids[0] = self.bos
        return ids

    def record(self, number: int, totals: WindowSums, figures: dict[str, np.ndarray]) -> None:
        """Record the figures of a pass, (scored,), in each of its windows."""
        begin = 0
        for window in self.passes[number]:
            scored = self.windows[window].scored
            end = begin + scored
            totals.record(
                window, scored, {name: own[begin:end].sum() for name, own in figures.items()}
            )
            begin = end

    def save(self) -> None:
        """Save the windows scored so far, every few seconds and at the end."""
        for file in self.files:
            file.save(last=self.is_complete)

    def finish(self, compared: bool) -> list[EvaluationPair]:
        """Return a pair of evaluations for each model."""
        name = self.protocol.name
        return [
            (own.finish(name, compared), other.finish(name) if compared else None)
            for own, other in self.model_totals
        ]


def _batches(
    text_passes: Sequence[_TextPass], vocabulary: int, device: str
) -> list[list[tuple[int, int]]]:
    """Group the pending passes, as (text, pass), into batches of equal length and scored tokens.

    The batch size depends on the device and is limited by the memory of the logits. Batches of
    the first text come first, so that its figures are complete before the next text is scored.
    """
    shapes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for text, text_pass in enumerate(text_passes):
        for number in text_pass.pending:
            shapes.setdefault(text_pass.shape(number), []).append((text, number))
    batches = []
    for (length, scored), batch_items in shapes.items():
        most = min(_MAX_BATCH_TOKENS[device] // length, MAX_BATCH_LOGITS // (scored * vocabulary))
        size = max(1, most)
        batches += [batch_items[i : i + size] for i in range(0, len(batch_items), size)]
    return sorted(batches, key=lambda batch_items: batch_items[0][0])


def _score(
    models: Sequence[nn.Module],
    reference: nn.Module | None,
    passes: Sequence[tuple[_TextPass, int]],
    device: torch.device,
) -> None:
    """Run a batch through the reference and each model, and record their figures."""
    import torch

    with torch.inference_mode():
        batch = torch.stack([text_pass.ids(number) for text_pass, number in passes]).to(device)
        first, number = passes[0]
        _, scored = first.shape(number)
        expected = None
        if reference is not None:
            expected = PredictedTokens.by(reference, batch, scored, "The full-precision model")
        for model_index, model in enumerate(models):
            predicted = PredictedTokens.by(model, batch, scored, "The model")
            figures = predicted.figures(expected)
            if not all(np.isfinite(values).all() for values in figures.values()):
                raise LsqError(locate_not_finite(model, batch, "The model"))
            for row, (text_pass, number) in enumerate(passes):
                own, other = text_pass.model_totals[model_index]
                own.record_working_bytes(predicted.working_bytes)
                text_pass.record(
                    number, own, {name: values[row] for name, values in figures.items()}
                )
                if expected is not None:
                    known = expected.figures()
                    text_pass.record(
                        number, other, {name: values[row] for name, values in known.items()}
                    )
