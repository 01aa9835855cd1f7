"""Reading untrusted files: up to a limit, from inside their folder, with clear errors.

A model's files may come from anywhere. What is read of them is limited in size before it is read,
names in them lead nowhere else, and what a library raises over them is an
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

#: Bytes of the largest config (a vocabulary of labels is in some), index or manifest that is read.
MAX_JSON_BYTES = 64 * 2**20
#: Bytes of the largest tokenizer file; the largest that are published have some 40 MiB.
MAX_TOKENIZER_BYTES = 512 * 2**20
#: Suffixes of the files that a model is loaded from.
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
    """The JSON object in a file of at most ``max_bytes`` bytes.

    Raises
    ------
    InputError
        When it is larger, holds anything else, or cannot be read.
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
    """Raise :class:`InputError` when a file is larger than any of its kind."""
    size = path.stat().st_size
    if size > max_bytes:
        raise InputError(
            f"{path} has {format_bytes(size)}; at most {format_bytes(max_bytes)} of such a file "
            "are "
            "read."
        )


# --- names ------------------------------------------------------------------------------------


def resolve_inside(folder: Path, name: str) -> Path:
    """The file that an index names, which has to be inside its folder.

    Raises
    ------
    InputError
        When the name is no relative path, or leads out of the folder.
    """
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute() or not name.isprintable():
        raise InputError(
            f"The index of {folder} names {name[:120]!r}, which is no file inside that folder; "
            "fetch or save the model again."
        )
    path = folder / name
    _check_link(path, folder)
    return path


def check_links(folder: Path) -> None:
    """Raise :class:`InputError` when a file that a model is loaded from lies in another folder.

    Only the snapshots of a Hugging Face cache are made of links, to the blobs beside them.
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
    except (OSError, RuntimeError) as error:  # links in a circle, a name that is too long
        shown = str(path) if len(str(path)) <= 300 else f"{str(path)[:300]}…"
        raise InputError(f"{shown} cannot be opened: {_strerror(error)}.") from error
    if not any(target.is_relative_to(root) for root in allowed):
        raise InputError(
            f"{path} is a link to a file outside its folder, which is not followed; put the file "
            "itself there."
        )


def _strerror(error: Exception) -> str:
    return getattr(error, "strerror", None) or exception_reason(error)


# --- what libraries raise ---------------------------------------------------------------------


@contextmanager
def wrap_library_errors(make_message: Callable[[str], str]) -> Iterator[None]:
    """Within the ``with``, whatever a library raises over a model's files is an InputError.

    ``make_message`` makes a sentence of the reason. The block is to hold calls of libraries and
    little else. Errors of this project that are sentences already, too little memory, and what
    functions of this project raise by themselves (which would be a defect in them) go on as they
    are.

    Raises
    ------
    InputError
        In the place of the library's error.
    """
    try:
        yield
    except BaseException as error:
        # Rust's panics are no Exception, but interrupts and exits aren't either.
        is_library_error = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        is_passed_through = (
            isinstance(error, LsqError) or type(error).__name__ == "OutOfMemoryError"
        )
        if not is_library_error or is_passed_through or _raised_by_own_code(error.__traceback__):
            raise
        raise InputError(make_message(exception_reason(error))) from error


def _raised_by_own_code(trace: TracebackType | None) -> bool:
    """Whether an error was raised by a function of this project that the block called.

    An error that is raised in the block itself is that of a library without Python frames. Before
    the block's frame come those of context managers, which are generators.
    """
    codes = []
    while trace is not None:
        codes.append(trace.tb_frame.f_code)
        trace = trace.tb_next
    called = list(dropwhile(lambda code: code.co_flags & CO_GENERATOR, codes))[1:]
    return bool(called) and called[-1].co_filename.startswith(_PACKAGE)
