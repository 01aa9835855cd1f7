"""Evaluation protocols: how a corpus is cut into windows, and which of their tokens are scored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lsq_core.errors import InputError

PROTOCOLS = ("strided", "blocks", "llamacpp-512")
#: Window length in tokens by protocol, if the model's context allows it.
_PROTOCOL_CONTEXT = {"strided": 1024, "blocks": 2048, "llamacpp-512": 512}
#: The fewest windows for a bootstrap interval.
MIN_WINDOWS = 8
#: The fewest predicted tokens for a perplexity; with fewer, single words dominate it.
MIN_PREDICTED = 64


@dataclass(frozen=True)
class Protocol:
    """Windows of ``context`` tokens, of which the last ``scored`` are scored.

    Windows overlap, so that every token is scored, unless they are scored in full or are
    ``disjoint``.
    """

    name: str
    context: int
    scored: int
    disjoint: bool = False

    @classmethod
    def named(cls, name: str, model_context: int) -> Protocol:
        """Return one of ``PROTOCOLS`` for a model's context length in tokens.

        ``llamacpp-512`` is the protocol of llama.cpp's ``perplexity``: windows of 512 tokens, each
        starting with the beginning-of-sequence token instead of its first token, in which the
        predictions after the first half are scored. A context shorter than the protocol's own
        becomes part of the name: ``strided-512/256``.

        Raises
        ------
        InputError
            If there is no such protocol.
        """
        _check_protocol(name)
        context = min(_PROTOCOL_CONTEXT[name], model_context)
        short = context < _PROTOCOL_CONTEXT[name]
        if name == "strided":
            return cls(
                f"strided-{context}/{context // 2}" if short else name, context, context // 2
            )
        if name == "blocks":
            return cls(f"blocks-{context}" if short else name, context, context)
        return cls(f"llamacpp-{context}", context, context - context // 2 - 1, disjoint=True)


def _check_protocol(name: str) -> None:
    if name not in PROTOCOLS:
        names = f"{', '.join(PROTOCOLS[:-1])} or {PROTOCOLS[-1]}"
        raise InputError(f"'{name}' is not a protocol; choose {names}.")


@dataclass(frozen=True)
class Window:
    """Token positions ``start`` to ``stop`` of the stream; the last ``scored`` are scored."""

    start: int
    stop: int
    scored: int


def make_windows(tokens: int, protocol: Protocol) -> list[Window]:
    """Cut a stream of ``tokens`` tokens, including its first, into windows.

    With ``strided``, window ``k`` scores the tokens after those scored by window ``k − 1``, and the
    last window the remainder. With the others, windows do not overlap and the remainder is dropped.

    Raises
    ------
    InputError
        If the windows predict fewer than ``MIN_PREDICTED`` tokens.
    """
    size, step = protocol.context, protocol.scored
    separate = step == size or protocol.disjoint
    if separate:
        starts = range(0, tokens - size + 1, size)
        windows = [Window(i, i + size, min(step, size - 1)) for i in starts]
    else:
        windows = []
        for begin in range(0, tokens, step):
            stop = min(begin + step, tokens)
            start = max(begin + step - size, 0)
            windows.append(Window(start, stop, min(stop - begin, stop - start - 1)))
    windows = [w for w in windows if w.scored > 0]
    predicted = sum(window.scored for window in windows)
    if predicted < MIN_PREDICTED:
        needs = MIN_PREDICTED + 1
        if separate:
            scored = max(1, min(step, size - 1))
            needs = size * -(-MIN_PREDICTED // scored)
        raise InputError(
            f"The text has {tokens} tokens, of which the protocol {protocol.name} predicts "
            f"{predicted}, and a perplexity needs {MIN_PREDICTED} predicted tokens; give a text of "
            f"at least {needs} tokens{' or the protocol strided' * separate}."
        )
    return windows


@dataclass(frozen=True, eq=False)
class EvaluationText:
    """A token stream (ids without special tokens, int64 (tokens,)) and its protocol.

    ``batch_tokens`` is the batch size in tokens, None for the device's default; a longer window
    forms its own batch.
    """

    ids: np.ndarray
    protocol: Protocol
    batch_tokens: int | None = None


@dataclass(frozen=True)
class EvaluationRequest:
    """An evaluation: a corpus, a protocol, and the maximum number of tokens (None for all).

    ``split`` is the part of the corpus: ``evaluation``, or ``calibration`` for figures used to
    choose plans.
    """

    corpus: str = "stdlib"
    protocol: str = "strided"
    max_tokens: int | None = None
    split: str = "evaluation"

    def __post_init__(self) -> None:
        _check_protocol(self.protocol)
        if self.max_tokens is not None and type(self.max_tokens) is not int:
            raise InputError(f"max-tokens must be an integer, not {self.max_tokens!r:.60}.")
        if self.max_tokens is not None and self.max_tokens <= MIN_PREDICTED:
            raise InputError(
                f"max-tokens must be at least {MIN_PREDICTED + 1}, not {self.max_tokens}: a "
                f"perplexity needs {MIN_PREDICTED} predicted tokens."
            )
