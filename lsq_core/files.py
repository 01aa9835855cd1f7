"""Atomic writing and checked reading of files; all other modules write their files through it.

A file written here has either its old or its new content, never part of it, even after a power
cut, a kill or on a full disk. Files are checked when read back: an empty, truncated or unexpected
file raises :class:`DamagedFileError`, so that only its own content is lost.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lsq_core.errors import InputError, LsqError, exception_reason

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

#: Error numbers of a full disk, and of a disk or file that can't be written at all.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EROFS, errno.EACCES, errno.EPERM)
#: Maximum size of a JSON file that is read back.
_MAX_JSON_BYTES = 256 * 2**20


class DamagedFileError(LsqError):
    """A file doesn't have the content that was written; the message says which file and why."""


# --- writing --------------------------------------------------------------------------------


def write_bytes(path: Path, content: bytes, *, new: bool = False) -> None:
    """Write a file atomically; see :func:`atomic_writer`."""
    with atomic_writer(path, new=new) as file:
        file.write(content)


@contextmanager
def atomic_writer(path: Path, *, new: bool = False) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces ``path`` when the ``with`` block succeeds.

    The file is synced before it replaces the old one, and its folder afterwards; on failure
    nothing of it is left behind. With ``new`` the file must not exist yet. A device or pipe is
    written to directly.

    Raises
    ------
    InputError
        If the path is invalid or cannot be written, or with ``new`` the file exists.
    LsqError
        If the disk is full or fails.
    """
    try:
        target = _target(path, new)
        if target.exists() and not target.is_file():
            with target.open("wb") as device:
                yield device
        else:
            with _atomic_replacement(target, new) as file:
                yield file
    except FileExistsError as error:
        raise InputError(f"{path} already exists; choose another file name.") from error
    except OSError as error:
        raise write_error(path, error) from error


def _target(path: Path, new: bool) -> Path:
    """Return the path with all links resolved, after checking that it can be a file."""
    try:
        target = Path(os.path.realpath(path))
    except ValueError as error:  # a null byte
        raise write_error(path, error) from error
    if not path.name or target.is_dir():
        raise InputError(f"'{path}' is a folder; give the path of a file.")
    if new and target.is_file():
        raise FileExistsError
    return target


@contextmanager
def _atomic_replacement(target: Path, new: bool) -> Iterator[BinaryIO]:
    temporary = target.with_name(f".{uuid.uuid4().hex[:12]}.new")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if new:
            _link(temporary, target)
        else:
            temporary.replace(target)
        fsync_folder(target.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _link(temporary: Path, target: Path) -> None:
    """Give a file its final name by linking, which unlike renaming never replaces a file."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS) or target.exists():
            raise
        temporary.replace(target)  # the file system has no hard links


def lock_folder(folder: Path) -> int:
    """Lock a folder until the returned descriptor is closed or the process ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(OSError):  # the file system has no locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # :func:`is_locked` may hold it for a moment
    return descriptor


def is_locked(folder: Path) -> bool:
    """Return whether a process holds the lock of a folder (:func:`lock_folder`)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def fsync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk, if its file system supports that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Sync all files of a folder, written by other code, and its entries to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_sha256(path: Path) -> str:
    """Return :func:`file_sha256`, cached in this process until the file changes."""
    path = path.resolve()
    status = path.stat()
    return _sha256_of_version(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=256)
def _sha256_of_version(path: Path, size: int, modified_ns: int, changed_ns: int) -> str:
    return file_sha256(path)


def write_error(path: Path, error: Exception) -> LsqError:
    """Return the error to show to the user if a file could not be written."""
    number = getattr(error, "errno", None)
    if number in _FULL:
        return LsqError(f"The disk is full, so {path} was not written: make room and try again.")
    if number == errno.EIO:
        return LsqError(f"{path} was not written, because the disk failed; check it.")
    reason = getattr(error, "strerror", None) or exception_reason(error)
    return InputError(f"{path} cannot be written ({reason}); give another path.")


def translate_disk_error(error: BaseException) -> LsqError | None:
    """Return the error for a full, failing or read-only disk, or None for any other failure."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (*_FULL, *_DENIED, errno.EIO):
            where = error.filename or "a file"
            if error.errno in _FULL:
                return LsqError(f"The disk is full ({where}); make room and try again.")
            return LsqError(
                f"{where} cannot be read or written ({error.strerror}); check its permissions."
            )
        error = error.__cause__
    return None


def resolve_path(path: str | Path) -> Path:
    """Return a path given by the user as an absolute path, with ``~`` expanded.

    Raises
    ------
    InputError
        If the path is invalid: too long, a loop of links, or in the home of an unknown user.
    """
    try:
        whole = Path(path).expanduser().resolve()
        whole.exists()  # raises for an invalid path, not for a missing file
    except (OSError, RuntimeError, ValueError) as error:
        shown = str(path) if len(str(path)) <= 200 else f"{str(path)[:60]}…"
        reason = getattr(error, "strerror", None) or exception_reason(error)
        raise InputError(f"'{shown}' is not a valid path ({reason}); give another.") from error
    return whole


# --- reading back ---------------------------------------------------------------------------


def read_json(path: Path) -> dict | None:
    """Return the object in a JSON file, or None if the file does not exist.

    Raises
    ------
    DamagedFileError
        If the file does not contain a JSON object, is too large, or cannot be read.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise DamagedFileError(f"{path} is larger than any valid file of its kind.")
        content = json.loads(path.read_bytes(), parse_constant=_reject_constant)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise DamagedFileError(f"{path} is damaged: {exception_reason(error)}.") from error
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path} is damaged: it is not a JSON object.")
    return content


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to a ``.npz`` file atomically."""
    import numpy as np

    with atomic_writer(path) as file:
        np.savez(file, **arrays)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors to a ``.safetensors`` file atomically, without copying all of them at once."""
    import torch

    from lsq_core.model.dtypes import safetensors_name

    entries: dict[str, dict] = {"__metadata__": dict(header)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        dtype, shape = safetensors_name(tensor.dtype), list(tensor.shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)  # align the data to 8 bytes
    with atomic_writer(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            file.write(memoryview(content.numpy()))


def read_arrays(path: Path, expected: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """Read arrays written by :func:`write_arrays`; return None if the file does not exist.

    ``expected`` has an array of the expected shape and dtype for each; values must be finite.

    Raises
    ------
    DamagedFileError
        If an array is missing or not as expected, or the file cannot be read.
    """
    import numpy as np

    read_errors = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in expected}
    except FileNotFoundError:
        return None
    except (*read_errors, NotImplementedError, RuntimeError, MemoryError, SyntaxError) as error:
        raise DamagedFileError(f"{path} is damaged: {exception_reason(error)}.") from error
    for name, array in expected.items():
        own = found[name]
        if (own.shape, own.dtype) != (array.shape, array.dtype) or not np.isfinite(own).all():
            raise DamagedFileError(
                f"{path} is damaged: its {name} does not match what was written."
            )
    return found
