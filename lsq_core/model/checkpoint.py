"""Read and check the headers of a model's weight files, without importing torch.

The checks here need no knowledge of the architecture: damaged files, two versions of one tensor,
and checkpoints with the codes of a quantized model. Whether the tensors fit the architecture is
checked in :mod:`lsq_core.model.fit`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from lsq_core.errors import InputError, exception_reason
from lsq_core.model.dtypes import BITS
from lsq_core.untrusted import read_json_object, resolve_inside

INDEX = "model.safetensors.index.json"
#: Files in which quantization tools store what config.json lacks.
_QUANTIZER_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
#: Maximum header size in bytes (safetensors' own limit) and number of tensors in a header.
_MAX_HEADER_BYTES, _MAX_TENSORS = 100_000_000, 300_000
_MAX_DIMENSIONS = 16
#: Bytes of two tensors compared at a time.
_CHUNK = 2**22


@dataclass(frozen=True)
class TensorEntry:
    """A stored tensor: its file, safetensors dtype name and shape.

    It occupies ``bytes`` bytes of the file from offset ``start``; both are 0 in pickled files.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    bytes: int = 0


def read_entries(folder: Path, files: Iterable[Path]) -> dict[str, TensorEntry]:
    """Return every tensor of the given safetensors files, by name.

    Raises
    ------
    InputError
        If a file is damaged, the index and the files disagree, or two files hold different
        tensors of the same name.
    """
    stored_entries: dict[str, TensorEntry] = {}
    for path in files:
        header, start = _read_header(path)
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            stored = TensorEntry(path, entry["dtype"], shape, start + first, end - first)
            if not have_same_content(stored_entries.setdefault(name, stored), stored):
                raise InputError(
                    f"{name} is in {stored_entries[name].file.name} and, with other values, in "
                    f"{path.name} "
                    f"of {folder}; remove the file that is out of date."
                )
    _check_index(folder, stored_entries)
    return stored_entries


def _check_index(folder: Path, stored_entries: dict[str, TensorEntry]) -> None:
    """Raise if a tensor in the index is in no file, or it omits an existing model.safetensors."""
    index, named = folder / INDEX, read_index(folder)
    if named is None:
        return
    unstored = [name for name in named if name not in stored_entries]
    if unstored:
        raise InputError(
            f"{index.name} in {folder} lists {unstored[0]}, which is in none of its files; fetch "
            "or save the model again."
        )
    whole = folder / "model.safetensors"
    if whole.is_file() and whole.name not in named.values():
        raise InputError(
            f"{folder} holds {whole.name} and an index of other files, so it is ambiguous which "
            "are the weights; remove the outdated files."
        )


def read_index(folder: Path) -> dict[str, str] | None:
    """Return the file name of each tensor from a folder's index, None if it has no index.

    Raises
    ------
    InputError
        If the index is damaged, or names a file that is missing or outside the folder.
    """
    index = folder / INDEX
    if not index.is_file():
        return None
    named = read_json_object(index).get("weight_map")
    whole = isinstance(named, dict) and all(isinstance(name, str) for name in named.values())
    if not whole or not 0 < len(named) <= _MAX_TENSORS:
        raise InputError(
            f"{index} cannot be read: its weight_map doesn't say which file each tensor is in; "
            "fetch or save the model again."
        )
    files = {name: resolve_inside(folder, name) for name in set(named.values())}
    missing = sorted(name for name, path in files.items() if not path.is_file())
    if missing:
        raise InputError(
            f"{folder} lacks {missing[0]}, which {index.name} names; fetch or save it again."
        )
    return named


def have_same_content(one: TensorEntry, other: TensorEntry) -> bool:
    """Return whether two stored tensors are equal; usually they are the same object."""
    if one is other:
        return True
    if (one.dtype, one.shape, one.bytes) != (other.dtype, other.shape, other.bytes):
        return False
    remaining = one.bytes
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        while remaining > 0:
            count = min(_CHUNK, remaining)
            if first.read(count) != second.read(count):
                return False
            remaining -= count
    return True


def safetensors_header(path: Path) -> dict[str, dict]:
    """Return names, dtypes, shapes and offsets from a safetensors file without reading weights.

    Raises
    ------
    InputError
        If the file is truncated or not a safetensors file.
    """
    return _read_header(path)[0]


def _read_header(path: Path) -> tuple[dict[str, dict], int]:
    """Return the header, and the byte offset where the tensors start."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("its header is longer than the file")
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"its header has {length:,} bytes, more than any real file has")
            header = json.loads(file.read(length))
        end = _check_entries(header)
    except (OSError, struct.error, ValueError, RecursionError, MemoryError) as error:
        reason = exception_reason(error)
        raise InputError(
            f"{path} is not a complete safetensors file ({reason}); fetch or save it again."
        ) from error
    if 8 + length + end != size:
        raise InputError(
            f"{path} is truncated or damaged: {size} bytes where its header promises "
            f"{8 + length + end}; fetch or save it again."
        )
    return header, 8 + length


def _check_entries(header: object) -> int:
    """Remove the metadata from a header, check all entries, and return the last tensor's end.

    The end is in bytes from the first tensor.

    Raises
    ------
    ValueError
        If an entry does not describe a tensor, or tensors overlap or leave a gap.
    """
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    if len(header) > _MAX_TENSORS:
        raise ValueError(f"it holds more than {_MAX_TENSORS:,} tensors")
    for name, entry in header.items():
        _check_entry(name, entry)
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if first != end:
            raise ValueError(f"{name} doesn't start where the previous tensor ends")
        end = last
    return end


def _check_entry(name: str, entry: object) -> None:
    if not name.isprintable():
        raise ValueError(f"the name {name!r} has unprintable characters")
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    has_shape = isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    has_shape = has_shape and len(shape) <= _MAX_DIMENSIONS
    has_offsets = (
        isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int for n in offsets)
    )
    if not (isinstance(dtype, str) and has_shape and has_offsets):
        raise ValueError(f"{name} has no dtype, shape and offsets")
    bits = BITS.get(dtype)
    if bits is not None and (offsets[1] - offsets[0]) * 8 != prod(shape) * bits:
        raise ValueError(f"{name} is {dtype} of shape {shape}, which doesn't match its bytes")
    if offsets[1] < offsets[0]:
        raise ValueError(f"{name} ends before it starts")


def check_not_quantized(folder: Path, config: dict) -> None:
    """Raise :class:`InputError` if a config, or a file beside it, marks the model as quantized."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                _raise_already_quantized(folder, "config.json", part[key])
    for name in _QUANTIZER_FILES:
        if (folder / name).is_file():
            try:
                quantization_config = read_json_object(folder / name)
            except InputError:
                quantization_config = {}
            _raise_already_quantized(folder, name, quantization_config)


def _raise_already_quantized(folder: Path, file: str, quantization_config: object) -> None:
    quantization_config = quantization_config if isinstance(quantization_config, dict) else {}
    inner = quantization_config.get("quantization")
    inner = inner if isinstance(inner, dict) else quantization_config
    method = next(
        (str(inner[k]) for k in ("quant_method", "quant_algo", "format") if inner.get(k)),
        "some method",
    )
    raise InputError(
        f"{folder} is already quantized ({method}, according to {file}); give the full-precision "
        "model instead."
    )
