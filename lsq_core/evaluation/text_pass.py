"""A text's windows, sums over them, and groups of windows that are walked together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lsq_core.evaluation.protocol import EvaluationText, make_windows
from lsq_core.evaluation.reference_states import ReferenceStates
from lsq_core.evaluation.result import EvaluationPair
from lsq_core.evaluation.window_sums import Checkpoint, WindowSums


class TextPass:
    """One text's windows, and the sums of each model (and the reference) over them.

    ``kept`` is the store of the full-precision model's hidden states of this text, if any.
    """

    def __init__(
        self,
        text: EvaluationText,
        bos: int | None,
        checkpoints: Sequence[Path | None],
        kept: ReferenceStates | None = None,
    ) -> None:
        self.kept, self.batch_tokens = kept, text.batch_tokens
        #: The reference's seconds spent in an earlier evaluation whose states are reused here.
        self.reused_seconds = 0.0
        ids = text.ids if bos is None else np.concatenate([[bos], text.ids])
        self.stream, self.bos, self.protocol = torch.from_numpy(ids), bos, text.protocol
        self.windows = make_windows(len(ids), text.protocol)
        count = len(self.windows)
        #: Numbers of the windows starting at the same token, shortest first; they share one pass.
        self.passes = [
            list(numbers)
            for _, numbers in itertools.groupby(range(count), lambda k: self.windows[k].start)
        ]
        scored = [window.scored for window in self.windows]
        self.model_totals = [(WindowSums(scored), WindowSums(scored)) for _ in checkpoints]
        pairs = zip(checkpoints, self.model_totals, strict=True)
        self.files = [Checkpoint(path, model_totals) for path, model_totals in pairs]
        for file in self.files:
            file.restore()

    @property
    def pending(self) -> list[int]:
        """Passes with windows that some model has not scored yet."""
        counts = np.stack([own.counts for own, _ in self.model_totals])
        unread = (counts == 0).any(axis=0)
        return [number for number, windows in enumerate(self.passes) if unread[windows].any()]

    @property
    def scored(self) -> int:
        """Number of scored tokens of all passes."""
        return sum(self.shape(number)[1] for number in range(len(self.passes)))

    @property
    def is_complete(self) -> bool:
        """Whether every window is scored."""
        return not self.pending

    def shape(self, number: int) -> tuple[int, int]:
        """Return a pass's number of tokens, and how many of them it scores."""
        windows = [self.windows[k] for k in self.passes[number]]
        return windows[-1].stop - windows[-1].start, sum(window.scored for window in windows)

    def ids(self, number: int) -> Tensor:
        """Return the token ids (length,) of a pass."""
        longest = self.windows[self.passes[number][-1]]
        ids = self.stream[longest.start : longest.stop].clone()
        if self.bos is not None:
            ids[0] = self.bos
        return ids

    def record(self, number: int, totals: WindowSums, figures: dict[str, np.ndarray]) -> None:
        """Split a pass's figures (scored,) among its windows, and record them."""
        begin = 0
        for window in self.passes[number]:
            end = begin + self.windows[window].scored
            totals.record(window, {name: own[begin:end] for name, own in figures.items()})
            begin = end

    def save(self) -> None:
        """Save the windows scored so far."""
        for file in self.files:
            file.save()

    def finish(self, compared: bool) -> list[EvaluationPair]:
        """Return a pair of evaluations for each model."""
        name = self.protocol.name
        return [
            (
                own.finish(name, compared),
                replace(other.finish(name), reused_seconds=self.reused_seconds)
                if compared
                else None,
            )
            for own, other in self.model_totals
        ]


@dataclass(frozen=True, eq=False)
class WindowGroup:
    """Passes over a text's windows that are walked together, in batches of equal shapes."""

    text_pass: TextPass
    #: Pass numbers of each batch.
    batches: tuple[tuple[int, ...], ...]

    @property
    def windows(self) -> list[int]:
        """Window numbers, ascending."""
        passes = itertools.chain.from_iterable(self.batches)
        return sorted(window for number in passes for window in self.text_pass.passes[number])

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return sum(self.text_pass.windows[window].scored for window in self.windows)

    def count_windows(self, batch: int) -> int:
        """Return the number of windows in a batch."""
        return sum(len(self.text_pass.passes[number]) for number in self.batches[batch])

    def ids(self, device: torch.device) -> list[Tensor]:
        """Return the token ids (passes, tokens) of each batch."""
        return [
            torch.stack([self.text_pass.ids(number) for number in batch]).to(device)
            for batch in self.batches
        ]

    @property
    def title(self) -> str:
        """Its windows for progress messages: ``windows 1–16 of 62``."""
        windows, total = self.windows, len(self.text_pass.windows)
        return f"windows {windows[0] + 1}–{windows[-1] + 1} of {total}"


def make_groups(text_pass: TextPass, max_tokens: int, batch_tokens: int) -> list[WindowGroup]:
    """Split a text's pending passes into groups of at most ``max_tokens`` tokens, and batches.

    Passes in a batch have equal shapes. A pass longer than ``max_tokens`` or ``batch_tokens``
    forms its own group or batch.
    """
    groups: list[list[int]] = []
    room = 0
    for number in text_pass.pending:
        length, _ = text_pass.shape(number)
        if not groups or length > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(number)
        room -= length
    return [WindowGroup(text_pass, _batches(text_pass, own, batch_tokens)) for own in groups]


def _batches(
    text_pass: TextPass, passes: Sequence[int], batch_tokens: int
) -> tuple[tuple[int, ...], ...]:
    """Batch passes that have equal lengths and equal numbers of scored tokens."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for number in passes:
        shapes.setdefault(text_pass.shape(number), []).append(number)
    found = []
    for (length, _), own in shapes.items():
        size = max(1, batch_tokens // length)
        found += [tuple(own[i : i + size]) for i in range(0, len(own), size)]
    return tuple(found)
