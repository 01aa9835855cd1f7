"""Standard output and error, whatever reads them: any encoding, and a reader that leaves early."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding lacks by characters that every one has."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    text = "".join(_PLAIN.get(c, ascii(c)[1:-1]) for c in missing)
    return text, error.end


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
