"""The tensors that a model's files hold, by the files' headers: no weight is read, nor torch.

Refused here is what can be told without the architecture: damaged files, one tensor in two
versions, and checkpoints that hold the codes of a quantized model. How tensors fit the
architecture is in :mod:`lsq_core.fit`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lsq_core.errors import InputError

INDEX = "model.safetensors.index.json"
#: Files in which quantizing tools write what config.json doesn't say.
_QUANTIZER_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
#: Bytes of two tensors that are compared at a time.
_CHUNK = 2**22


@dataclass(frozen=True)
class Entry:
    """A stored tensor: its file, its dtype by the name safetensors gives it, and its shape.

    It lies in ``bytes`` bytes of the file from ``start`` on.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    bytes: int = 0


def read_entries(folder: Path, files: Iterable[Path]) -> dict[str, Entry]:
    """Every tensor of some safetensors files, by name.

    Raises
    ------
    InputError
        When a file is damaged, the index and the files disagree, or two files hold different
        tensors of one name.
    """
    found: dict[str, Entry] = {}
    for path in files:
        header, start = _read_header(path)
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            stored = Entry(path, entry["dtype"], shape, start + first, end - first)
            if not same_bytes(found.setdefault(name, stored), stored):
                raise InputError(
                    f"{name} is in {found[name].file.name} and, with other values, in {path.name} "
                    f"of {folder}; remove the file that is out of date."
                )
    _check_index(folder, found)
    return found


def _check_index(folder: Path, found: dict[str, Entry]) -> None:
    """Raise unless every tensor that the index names is in some file, and no file is left over."""
    index = folder / INDEX
    if not index.is_file():
        return
    named = json.loads(index.read_text("utf8"))["weight_map"]
    lost = [name for name in named if name not in found]
    if lost:
        raise InputError(
            f"{index.name} in {folder} names {lost[0]}, which no file of it holds; fetch or save "
            "the model again."
        )
    whole = folder / "model.safetensors"
    if whole.is_file() and whole.name not in named.values():
        raise InputError(
            f"{folder} holds {whole.name} and an index of other files, so it is not known which "
            "are the weights; remove what is out of date."
        )


def same_bytes(one: Entry, other: Entry) -> bool:
    """Whether two stored tensors are the same; most often they are one."""
    if one is other:
        return True
    if (one.dtype, one.shape, one.bytes) != (other.dtype, other.shape, other.bytes):
        return False
    left = one.bytes
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        while left > 0:
            count = min(_CHUNK, left)
            if first.read(count) != second.read(count):
                return False
            left -= count
    return True


def safetensors_header(path: Path) -> dict[str, dict]:
    """Names, dtypes, shapes and offsets of a safetensors file, without reading its weights.

    Raises
    ------
    InputError
        When the file is truncated or is no safetensors file.
    """
    return _read_header(path)[0]


def _read_header(path: Path) -> tuple[dict[str, dict], int]:
    """The header, and the byte that tensors begin at."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not a whole safetensors file ({error}); fetch or save it again."
        ) from error
    if 8 + length + end != size:
        raise InputError(
            f"{path} is truncated or damaged: {size} bytes where its header promises "
            f"{8 + length + end}; fetch or save it again."
        )
    return header, 8 + length


def check_not_quantized(folder: Path, config: dict) -> None:
    """Raise :class:`InputError` when a config, or a file beside it, says the weights are codes."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                _refuse_quantized(folder, "config.json", part[key])
    for name in _QUANTIZER_FILES:
        if (folder / name).is_file():
            try:
                said = json.loads((folder / name).read_text("utf8"))
            except (OSError, ValueError):
                said = {}
            _refuse_quantized(folder, name, said)


def _refuse_quantized(folder: Path, file: str, said: object) -> None:
    said = said if isinstance(said, dict) else {}
    inner = said.get("quantization")
    inner = inner if isinstance(inner, dict) else said
    method = next(
        (str(inner[k]) for k in ("quant_method", "quant_algo", "format") if inner.get(k)),
        "some method",
    )
    raise InputError(
        f"{folder} is already quantized ({method}, says {file}); give the full-precision model "
        "instead."
    )
