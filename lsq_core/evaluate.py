"""Perplexity by two named protocols, distance to full precision, and speed (method §6).

A protocol's windows are laid over a token stream that begins with the tokenizer's
beginning-of-sequence token, where it has one; every later window has that token in the place of
its first. So a window never exceeds the model's context, and each token but the stream's first
is predicted at most once.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lsq_core.errors import InputError, LsqError
from lsq_core.files import Damaged, read_arrays, write_arrays

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Progress = Callable[[int, int, str], None]

PROTOCOLS = ("strided", "blocks")
#: Context and scored tokens of a window, by protocol, where the model's context allows.
_CONTEXT = {"strided": 1024, "blocks": 2048}
#: Windows that an interval needs at least.
MIN_WINDOWS = 8
#: Predicted tokens that a perplexity is computed from at least; fewer tell of single words.
MIN_PREDICTED = 64
#: Seconds between two times that an evaluation keeps what it has so far.
_KEEP_EVERY = 2.0
#: Tokens read at once by device: what the caches of a CPU are best with, and what fills a GPU.
_TOKENS_AT_ONCE = {"cpu": 2**11, "cuda": 2**15}
#: Logits of one model held at once, in numbers (256 MiB of them): batches are no larger than this.
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
        When the windows predict fewer than ``MIN_PREDICTED`` tokens.
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
    predicted = sum(window.scored for window in windows)
    if predicted < MIN_PREDICTED:
        needs = max(size, MIN_PREDICTED + 1) if step == size else MIN_PREDICTED + 1
        raise InputError(
            f"The text has {tokens} tokens, of which the protocol {protocol.name} predicts "
            f"{predicted}, and a perplexity needs {MIN_PREDICTED} predicted tokens; give a text of "
            f"at least {needs} tokens{' or the protocol strided' * (step == size)}."
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
    kl: float | None = None
    top1: float | None = None
    corpus: str = ""
    corpus_sha256: str = ""
    corpus_source: str = ""
    truncated: bool = False
    #: Most memory of a GPU that one batch took beyond what was there before it: logits, attention
    #: and the weights it decodes; None on a CPU, where no such figure can be had of one model.
    working_bytes: int | None = None
    #: Seconds of the run by stage, where it was one (:class:`lsq_core.clock.Clock`).
    times: dict[str, float] = field(default_factory=dict)
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


@dataclass(frozen=True, eq=False)
class Text:
    """A token stream to evaluate on: ids without special tokens, int64 (tokens,), and how."""

    ids: np.ndarray
    protocol: Protocol


#: The evaluation of a model and, where there is a reference, that of the reference.
Pair = tuple[Evaluation, Evaluation | None]


def evaluate(
    model: nn.Module,
    ids: np.ndarray,
    protocol: Protocol,
    *,
    bos: int | None,
    reference: nn.Module | None = None,
    progress: Progress = lambda done, total, message: None,
    checkpoint: Path | None = None,
) -> Pair:
    """Perplexity of one model on one text; see :func:`evaluate_together`."""
    texts, checkpoints = [Text(ids, protocol)], [[checkpoint]]
    [[pair]] = evaluate_together(
        [model],
        texts,
        bos=bos,
        reference=reference,
        progress=progress,
        checkpoints=checkpoints,
    )
    return pair


def evaluate_together(
    models: Sequence[nn.Module],
    texts: Sequence[Text],
    *,
    bos: int | None,
    reference: nn.Module | None = None,
    progress: Progress = lambda done, total, message: None,
    checkpoints: Sequence[Sequence[Path | None]] | None = None,
) -> Iterator[list[Pair]]:
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
    from lsq_core.load import check_tokens

    for text in texts:
        check_tokens(models[0], [int(text.ids.max()), *([] if bos is None else [bos])])
    device = next(models[0].parameters()).device
    files = checkpoints or [[None] * len(models)] * len(texts)
    walks = [_Walk(text, bos, paths) for text, paths in zip(texts, files, strict=True)]
    left = _batches(walks, models[0].config.get_text_config().vocab_size, device.type)
    total = sum(len(walk.windows) for walk in walks)
    done = total - sum(len(walks[text].passes[number]) for batch in left for text, number in batch)
    told = 0
    for damage in (file.damage for walk in walks for file in walk.files if file.damage):
        progress(done, total, f"{damage} Its windows are scored again.")
    progress(done, total, f"window {done} of {total}")
    for batch in [[], *left]:
        if batch:
            passes = [(walks[text], number) for text, number in batch]
            _score(models, reference, passes, device)
            done += sum(len(walk.passes[number]) for walk, number in passes)
            for walk in {text: walks[text] for text, _ in batch}.values():
                walk.save()
            progress(done, total, f"window {done} of {total}")
        while told < len(walks) and walks[told].is_read:
            yield walks[told].finish(reference is not None)
            told += 1


class _Walk:
    """One text's windows, and what each model (and the reference beside it) made of them."""

    def __init__(self, text: Text, bos: int | None, checkpoints: Sequence[Path | None]) -> None:
        import torch

        ids = text.ids if bos is None else np.concatenate([[bos], text.ids])
        self.stream, self.bos, self.protocol = torch.from_numpy(ids), bos, text.protocol
        self.windows = lay_windows(len(ids), text.protocol)
        count = len(self.windows)
        #: Numbers of the windows that begin at the same token, shortest first: one pass reads them.
        self.passes = [
            list(numbers)
            for _, numbers in itertools.groupby(range(count), lambda k: self.windows[k].start)
        ]
        self.tallies = [(_Tally(count), _Tally(count)) for _ in checkpoints]
        pairs = zip(checkpoints, self.tallies, strict=True)
        self.files = [_Kept(path, tallies) for path, tallies in pairs]
        for file in self.files:
            file.restore()

    @property
    def left(self) -> list[int]:
        """Passes over windows that some model has not scored yet."""
        counts = np.stack([own.counts for own, _ in self.tallies])
        unread = (counts == 0).any(axis=0)
        return [number for number, windows in enumerate(self.passes) if unread[windows].any()]

    @property
    def is_read(self) -> bool:
        """Whether every window is scored."""
        return not self.left

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

    def put(self, number: int, tally: _Tally, figures: dict[str, np.ndarray]) -> None:
        """Take up the figures of a pass, (scored,), for each of its windows."""
        begin = 0
        for window in self.passes[number]:
            scored = self.windows[window].scored
            end = begin + scored
            tally.put(window, scored, {name: own[begin:end].sum() for name, own in figures.items()})
            begin = end

    def save(self) -> None:
        """Keep what was scored so far, every few seconds and in the end."""
        for file in self.files:
            file.save(last=self.is_read)

    def finish(self, compared: bool) -> list[Pair]:
        """What came of it, a pair for each model."""
        name = self.protocol.name
        return [
            (own.finish(name, compared), other.finish(name) if compared else None)
            for own, other in self.tallies
        ]


def _batches(walks: Sequence[_Walk], vocabulary: int, device: str) -> list[list[tuple[int, int]]]:
    """What is left to score as (text, pass), in batches of passes of one length and one count.

    A batch holds as many as the device and the memory are best with. Those of the first text come
    first, so that its figures are there before the next one is read.
    """
    shapes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for text, walk in enumerate(walks):
        for number in walk.left:
            shapes.setdefault(walk.shape(number), []).append((text, number))
    batches = []
    for (length, scored), places in shapes.items():
        most = min(_TOKENS_AT_ONCE[device] // length, _LOGITS_AT_ONCE // (scored * vocabulary))
        size = max(1, most)
        batches += [places[i : i + size] for i in range(0, len(places), size)]
    return sorted(batches, key=lambda places: places[0][0])


def _score(
    models: Sequence[nn.Module],
    reference: nn.Module | None,
    passes: Sequence[tuple[_Walk, int]],
    device: torch.device,
) -> None:
    """Run a batch through the reference and each model, and keep what they predict."""
    import torch

    with torch.inference_mode():
        batch = torch.stack([walk.ids(number) for walk, number in passes]).to(device)
        first, number = passes[0]
        _, scored = first.shape(number)
        expected = None
        if reference is not None:
            expected = _Predicted.by(reference, batch, scored, "The full-precision model")
        for place, model in enumerate(models):
            predicted = _Predicted.by(model, batch, scored, "The model")
            figures = predicted.figures(expected)
            if not all(np.isfinite(values).all() for values in figures.values()):
                raise LsqError(_where_not_finite(model, batch, "The model"))
            for row, (walk, number) in enumerate(passes):
                own, other = walk.tallies[place]
                own.worked(predicted.working_bytes)
                walk.put(number, own, {name: values[row] for name, values in figures.items()})
                if expected is not None:
                    known = expected.figures()
                    walk.put(number, other, {name: values[row] for name, values in known.items()})


@dataclass(frozen=True, eq=False)
class _Predicted:
    """What a model predicts for a batch of passes.

    ``logs`` are log-probabilities (passes, scored, vocabulary), float32; ``nll`` is (passes,
    scored). ``seconds`` are those of the clock for each scored token; ``working_bytes`` what it
    took of a GPU's memory beyond what was there, None on a CPU.
    """

    logs: Tensor
    nll: np.ndarray
    seconds: float
    working_bytes: int | None

    @classmethod
    def by(cls, model: nn.Module, batch: Tensor, scored: int, what: str) -> _Predicted:
        """Run a batch (passes, tokens) through a model, ``what`` it is in words.

        Raises
        ------
        LsqError
            When a predicted token's probability is no finite number.
        """
        from lsq_core.load import last_logits

        began, before = time.perf_counter(), _begin_memory(batch.device)
        # The logits before a token predict it: one more is kept, and the very last is not used.
        logs = last_logits(model, batch, scored + 1)[:, :-1].float().log_softmax(-1)
        picked = -logs.gather(-1, batch[:, -scored:, None])[..., 0]
        nll = picked.double().cpu().numpy()
        if not np.isfinite(nll).all():
            raise LsqError(_where_not_finite(model, batch, what))
        working = None if before is None else _peak_memory(batch.device) - before
        return cls(logs, nll, (time.perf_counter() - began) / nll.size, working)

    def figures(self, expected: _Predicted | None = None) -> dict[str, np.ndarray]:
        """For each scored token (passes, scored), by the names of :class:`_Tally`."""
        found = {"nll": self.nll, "seconds": np.full(self.nll.shape, self.seconds)}
        if expected is None:
            return found
        kl = (expected.logs.exp() * (expected.logs - self.logs)).sum(-1).double()
        agreed = self.logs.argmax(-1) == expected.logs.argmax(-1)
        return found | {"kl": kl.cpu().numpy(), "agreed": agreed.cpu().numpy()}


class _Tally:
    """What one model predicts, summed over the scored tokens of each window (windows,)."""

    def __init__(self, windows: int) -> None:
        self.working_bytes: int | None = None
        self.counts = np.zeros(windows, dtype=np.int64)
        self.sums = {name: np.zeros(windows) for name in ("nll", "seconds", "kl", "agreed")}

    def put(self, window: int, scored: int, figures: dict[str, float]) -> None:
        """Set the figures of one window."""
        self.counts[window] = scored
        for name, value in figures.items():
            self.sums[name][window] = value

    def worked(self, taken: int | None) -> None:
        """Take up what a batch took of a GPU's memory."""
        if taken is not None:
            self.working_bytes = max(taken, self.working_bytes or 0)

    @property
    def state(self) -> dict[str, np.ndarray]:
        """Every array by name."""
        return {"counts": self.counts} | self.sums

    def restore(self, kept: dict[str, np.ndarray]) -> None:
        """Take up a state."""
        self.counts = kept["counts"]
        self.sums = {name: kept[name] for name in self.sums}

    def finish(self, protocol: str, compared: bool = False) -> Evaluation:
        """The figures; KL and agreement only where it was compared."""
        tokens = self.counts.sum()
        return Evaluation(
            protocol=protocol,
            nll=self.sums["nll"],
            counts=self.counts,
            seconds=float(self.sums["seconds"].sum()),
            working_bytes=self.working_bytes,
            kl=float(self.sums["kl"].sum() / tokens) if compared else None,
            top1=float(self.sums["agreed"].sum() / tokens) if compared else None,
        )


class _Kept:
    """A file with the tallies so far, replaced whole, so that a killed process leaves a whole one.

    Windows come in an order of their own (:func:`_batches`), so a window is scored when it has a
    count.
    """

    def __init__(self, path: Path | None, tallies: tuple[_Tally, ...]) -> None:
        self.path, self.tallies = path, tallies
        self.written = time.monotonic()
        #: Why what the file held is of no use, '' where it is.
        self.damage = ""

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Every tally's arrays, by name and the tally's number."""
        return {
            f"{name}_{number}": array
            for number, tally in enumerate(self.tallies)
            for name, array in tally.state.items()
        }

    def restore(self) -> None:
        """Take up what the file holds; one that is damaged is deleted, and costs what it held."""
        if self.path is None:
            return
        try:
            kept = read_arrays(self.path, self.arrays)
        except Damaged as error:
            self.damage = str(error)
            self.path.unlink(missing_ok=True)
            return
        for number, tally in enumerate(self.tallies if kept else ()):
            tally.restore({name: kept[f"{name}_{number}"] for name in tally.state})

    def save(self, last: bool) -> None:
        """Write the file every few seconds, and when the last window is scored."""
        if self.path is None or not (last or time.monotonic() - self.written > _KEEP_EVERY):
            return
        write_arrays(self.path, self.arrays)
        self.written = time.monotonic()


def _begin_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory taken now, from which on the most is counted; None on a CPU."""
    if device.type != "cuda":
        return None
    import torch

    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_memory(device: torch.device) -> int:
    import torch

    return torch.cuda.max_memory_allocated(device)


def _where_not_finite(model: nn.Module, batch: Tensor, what: str) -> str:
    """Which module is the first, in the order of computing, to put out NaN or infinity."""
    found: list[str] = []

    def look(name: str) -> Callable:
        def hook(module: nn.Module, arguments: tuple, output: object) -> None:
            if not found and not _all_finite(output):
                found.append(name)

        return hook

    hooks = [m.register_forward_hook(look(name)) for name, m in model.named_modules() if name]
    try:
        model(batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    first = f"the first not to be is that of {found[0]}" if found else "its logits are not"
    instead = "bfloat16 or float32" if dtype == "float16" else "another plan or dtype"
    return (
        f"{what} has no perplexity: its outputs in {dtype} are not finite numbers, and {first}; "
        f"try {instead}."
    )


def _all_finite(output: object) -> bool:
    """Whether every float of a module's output is finite, however it is wrapped."""
    import torch

    if isinstance(output, torch.Tensor):
        return not output.is_floating_point() or bool(torch.isfinite(output).all())
    if isinstance(output, dict):
        output = tuple(output.values())
    return all(map(_all_finite, output)) if isinstance(output, (tuple, list)) else True


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
