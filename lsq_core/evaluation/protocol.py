"""How a text is cut into windows, and which of their tokens are predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lsq_core.errors import InputError

if TYPE_CHECKING:
    pass


PROTOCOLS = ("strided", "blocks")
#: Context and scored tokens of a window, by protocol, where the model's context allows.
_PROTOCOL_CONTEXT = {"strided": 1024, "blocks": 2048}
#: Windows that an interval needs at least.
MIN_WINDOWS = 8
#: Predicted tokens that a perplexity is computed from at least; fewer tell of single words.
MIN_PREDICTED = 64


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
        context = min(_PROTOCOL_CONTEXT[name], model_context)
        short = context < _PROTOCOL_CONTEXT[name]
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


def make_windows(tokens: int, protocol: Protocol) -> list[Window]:
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
class EvaluationText:
    """A token stream to evaluate on: ids without special tokens, int64 (tokens,), and how."""

    ids: np.ndarray
    protocol: Protocol


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate on: a corpus, a protocol, and at most so many tokens (None: all)."""

    corpus: str = "stdlib"
    protocol: str = "strided"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise InputError(f"'{self.protocol}' is not a protocol; choose strided or blocks.")
        if self.max_tokens is not None and self.max_tokens <= MIN_PREDICTED:
            raise InputError(
                f"max-tokens has to be at least {MIN_PREDICTED + 1}, and {self.max_tokens} were "
                f"asked for: a perplexity needs {MIN_PREDICTED} predicted tokens."
            )
