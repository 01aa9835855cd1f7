"""Perplexity by two named protocols, distance to full precision, memory and speed (method §6).

A protocol's windows are laid over a token stream that begins with the tokenizer's
beginning-of-sequence token, where it has one; every later window has that token in the place of
its first. So a window never exceeds the model's context, and each token but the stream's first
is predicted at most once.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lsq_core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

Progress = Callable[[int, int, str], None]

PROTOCOLS = ("strided", "blocks")
#: Context and scored tokens of a window, by protocol, where the model's context allows.
_CONTEXT = {"strided": 1024, "blocks": 2048}
#: Windows that an interval needs at least.
MIN_WINDOWS = 8
#: Seconds between two times that an evaluation keeps what it has so far.
_KEEP_EVERY = 2.0
#: Logits held at once, in numbers: windows are batched up to this.
_LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True)
class Protocol:
    """How a token stream is cut: windows of ``context`` tokens, of which the last are scored."""

    name: str
    context: int
    scored: int

    @classmethod
    def named(cls, name: str, model_context: int) -> Protocol:
        """``strided`` or ``blocks`` for a model; shorter ones are called ``strided-512/256``.

        Raises
        ------
        InputError
            When there is no such protocol.
        """
        if name not in PROTOCOLS:
            raise InputError(f"'{name}' is not a protocol; choose strided or blocks.")
        context = min(_CONTEXT[name], model_context)
        short = context < _CONTEXT[name]
        if name == "strided":
            return cls(
                f"strided-{context}/{context // 2}" if short else name, context, context // 2
            )
        return cls(f"blocks-{context}" if short else name, context, context)


@dataclass(frozen=True)
class Window:
    """Token positions ``start`` to ``stop`` of the stream, of which the last ``scored`` count."""

    start: int
    stop: int
    scored: int


def lay_windows(tokens: int, protocol: Protocol) -> list[Window]:
    """The windows of a stream of ``tokens`` tokens, its first included.

    ``strided``: window ``k`` scores the tokens after those of window ``k − 1``, the tail what is
    left. ``blocks``: they do not overlap, and the tail is dropped.

    Raises
    ------
    InputError
        When the stream gives no window with a predicted token.
    """
    size, step = protocol.context, protocol.scored
    if step == size:
        windows = [Window(i, i + size, size - 1) for i in range(0, tokens - size + 1, size)]
    else:
        windows = []
        for begin in range(0, tokens, step):
            stop = min(begin + step, tokens)
            start = max(begin + step - size, 0)
            windows.append(Window(start, stop, min(stop - begin, stop - start - 1)))
    windows = [w for w in windows if w.scored > 0]
    if not windows:
        raise InputError(
            f"The corpus has {tokens} tokens and the protocol {protocol.name} needs at least "
            f"{size if step == size else 2}; give a longer text or the other protocol."
        )
    return windows


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One model measured on one corpus by one protocol.

    ``nll`` is the summed negative log-likelihood (nats) of each window, ``counts`` its predicted
    tokens. ``kl`` (nats a token) and ``top1`` (share) compare with the reference model on the
    same windows and are None where there was none.
    """

    protocol: str
    nll: np.ndarray
    counts: np.ndarray
    seconds: float
    peak_bytes: int
    kl: float | None = None
    top1: float | None = None
    corpus: str = ""
    corpus_sha256: str = ""
    corpus_source: str = ""
    truncated: bool = False
    provenance: dict = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return int(self.counts.sum())

    @property
    def perplexity(self) -> float:
        """``exp`` of the summed negative log-likelihood over the predicted tokens."""
        mean = self.nll.sum() / self.counts.sum()
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens over the time of this model's own forward passes."""
        return self.tokens / self.seconds


def evaluate(
    model: nn.Module,
    ids: np.ndarray,
    protocol: Protocol,
    *,
    bos: int | None,
    reference: nn.Module | None = None,
    progress: Progress = lambda done, total, message: None,
    checkpoint: Path | None = None,
) -> tuple[Evaluation, Evaluation | None]:
    """Perplexity of ``model`` on a token stream, and of ``reference`` in the same pass.

    Parameters
    ----------
    ids
        Token ids without special tokens, int64 (tokens,).
    bos
        The beginning-of-sequence token, or None where the tokenizer has none.
    reference
        The full-precision model to compare the predictions with.
    checkpoint
        A file that takes what was scored so far every few seconds. Where it is there already, of
        these models on this stream by this protocol, its windows are not scored again.

    Returns
    -------
    The evaluation of ``model`` and, where there is a reference, that of the reference.
    """
    import torch

    stream = torch.from_numpy(ids if bos is None else np.concatenate([[bos], ids]))
    windows = lay_windows(len(stream), protocol)
    device = next(model.parameters()).device
    own, other = _Tally(len(windows)), _Tally(len(windows))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    kept = _Kept(checkpoint, (own, other))
    done = kept.restore()
    progress(done, len(windows), f"window {done} of {len(windows)}")
    with torch.inference_mode():
        for indices in _batches(windows, model.config.get_text_config().vocab_size):
            if own.counts[indices].all():
                continue  # before it was cut off
            batch = torch.stack([_window_ids(stream, windows[i], bos) for i in indices]).to(device)
            scored = windows[indices[0]].scored
            targets = batch[:, -scored:]
            logits = own.forward(model, batch, scored)
            own.add(indices, logits, targets)
            if reference is not None:
                expected = other.forward(reference, batch, scored)
                other.add(indices, expected, targets)
                own.compare(logits, expected)
            done += len(indices)
            kept.save(last=done == len(windows))
            progress(done, len(windows), f"window {done} of {len(windows)}")
    peak = _peak_bytes(device)
    evaluation = own.finish(protocol, peak)
    return evaluation, other.finish(protocol, peak) if reference is not None else None


def _window_ids(stream: Tensor, window: Window, bos: int | None) -> Tensor:
    ids = stream[window.start : window.stop].clone()
    if bos is not None:
        ids[0] = bos
    return ids


def _batches(windows: list[Window], vocabulary: int) -> Iterator[list[int]]:
    """Indices of windows of one length and one scored count, as many as the memory allows."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for index, window in enumerate(windows):
        shapes.setdefault((window.stop - window.start, window.scored), []).append(index)
    for (_, scored), indices in shapes.items():
        size = max(1, min(16, _LOGITS_AT_ONCE // (scored * vocabulary)))
        for i in range(0, len(indices), size):
            yield indices[i : i + size]


class _Tally:
    """Adds up what one model predicts, window by window."""

    def __init__(self, windows: int) -> None:
        self.nll = np.zeros(windows)
        self.counts = np.zeros(windows, dtype=np.int64)
        self.seconds = self.kl = self.agreed = 0.0
        self.compared = 0

    def forward(self, model: nn.Module, batch: Tensor, scored: int) -> Tensor:
        """Log-probabilities (windows, scored, vocabulary), float32, of the last tokens."""
        import torch

        from lsq_core.load import last_logits

        began = time.perf_counter()
        # The logits before a token predict it: one more is kept, and the very last is not used.
        logits = last_logits(model, batch, scored + 1)[:, :-1].float().log_softmax(-1)
        if batch.device.type == "cuda":
            torch.cuda.synchronize(batch.device)
        self.seconds += time.perf_counter() - began
        return logits

    def add(self, indices: list[int], logits: Tensor, targets: Tensor) -> None:
        picked = -logits.gather(-1, targets[..., None])[..., 0]
        self.nll[indices] = picked.double().sum(-1).cpu().numpy()
        self.counts[indices] = targets.shape[1]

    def compare(self, logits: Tensor, expected: Tensor) -> None:
        self.kl += float((expected.exp() * (expected - logits)).sum(-1).double().sum())
        self.agreed += float((logits.argmax(-1) == expected.argmax(-1)).sum())
        self.compared += logits.shape[0] * logits.shape[1]

    @property
    def state(self) -> dict[str, np.ndarray]:
        """What was added up so far, as arrays."""
        sums = np.array([self.seconds, self.kl, self.agreed, self.compared])
        return {"nll": self.nll, "counts": self.counts, "sums": sums}

    @state.setter
    def state(self, kept: dict[str, np.ndarray]) -> None:
        self.nll, self.counts = kept["nll"], kept["counts"]
        self.seconds, self.kl, self.agreed = map(float, kept["sums"][:3])
        self.compared = int(kept["sums"][3])

    def finish(self, protocol: Protocol, peak: int) -> Evaluation:
        compared = self.compared or None
        return Evaluation(
            protocol=protocol.name,
            nll=self.nll,
            counts=self.counts,
            seconds=self.seconds,
            peak_bytes=peak,
            kl=self.kl / compared if compared else None,
            top1=self.agreed / compared if compared else None,
        )


class _Kept:
    """A file with the tallies so far, replaced whole, so that a killed process leaves a whole one.

    Windows come in an order of their own (:func:`_batches`), so a window is scored when it has a
    count.
    """

    def __init__(self, path: Path | None, tallies: tuple[_Tally, ...]) -> None:
        self.path, self.tallies = path, tallies
        self.written = time.monotonic()

    def restore(self) -> int:
        """Take up what the file holds; gives the number of windows scored before."""
        if self.path is not None and self.path.is_file():
            with np.load(self.path) as file:
                for number, tally in enumerate(self.tallies):
                    tally.state = {name: file[f"{name}_{number}"] for name in tally.state}
        return int((self.tallies[0].counts > 0).sum())

    def save(self, last: bool) -> None:
        """Write the file every few seconds, and when the last window is scored."""
        if self.path is None or not (last or time.monotonic() - self.written > _KEEP_EVERY):
            return
        arrays = {
            f"{name}_{number}": array
            for number, tally in enumerate(self.tallies)
            for name, array in tally.state.items()
        }
        unfinished = self.path.with_name(f".{self.path.name}.new")
        with unfinished.open("wb") as file:
            np.savez(file, **arrays)
        unfinished.replace(self.path)
        self.written = time.monotonic()


def _peak_bytes(device: object) -> int:
    """Most memory held so far: allocated on a GPU, resident in this process on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Difference:
    """How much higher one run's perplexity is than another's, as a ratio minus one.

    ``low`` and ``high`` bound the 95 % paired bootstrap interval over windows; both are NaN where
    there are fewer than ``MIN_WINDOWS`` of them, which tell nothing about chance.
    """

    relative: float
    low: float
    high: float

    @property
    def tie(self) -> bool:
        """Whether no difference is within the interval, or there is none to tell them apart."""
        return not (self.low > 0 or self.high < 0)


def compare_windows(
    nll: np.ndarray, other: np.ndarray, counts: np.ndarray, *, draws: int = 2000, seed: int = 0
) -> Difference:
    """Paired bootstrap over windows: perplexity of ``nll`` against that of ``other``.

    All three are (windows,), of the same windows in the same order.

    Raises
    ------
    ValueError
        When the shapes differ.
    """
    if not nll.shape == other.shape == counts.shape:
        raise ValueError("the two runs did not score the same windows")
    gap = nll - other
    relative = float(np.expm1(gap.sum() / counts.sum()))
    if len(gap) < MIN_WINDOWS:
        return Difference(relative, math.nan, math.nan)
    random = np.random.default_rng(seed)
    picks = random.integers(0, len(gap), size=(draws, len(gap)))
    means = gap[picks].sum(1) / counts[picks].sum(1)
    low, high = np.expm1(np.quantile(means, [0.025, 0.975]))
    return Difference(relative, float(low), float(high))
