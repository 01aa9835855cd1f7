"""Reading untrusted files: with a size limit, only from inside their folder, with clear errors.

A model's files may come from anywhere. Their size is checked before they are read, names in them
cannot lead outside their folder, and library errors about them are translated to
:class:`lsq_core.errors.InputError`. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import CO_GENERATOR
from itertools import dropwhile
from pathlib import Path
from types import TracebackType

from lsq_core.errors import InputError, LsqError, exception_reason
from lsq_core.units import format_bytes

#: Maximum size of a config (some include a vocabulary of labels), an index or a manifest.
MAX_JSON_BYTES = 64 * 2**20
#: Maximum size of a tokenizer file; the largest published ones are about 40 MiB.
MAX_TOKENIZER_BYTES = 512 * 2**20
#: Suffixes of the files from which a model is loaded.
_LOADED_SUFFIXES = {
    ".json",
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".model",
    ".txt",
    ".jinja",
}
_LOADED_SUFFIXES |= {".py", ".spm", ".tiktoken", ".bpe", ".vocab"}
_PACKAGE = f"{Path(__file__).parent}{os.sep}"


# --- reading ----------------------------------------------------------------------------------


def read_json_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict:
    """Return the JSON object in a file of at most ``max_bytes`` bytes.

    Raises
    ------
    InputError
        If the file is larger, does not contain a JSON object, or cannot be read.
    """
    try:
        check_size(path, max_bytes)
        content = json.loads(path.read_text("utf8"))
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{path} cannot be read as JSON: {exception_reason(error)}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object.")
    return content


def check_size(path: Path, max_bytes: int) -> None:
    """Raise :class:`InputError` if a file is larger than ``max_bytes``."""
    size = path.stat().st_size
    if size > max_bytes:
        raise InputError(
            f"{path} is {format_bytes(size)}; the limit for such files is "
            f"{format_bytes(max_bytes)}."
        )


# --- names ------------------------------------------------------------------------------------


def resolve_inside(folder: Path, name: str) -> Path:
    """Return the path of a file named in an index, which must be inside the index's folder.

    Raises
    ------
    InputError
        If the name is not a relative path, or leads outside the folder.
    """
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute() or not name.isprintable():
        raise InputError(
            f"The index of {folder} names {name[:120]!r}, which is not a file inside that folder; "
            "fetch or save the model again."
        )
    path = folder / name
    _check_link(path, folder)
    return path


def check_links(folder: Path) -> None:
    """Raise :class:`InputError` if a file that a model is loaded from links outside the folder.

    Only snapshots in a Hugging Face cache may consist of links, to the blobs next to them.
    """
    for path in folder.iterdir():
        if path.suffix.lower() in _LOADED_SUFFIXES and path.is_symlink():
            _check_link(path, folder)


def _check_link(path: Path, folder: Path) -> None:
    resolved_folder = folder.resolve()
    allowed = [resolved_folder]
    if resolved_folder.parent.name == "snapshots":
        allowed.append(resolved_folder.parent.parent / "blobs")
    try:
        target = path.resolve()
        target.is_file()
    except (OSError, RuntimeError) as error:  # a loop of links, or a name that is too long
        shown = str(path) if len(str(path)) <= 300 else f"{str(path)[:300]}…"
        raise InputError(f"{shown} cannot be opened: {_strerror(error)}.") from error
    if not any(target.is_relative_to(root) for root in allowed):
        raise InputError(
            f"{path} is a link to a file outside its folder, which is not followed; put the file "
            "itself there."
        )


def _strerror(error: Exception) -> str:
    return getattr(error, "strerror", None) or exception_reason(error)


# --- errors of libraries ----------------------------------------------------------------------


@contextmanager
def wrap_library_errors(make_message: Callable[[str], str]) -> Iterator[None]:
    """Translate errors raised by libraries within the ``with`` block to InputError.

    ``make_message`` turns the reason into a sentence. The block should contain library calls and
    little else. This project's own :class:`LsqError`, out-of-memory errors, and other errors raised
    by this project's functions (defects in them) pass through unchanged.

    Raises
    ------
    InputError
        Instead of the library's error.
    """
    try:
        yield
    except BaseException as error:
        # Rust panics are not an Exception, and neither are interrupts and exits.
        is_library_error = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        is_passed_through = (
            isinstance(error, LsqError) or type(error).__name__ == "OutOfMemoryError"
        )
        if not is_library_error or is_passed_through or _raised_by_own_code(error.__traceback__):
            raise
        raise InputError(make_message(exception_reason(error))) from error


def _raised_by_own_code(trace: TracebackType | None) -> bool:
    """Return whether an error was raised by a function of this project called in the block.

    An error raised in the block itself comes from a library without Python frames. The block's
    frame is preceded by those of context managers, which are generators.
    """
    codes = []
    while trace is not None:
        codes.append(trace.tb_frame.f_code)
        trace = trace.tb_next
    called = list(dropwhile(lambda code: code.co_flags & CO_GENERATOR, codes))[1:]
    return bool(called) and called[-1].co_filename.startswith(_PACKAGE)
