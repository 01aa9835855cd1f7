"""Errors that are reported to the user as one sentence."""

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

#: Maximum length of a library's message quoted in an error.
_MAX_REASON_CHARS = 400
#: Matches the source lines and stack frames that torch appends to its messages.
_FRAMES = re.compile(
    r" (?:Exception raised from |/\S+\.(?:h|cpp|cu):\d+ \(most recent call first\)).*"
)
_SENTENCES = re.compile(r"[^.!?]+[.!?]?|[.!?]")
#: Matches references in library messages to output printed elsewhere, which isn't shown here.
_POINTERS = re.compile(
    r"\b(?:above (?:report|exception|error|message)|report above|see above|"
    r"set_verbosity|Stack trace below)\b",
    re.IGNORECASE,
)


class LsqError(Exception):
    """The work failed; the message is one sentence saying what failed, where, and what to do.

    The command line prints it and exits with 1; the app shows it instead of the result.
    """

    exit_code = 1


class InputError(LsqError):
    """The request cannot be met: a wrong path, an unreachable budget, an unknown name.

    The command line exits with 2.
    """

    exit_code = 2


def choose(options: Mapping[str, T], name: str, kind: str) -> T:
    """Return the option with this name; ``kind`` is a noun with article for the error message.

    >>> choose({"a": 1, "b": 2}, "c", "a letter")
    Traceback (most recent call last):
        ...
    lsq_core.errors.InputError: 'c' is not a letter; choose one of a, b.

    Raises
    ------
    InputError
        If there is no such option.
    """
    if name not in options:
        raise InputError(f"'{name}' is not {kind}; choose one of {', '.join(options)}.")
    return options[name]


class DeviceMemoryError(LsqError):
    """A device ran out of memory; doing less of the work at a time may succeed."""


def exception_reason(error: BaseException) -> str:
    """Return a library exception's message as one line without a final full stop, to be quoted.

    All lines are joined, since the first one often ends before the reason does ("one of:"), and
    references to output printed elsewhere are dropped. If nothing is left, the reason is that of
    the exception's cause, or else its type. A long message is cut after a sentence or with an
    ellipsis.

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
    """Translate out-of-memory and disk-full errors into errors that say what to do."""
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
