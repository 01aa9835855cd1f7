"""Standard output and error, robust to any encoding and to readers that close early."""

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

#: Replacements for characters that a terminal cannot display.
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
#: Control characters, with which a name could move a terminal's cursor, and characters that change
#: the direction of text.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that an encoding lacks with ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    text = "".join(_PLAIN.get(c, ascii(c)[1:-1]) for c in missing)
    return text, error.end


def escape_controls(text: str, allowed: str = "") -> str:
    """Replace control characters, except those in ``allowed``, with Python's escape sequences."""
    return _CONTROLS.sub(lambda c: c[0] if c[0] in allowed else repr(c[0])[1:-1], text)


def configure_streams() -> None:
    """Let standard output and error accept any character."""
    codecs.register_error(_HANDLER, _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_HANDLER)


def print_json(content: object) -> None:
    """Print one JSON document, in ASCII if the output cannot encode its characters."""
    text = json_text(content)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = json_text(content, ascii=True)
    print(text)


def print_result(call: Callable[[Any], None], result: object) -> None:
    """Print what ``call`` prints about a result, with control characters escaped."""
    text = StringIO()
    with redirect_stdout(text):
        call(result)
    print(escape_controls(text.getvalue(), "\n\t"), end="")


@contextmanager
def ignore_broken_pipe() -> Iterator[None]:
    """Stop printing without an error if the reader closes the pipe, as ``head`` does.

    The command itself has finished by then.

    Raises
    ------
    OSError
        If standard output cannot be written for another reason, such as a full disk.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it exits, which must not fail.
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
