"""Files written whole, and read back with doubt; every other module writes its files by this one.

A file that is written here is found as it was or as it is now, never half of it, also after a
power cut, a kill or on a full disk. What is read back is checked: a file that is empty, cut or
not what its reader expects is :class:`DamagedFileError`, which costs what it held and nothing else.
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

#: Error numbers of a disk that takes no more, and of one that can't be written whatever is asked.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EROFS, errno.EACCES, errno.EPERM)
#: Bytes of the largest JSON file that is read back.
_MAX_JSON_BYTES = 256 * 2**20


class DamagedFileError(LsqError):
    """A file that was read back isn't what was written; the message says which, and how."""


# --- writing --------------------------------------------------------------------------------


def write_bytes(path: Path, content: bytes, *, new: bool = False) -> None:
    """Write a file whole; see :func:`atomic_writer`."""
    with atomic_writer(path, new=new) as file:
        file.write(content)


@contextmanager
def atomic_writer(path: Path, *, new: bool = False) -> Iterator[BinaryIO]:
    """A binary file to write within a ``with``, which takes its place when that ends well.

    It is synced before it takes its place, and its folder after; where anything goes wrong
    nothing of it is left. With ``new`` there must be no file of that name. A device or a pipe is
    written to as it is.

    Raises
    ------
    InputError
        When there can be no such file, or with ``new`` there is one.
    LsqError
        When the disk is full or fails.
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
        raise InputError(f"{path} already exists; give a new file.") from error
    except OSError as error:
        raise write_error(path, error) from error


def _target(path: Path, new: bool) -> Path:
    """Where a file of this path is, whatever links lead there."""
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
    """Give a file its name, which unlike renaming it takes no other file's place."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS) or target.exists():
            raise
        temporary.replace(target)  # a file system without links


def lock_folder(folder: Path) -> int:
    """A descriptor that marks a folder as in use until it is closed, or its process ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of a folder (:func:`lock_folder`)."""
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
    """Have the names in a folder on the disk, where its file system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Have every file of a folder that others wrote on the disk, and the folder's own names."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content; 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_sha256(path: Path) -> str:
    """The same, computed once in a process for as long as nobody writes to the file."""
    path = path.resolve()
    status = path.stat()
    return _sha256_of_version(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=256)
def _sha256_of_version(path: Path, size: int, modified_ns: int, changed_ns: int) -> str:
    return file_sha256(path)


def write_error(path: Path, error: Exception) -> LsqError:
    """What to tell a person whose file could not be written."""
    number = getattr(error, "errno", None)
    if number in _FULL:
        return LsqError(f"The disk is full, so {path} was not written: make room and try again.")
    if number == errno.EIO:
        return LsqError(f"{path} was not written, because the disk failed; check it.")
    reason = getattr(error, "strerror", None) or exception_reason(error)
    return InputError(f"{path} cannot be written ({reason}); give another path.")


def translate_disk_error(error: BaseException) -> LsqError | None:
    """The error for a disk that is full or read-only, None for any other failure."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (*_FULL, *_DENIED, errno.EIO):
            where = error.filename or "a file"
            if error.errno in _FULL:
                return LsqError(f"The disk is full ({where}); make room and try again.")
            return LsqError(f"{where} cannot be written or read ({error.strerror}); change that.")
        error = error.__cause__
    return None


def resolve_path(path: str | Path) -> Path:
    """The absolute path that a person gave, ``~`` being a home.

    Raises
    ------
    InputError
        When no file can have it: it is too long, leads back to itself, or into nobody's home.
    """
    try:
        whole = Path(path).expanduser().resolve()
        whole.exists()  # what is only missing is no error
    except (OSError, RuntimeError, ValueError) as error:
        shown = str(path) if len(str(path)) <= 200 else f"{str(path)[:60]}…"
        reason = getattr(error, "strerror", None) or exception_reason(error)
        raise InputError(f"'{shown}' can be no path ({reason}); give another.") from error
    return whole


# --- reading back ---------------------------------------------------------------------------


def read_json(path: Path) -> dict | None:
    """The object in a JSON file, or None where there is no file.

    Raises
    ------
    DamagedFileError
        When it holds anything else, or cannot be read.
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
    raise ValueError(f"{name} is no JSON")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays into a ``.npz`` file, whole."""
    import numpy as np

    with atomic_writer(path) as file:
        np.savez(file, **arrays)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors into a ``.safetensors`` file, whole, without a second copy of all of them."""
    import torch

    from lsq_core.model.dtypes import safetensors_name

    entries: dict[str, dict] = {"__metadata__": dict(header)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        dtype, shape = safetensors_name(tensor.dtype), list(tensor.shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)  # numbers begin at a multiple of their size
    with atomic_writer(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            file.write(memoryview(content.numpy()))


def read_arrays(path: Path, expected: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """Arrays that :func:`write_arrays` wrote, or None where there is no file.

    ``expected`` has an array of the expected shape and dtype for each; values have to be finite.

    Raises
    ------
    DamagedFileError
        When one is missing or another than expected, or the file cannot be read.
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
