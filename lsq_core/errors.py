"""Errors that are reported to the user as one sentence."""

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

#: Characters of a foreign message that a sentence quotes.
_MAX_REASON_CHARS = 400
#: Where torch goes on with its own source lines and the frames of a stack.
_FRAMES = re.compile(
    r" (?:Exception raised from |/\S+\.(?:h|cpp|cu):\d+ \(most recent call first\)).*"
)
_SENTENCES = re.compile(r"[^.!?]+[.!?]?|[.!?]")
#: What libraries say in sentences that point to what they printed elsewhere, which isn't shown
#: here.
_POINTERS = re.compile(
    r"\b(?:above (?:report|exception|error|message)|report above|see above|"
    r"set_verbosity|Stack trace below)\b",
    re.IGNORECASE,
)


class LsqError(Exception):
    """The work could not be done; the message is one sentence: what, where, what to do.

    The command line prints it and exits with 1; the app shows it in place of the result.
    """

    exit_code = 1


class InputError(LsqError):
    """What was asked for cannot be: a wrong path, an unreachable budget, an unknown name.

    The command line exits with 2.
    """

    exit_code = 2


def choose(options: Mapping[str, T], name: str, kind: str) -> T:
    """The option of a name; ``kind`` is what such options are called, with its article.

    >>> choose({"a": 1, "b": 2}, "c", "a letter")
    Traceback (most recent call last):
        ...
    lsq_core.errors.InputError: 'c' is not a letter; choose one of a, b.

    Raises
    ------
    InputError
        When there is none.
    """
    if name not in options:
        raise InputError(f"'{name}' is not {kind}; choose one of {', '.join(options)}.")
    return options[name]


class DeviceMemoryError(LsqError):
    """A device had too little memory for the work; less of it at a time may go well."""


def exception_reason(error: BaseException) -> str:
    """What an exception of a library says, as a clause to quote: one line, whole, without a stop.

    All its lines are joined, because the first alone often ends before the reason does ("one
    of:"), and references to what was printed elsewhere are dropped. Where nothing is left the
    reason is that of the exception's cause, or else its type. A long message ends after a
    sentence or with an ellipsis.

    >>> exception_reason(ValueError("Couldn't load it from one of: \\n(1) a file,\\n(2) a class."))
    "Couldn't load it from one of: (1) a file, (2) a class"
    """
    text = "".join(c if c.isprintable() else " " for c in str(error))
    text = _FRAMES.sub("", " ".join(text.split()))
    text = "".join(s for s in _SENTENCES.findall(text) if not _POINTERS.search(s)).strip()
    if not text and error.__cause__ is not None:
        return exception_reason(error.__cause__)
    if not text and getattr(error, "strerror", None):
        text = error.strerror
    if len(text) > _MAX_REASON_CHARS:
        sentence_end = max(text.rfind(mark, 0, _MAX_REASON_CHARS) for mark in (". ", "! ", "; "))
        text = (
            text[:sentence_end]
            if sentence_end > _MAX_REASON_CHARS // 3
            else text[:_MAX_REASON_CHARS].rsplit(" ", 1)[0] + " …"
        )
    return text.rstrip(".!:;, ") or type(error).__name__


@contextmanager
def translate_resource_errors(device: str) -> Iterator[None]:
    """Turn running out of memory or disk into a sentence that says what to do."""
    try:
        yield
    except LsqError:
        raise
    except MemoryError as error:
        raise DeviceMemoryError(
            f"There is not enough memory on {device}; use a smaller model."
        ) from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise LsqError(f"The disk is full ({error.filename}); make room and try again.") from error
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" and "not enough memory" not in str(error):
            raise
        raise DeviceMemoryError(
            f"{device} ran out of memory; free some, use --device cpu, or choose a smaller model."
        ) from error
