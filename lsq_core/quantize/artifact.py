"""Save a quantized model as safetensors with its plan and provenance inside, and load it again.

A folder holds ``packed.safetensors`` (packed matrices, and everything else in the dtype of the
original checkpoint), ``config.json``, the tokenizer, and ``lsq.json``: the plan, what it was made
from, and the format's version. No pickle.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from lsq_core.architecture import find_blocks, walk_matrices
from lsq_core.checkpoint import safetensors_header
from lsq_core.config import config_of, format_bytes
from lsq_core.errors import InputError, LsqError
from lsq_core.files import given_path, in_use, lock_folder, sync_folder, sync_tree
from lsq_core.foreign import refusing
from lsq_core.identity import has_own_code
from lsq_core.load import (
    building,
    check_bytes,
    load_tokenizer,
    model_config,
    pick_device,
    pick_dtype,
    stored_dtype,
)
from lsq_core.model import MANIFEST, Matrix, ModelSource, check_config, folder_bytes
from lsq_core.quantize import about, matrix_kind
from lsq_core.quantize.apply import install, packed_modules
from lsq_core.quantize.base import StoredMatrix
from lsq_core.quantize.layout import Stored, as_saved
from lsq_core.quantize.manifest import (
    UNFINISHED,
    WEIGHTS,
    check_files,
    read_manifest,
    unfinished_folders,
    with_checksums,
)
from lsq_core.targets import check_folder_target

#: How a model generates: the tokens that end a text, most of all.
GENERATION = "generation_config.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}
#: torch's dtypes by their names in a safetensors header, of those that layouts use.
_DTYPES = {
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """A quantized model as loaded from its folder."""

    model: nn.Module
    tokenizer: object
    manifest: dict
    folder: Path
    device: str
    dtype: str


def save_quantized(
    model: nn.Module, tokenizer: object, manifest: dict, folder: Path, source_folder: Path
) -> int:
    """Write a quantized model into a new folder, all of it or nothing.

    Returns the bytes it takes on disk.

    Parameters
    ----------
    manifest
        ``modules`` maps full module names to ``bits``, ``group_size``; ``axis`` and ``metadata``
        say how to read them; whatever else it holds is kept as provenance.
    source_folder
        The original model's folder, whose config, generation settings and own Python code go
        with the copy.

    Raises
    ------
    InputError
        When the folder exists and is not empty.
    LsqError
        When the disk is full or cannot be written.
    """
    check_folder_target(folder)
    state = _stored_state(model, stored_dtype(source_folder))
    need = sum(t.nbytes for t in state.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _whole_or_nothing(folder, need) as unfinished:
        save_file(state, unfinished / WEIGHTS, metadata={"format": "pt"})
        _copy_beside(source_folder, unfinished)
        tokenizer.save_pretrained(unfinished)
        text = json.dumps(with_checksums(manifest, unfinished), indent=1)
        (unfinished / MANIFEST).write_text(text, "utf8")
    return folder_bytes(folder)


def _copy_beside(source: Path, target: Path) -> None:
    """Copy what a model needs beside its weights: config, generation settings, its own code."""
    shutil.copy(source / "config.json", target)
    if (source / GENERATION).is_file():
        shutil.copy(source / GENERATION, target)
    if has_own_code(source):
        for path in source.glob("*.py"):
            shutil.copy(path, target)


@contextmanager
def _whole_or_nothing(folder: Path, need: int) -> Iterator[Path]:
    """A hidden folder beside the target that becomes the target when all went well.

    It is locked as long as it is written to; what a kill left of the same target goes before.
    """
    full = LsqError(
        f"The disk at {folder.parent} has {format_bytes(shutil.disk_usage(folder.parent).free)} "
        f"free and {format_bytes(need)} are needed to save {folder.name}; make room and try again."
    )
    if shutil.disk_usage(folder.parent).free < need:
        raise full
    prefix = f".{folder.name[:40]}-"
    for left in unfinished_folders(folder.parent, prefix):
        if not in_use(left):
            shutil.rmtree(left, ignore_errors=True)
    unfinished = folder.parent / f"{prefix}{uuid.uuid4().hex[:12]}{UNFINISHED}"
    unfinished.mkdir()
    lock = lock_folder(unfinished)
    try:
        yield unfinished
        _same_mode(unfinished)
        sync_tree(unfinished)
        if folder.is_dir():
            folder.rmdir()
        unfinished.rename(folder)
        sync_folder(folder.parent)
    except Exception as error:
        no_space = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if no_space:
            raise full from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        os.close(lock)


def _same_mode(folder: Path) -> None:
    """Give all files the mode that the umask gives; libraries and copies come with their own."""
    mode = stat.S_IMODE((folder / MANIFEST).stat().st_mode)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _stored_state(model: nn.Module, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Every stored tensor once, but for matrices in the checkpoint's dtype where that is exact."""
    packed, state = _packed_names(model), {}
    for names in _same_tensors(model):
        name, tensor = names[0], _tensor(model, names[0]).detach()
        as_is = name in packed or tensor.dtype != torch.float32
        if dtype is not None and not as_is:
            smaller = tensor.to(dtype)
            tensor = smaller if torch.equal(smaller.float(), tensor) else tensor
        state[name] = tensor.cpu().contiguous()
    return state


def _same_tensors(model: nn.Module) -> list[list[str]]:
    """Names in the state dict, those that are one tensor together (tied weights)."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def load_quantized(
    folder: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> QuantizedModel:
    """Load a folder that :func:`save_quantized` wrote.

    Example
    -------
    >>> quantized = load_quantized("data/models/demo-sensiboost")      # doctest: +SKIP
    >>> ids = quantized.tokenizer("Return the", return_tensors="pt")   # doctest: +SKIP
    >>> quantized.model(**ids).logits.shape                            # doctest: +SKIP

    Raises
    ------
    InputError
        When it is no such folder, or a file in it is missing, damaged, or another than was saved.
    """
    folder = given_path(folder)
    manifest = read_manifest(folder)
    check_config(folder, saved=True)
    header = safetensors_header(folder / WEIGHTS)
    check_files(folder, manifest)
    target = pick_device(device)
    source = ModelSource(str(folder), trust_remote_code=trust_remote_code)
    config = model_config(source, folder)
    compute_dtype = pick_dtype(dtype, target, config)
    # Buffers that no file holds (rotary frequencies) are computed; parameters stay empty.
    with building(source, folder), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, experts_implementation="eager"
        )
    if (folder / GENERATION).is_file():
        with refusing(lambda reason: f"{folder / GENERATION} cannot be read: {reason}."):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    model.tie_weights()
    install(model, _empty_matrices(model, source, manifest), compute_dtype)
    check_bytes(str(folder), (folder / WEIGHTS).stat().st_size, "packed form", target)
    _check_stored(model, header)
    with refusing(lambda reason: f"{folder / WEIGHTS} cannot be loaded: {reason}."):
        state = load_file(folder / WEIGHTS, device=str(target))
    _fill(model, state, compute_dtype)
    model = model.to(target).eval().requires_grad_(False)
    tokenizer = load_tokenizer(source, folder)
    return QuantizedModel(model, tokenizer, manifest, folder, str(target), str(compute_dtype)[6:])


def _packed_names(model: nn.Module) -> set[str]:
    """Full names of the tensors that matrices are stored in."""
    return {f"{name}.{part}" for name, m in packed_modules(model).items() for part in m.names}


def _empty_matrices(
    model: nn.Module, source: ModelSource, manifest: dict
) -> dict[Matrix, StoredMatrix]:
    """Stored matrices without content for every module the manifest names."""
    known = {m.name: m for m in walk_matrices(*find_blocks(model), left_out=True)}
    missing = sorted(set(manifest["modules"]) - set(known))
    if missing:
        raise InputError(f"{source.name} plans {missing[0]}, which its config.json doesn't have.")
    quantizer, empty = manifest.get("quantizer", "hqq"), {}
    layout = about(quantizer).layout
    for name, entry in manifest["modules"].items():
        matrix, config = known[name], config_of(entry)
        stored = as_saved(layout(matrix.shape, config, manifest["metadata"]), manifest["format"])
        tensors = empty_tensors(stored)
        kind = matrix_kind(quantizer, config)
        empty[matrix] = kind.from_tensors(tensors, matrix.shape, config, manifest["axis"])
    return empty


def _tie(model: nn.Module, tied: list[list[str]]) -> None:
    """Give tensors that were one, and are stored once, their content under every name."""
    for names in tied:
        filled = [name for name in names if not _tensor(model, name).is_meta]
        for name in names if filled else ():
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, _tensor(model, filled[0]))


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def empty_tensors(stored: Stored) -> dict[str, torch.Tensor]:
    """Tensors of the right shapes and dtypes on the meta device, to be filled from a file."""
    return {
        name: torch.empty(shape, dtype=_DTYPES[dtype], device="meta")
        for name, (shape, dtype) in stored.items()
    }


def _check_stored(model: nn.Module, header: dict[str, dict]) -> None:
    """Raise unless the stored tensors are of the shapes, and matrices of the dtypes, that fit."""
    packed = _packed_names(model)
    for name, tensor in model.state_dict().items():
        entry = header.get(name)
        if entry is None:
            continue  # tied to another, or lacking, which is told when all is filled
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        wrong = _DTYPES.get(dtype) != tensor.dtype if name in packed else dtype not in _FLOATS
        wrong = wrong and tensor.is_floating_point() if name not in packed else wrong
        if shape != tuple(tensor.shape) or wrong:
            raise InputError(
                f"{WEIGHTS} does not fit its plan at {name}, which is {dtype} of shape "
                f"{list(shape)} in it and {str(tensor.dtype)[6:]} of shape {list(tensor.shape)} by "
                "the plan and config.json; save it again."
            )


def _fill(model: nn.Module, state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Assign the stored tensors; packed ones as they are, all else in the compute dtype."""
    packed = _packed_names(model)
    cast = {
        n: t if n in packed or not t.is_floating_point() else t.to(dtype) for n, t in state.items()
    }
    tied = _same_tensors(model)
    result = model.load_state_dict(cast, strict=False, assign=True)
    _tie(model, tied)
    empty = [n for n, t in model.state_dict().items() if t.is_meta]
    if empty or result.unexpected_keys:
        name = (empty or result.unexpected_keys)[0]
        raise InputError(f"{WEIGHTS} does not fit its plan at {name}; save it again.")


__all__ = [
    "QuantizedModel",
    "load_quantized",
    "save_quantized",
]
