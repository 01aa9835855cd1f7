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
from lsq_core.progress import Progress, no_progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
from lsq_core.evaluation.protocol import EvaluationText, Protocol, make_windows
from lsq_core.evaluation.result import EvaluationPair
from lsq_core.evaluation.window_sums import (
    _MAX_BATCH_LOGITS,
    Checkpoint,
    PredictedTokens,
    WindowSums,
    locate_not_finite,
)

#: Tokens read at once by device: what the caches of a CPU are best with, and what fills a GPU.
_MAX_BATCH_TOKENS = {"cpu": 2**11, "cuda": 2**15}


def evaluate(
    model: nn.Module,
    ids: np.ndarray,
    protocol: Protocol,
    *,
    bos: int | None,
    reference: nn.Module | None = None,
    progress: Progress = no_progress,
    checkpoint: Path | None = None,
) -> EvaluationPair:
    """Perplexity of one model on one text; see :func:`evaluate_models`."""
    texts, checkpoints = [EvaluationText(ids, protocol)], [[checkpoint]]
    [[pair]] = evaluate_models(
        [model],
        texts,
        bos=bos,
        reference=reference,
        progress=progress,
        checkpoints=checkpoints,
    )
    return pair


def evaluate_models(
    models: Sequence[nn.Module],
    texts: Sequence[EvaluationText],
    *,
    bos: int | None,
    reference: nn.Module | None = None,
    progress: Progress = no_progress,
    checkpoints: Sequence[Sequence[Path | None]] | None = None,
) -> Iterator[list[EvaluationPair]]:
    """Perplexity of several models, and of a reference beside them, in one pass over all texts.

    A batch of windows, which may be of several texts, goes through the reference once and then
    through each model; no logits outlive their batch. A window that another one begins with is
    read as a part of it.

    Parameters
    ----------
    bos
        The beginning-of-sequence token, or None where the tokenizer has none.
    reference
        The full-precision model to compare the predictions with.
    checkpoints
        For each text a file a model, or None. It takes what was scored so far every few seconds.
        Where it is there already, of these models on this stream by this protocol, its windows
        are not scored again.

    Raises
    ------
    LsqError
        When a model's predictions are not finite; names the first module whose output isn't.

    Yields
    ------
    A pair for each model: those of the first text as soon as it is read, then the next one's.

    Raises
    ------
    InputError
        When a text has a token that the models' embedding has no row for.
    """
    from lsq_core.model.loading import check_token_ids

    for text in texts:
        check_token_ids(models[0], [int(text.ids.max()), *([] if bos is None else [bos])])
    device = next(models[0].parameters()).device
    files = checkpoints or [[None] * len(models)] * len(texts)
    text_passes = [_TextPass(text, bos, paths) for text, paths in zip(texts, files, strict=True)]
    pending = _batches(text_passes, models[0].config.get_text_config().vocab_size, device.type)
    total = sum(len(text_pass.windows) for text_pass in text_passes)
    done = total - sum(
        len(text_passes[text].passes[number]) for batch in pending for text, number in batch
    )
    yielded = 0
    for damage in (
        file.damage for text_pass in text_passes for file in text_pass.files if file.damage
    ):
        progress(done, total, f"{damage} Its windows are scored again.")
    progress(done, total, f"window {done} of {total}")
    for batch in [[], *pending]:
        if batch:
            passes = [(text_passes[text], number) for text, number in batch]
            _score(models, reference, passes, device)
            done += sum(len(text_pass.passes[number]) for text_pass, number in passes)
            for text_pass in {text: text_passes[text] for text, _ in batch}.values():
                text_pass.save()
            progress(done, total, f"window {done} of {total}")
        while yielded < len(text_passes) and text_passes[yielded].is_complete:
            yield text_passes[yielded].finish(reference is not None)
            yielded += 1


class _TextPass:
    """One text's windows, and what each model (and the reference beside it) made of them."""

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
        """Take up the figures of a pass, (scored,), for each of its windows."""
        begin = 0
        for window in self.passes[number]:
            scored = self.windows[window].scored
            end = begin + scored
            totals.record(
                window, scored, {name: own[begin:end].sum() for name, own in figures.items()}
            )
            begin = end

    def save(self) -> None:
        """Keep what was scored so far, every few seconds and in the end."""
        for file in self.files:
            file.save(last=self.is_complete)

    def finish(self, compared: bool) -> list[EvaluationPair]:
        """What came of it, a pair for each model."""
        name = self.protocol.name
        return [
            (own.finish(name, compared), other.finish(name) if compared else None)
            for own, other in self.model_totals
        ]


def _batches(
    text_passes: Sequence[_TextPass], vocabulary: int, device: str
) -> list[list[tuple[int, int]]]:
    """What is left to score as (text, pass), in batches of passes of one length and one count.

    A batch holds as many as the device and the memory are best with. Those of the first text come
    first, so that its figures are there before the next one is read.
    """
    shapes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for text, text_pass in enumerate(text_passes):
        for number in text_pass.pending:
            shapes.setdefault(text_pass.shape(number), []).append((text, number))
    batches = []
    for (length, scored), batch_items in shapes.items():
        most = min(_MAX_BATCH_TOKENS[device] // length, _MAX_BATCH_LOGITS // (scored * vocabulary))
        size = max(1, most)
        batches += [batch_items[i : i + size] for i in range(0, len(batch_items), size)]
    return sorted(batches, key=lambda batch_items: batch_items[0][0])


def _score(
    models: Sequence[nn.Module],
    reference: nn.Module | None,
    passes: Sequence[tuple[_TextPass, int]],
    device: torch.device,
) -> None:
    """Run a batch through the reference and each model, and keep what they predict."""
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
