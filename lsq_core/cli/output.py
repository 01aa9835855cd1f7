"""Standard output and error, whatever reads them: any encoding, and a reader that leaves early."""

from __future__ import annotations

import codecs
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from typing import Any

from lsq_core.jsontext import json_text

#: What stands for characters of ours on a terminal that can't show them.
_PLAIN = {
    "×": "x",
    "·": "-",
    "…": "...",
    "–": "-",
    "—": "-",
    "−": "-",
    "→": "->",
    "≥": ">=",
    "≤": "<=",
    "±": "+-",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
    "•": "-",
    "✓": "ok",
    "²": "^2",
    "\u00a0": " ",
}
_HANDLER = "lsq-plain"
#: Characters that a terminal acts on, by which a name could move its cursor, and those that turn
#: the direction of text.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding lacks by characters that every one has."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    text = "".join(_PLAIN.get(c, ascii(c)[1:-1]) for c in missing)
    return text, error.end


def escape_controls(text: str, allowed: str = "") -> str:
    """A text with its control characters, except those in ``allowed``, as Python's escapes."""
    return _CONTROLS.sub(lambda c: c[0] if c[0] in allowed else repr(c[0])[1:-1], text)


def configure_streams() -> None:
    """Let standard output and error take any character."""
    codecs.register_error(_HANDLER, _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_HANDLER)


def print_json(content: object) -> None:
    """Print one JSON document, its characters escaped where the output can't take them."""
    text = json_text(content)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = json_text(content, ascii=True)
    print(text)


def print_result(call: Callable[[Any], None], result: object) -> None:
    """Have ``call`` print what a person reads of a result, without control characters of names."""
    text = StringIO()
    with redirect_stdout(text):
        call(result)
    print(escape_controls(text.getvalue(), "\n\t"), end="")


@contextmanager
def ignore_broken_pipe() -> Iterator[None]:
    """End printing when the reader has gone, as ``head`` does; what was asked for is done by then.

    Raises
    ------
    LsqError
        When what standard output goes to cannot be written, a full disk say.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends, which has to go somewhere.
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
