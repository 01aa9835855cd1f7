"""Save a quantized model as safetensors with its plan and provenance, and load it again.

The folder contains ``packed.safetensors`` (packed matrices, and all other tensors in the dtype of
the original checkpoint), ``config.json``, the tokenizer, and ``lsq.json``: the plan, its
provenance and the format's version. No pickle.
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

from lsq_core.bits import config_from_json
from lsq_core.errors import InputError, LsqError
from lsq_core.files import fsync_folder, fsync_tree, is_locked, lock_folder, resolve_path
from lsq_core.model.architecture import find_blocks, iter_matrices
from lsq_core.model.checkpoint import safetensors_header
from lsq_core.model.dtypes import FLOATS, torch_dtype
from lsq_core.model.identity import has_custom_code
from lsq_core.model.info import Matrix
from lsq_core.model.loading import (
    check_free_memory,
    load_tokenizer,
    model_config,
    pick_device,
    pick_dtype,
    stored_dtype,
    translate_build_errors,
)
from lsq_core.model.source import MANIFEST_FILE, ModelSource, check_config, folder_bytes
from lsq_core.quantization.base import StoredMatrix
from lsq_core.quantization.layout import TensorLayout, layout_for_format
from lsq_core.quantization.registry import quantizer_spec, stored_matrix_class
from lsq_core.quantized.convert import install
from lsq_core.quantized.manifest import (
    UNFINISHED_SUFFIX,
    WEIGHTS_FILE,
    check_files,
    read_manifest,
    unfinished_folders,
    with_checksums,
)
from lsq_core.quantized.modules import packed_modules
from lsq_core.targets import check_folder_target
from lsq_core.units import format_bytes
from lsq_core.untrusted import wrap_library_errors

#: Generation settings, such as the end-of-sequence tokens.
GENERATION_CONFIG_FILE = "generation_config.json"


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """A quantized model loaded from its folder."""

    model: nn.Module
    tokenizer: object
    manifest: dict
    folder: Path
    device: str
    dtype: str


def save_quantized(
    model: nn.Module, tokenizer: object, manifest: dict, folder: Path, source_folder: Path
) -> int:
    """Save a quantized model atomically to a new folder and return its size on disk in bytes.

    Parameters
    ----------
    manifest
        ``modules`` maps full module names to ``bits`` and ``group_size``; ``axis`` and
        ``metadata`` describe their grouping and format. All other entries are provenance.
    source_folder
        The original model's folder, whose config, generation settings and Python code are copied.

    Raises
    ------
    InputError
        If the folder exists and is not empty.
    LsqError
        If the disk is full or cannot be written.
    """
    check_folder_target(folder)
    state = stored_state(model, stored_dtype(source_folder))
    need = sum(t.nbytes for t in state.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder, need) as unfinished:
        save_file(state, unfinished / WEIGHTS_FILE, metadata={"format": "pt"})
        _copy_model_files(source_folder, unfinished)
        tokenizer.save_pretrained(unfinished)
        text = json.dumps(with_checksums(manifest, unfinished), indent=1)
        (unfinished / MANIFEST_FILE).write_text(text, "utf8")
    return folder_bytes(folder)


def _copy_model_files(source: Path, target: Path) -> None:
    """Copy a model's config, generation settings and Python code."""
    shutil.copy(source / "config.json", target)
    if (source / GENERATION_CONFIG_FILE).is_file():
        shutil.copy(source / GENERATION_CONFIG_FILE, target)
    if has_custom_code(source):
        for path in source.glob("*.py"):
            shutil.copy(path, target)


@contextmanager
def atomic_folder(folder: Path, need: int) -> Iterator[Path]:
    """Yield a hidden folder next to the target, which is renamed to the target on success.

    The folder is locked while it is being written. Unfinished folders for the same target left
    behind by a killed process are deleted first.
    """
    disk_full = LsqError(
        f"The disk at {folder.parent} has {format_bytes(shutil.disk_usage(folder.parent).free)} "
        f"free and {format_bytes(need)} are needed to save {folder.name}; make room and try again."
    )
    if shutil.disk_usage(folder.parent).free < need:
        raise disk_full
    prefix = f".{folder.name[:40]}-"
    for leftover in unfinished_folders(folder.parent, prefix):
        if not is_locked(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
    unfinished = folder.parent / f"{prefix}{uuid.uuid4().hex[:12]}{UNFINISHED_SUFFIX}"
    unfinished.mkdir()
    lock = lock_folder(unfinished)
    try:
        yield unfinished
        _unify_file_modes(unfinished)
        fsync_tree(unfinished)
        if folder.is_dir():
            folder.rmdir()
        unfinished.rename(folder)
        fsync_folder(folder.parent)
    except Exception as error:
        no_space = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if no_space:
            raise disk_full from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        os.close(lock)


def _unify_file_modes(folder: Path) -> None:
    """Set the mode of all files according to the umask, overriding that of libraries and copies."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def stored_state(model: nn.Module, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Return each tensor once; unpacked ones in the checkpoint's dtype if the cast is exact."""
    packed, state = packed_names(model), {}
    for names in _tied_names(model):
        name, tensor = names[0], _tensor(model, names[0]).detach()
        as_is = name in packed or tensor.dtype != torch.float32
        if dtype is not None and not as_is:
            smaller = tensor.to(dtype)
            tensor = smaller if torch.equal(smaller.float(), tensor) else tensor
        state[name] = tensor.cpu().contiguous()
    return state


def _tied_names(model: nn.Module) -> list[list[str]]:
    """Group the names in the state dict by tensor (tied weights share one)."""
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
    """Load a model saved by :func:`save_quantized`.

    Example
    -------
    >>> quantized = load_quantized("data/models/demo-sensiboost")      # doctest: +SKIP
    >>> ids = quantized.tokenizer("Return the", return_tensors="pt")   # doctest: +SKIP
    >>> quantized.model(**ids).logits.shape                            # doctest: +SKIP

    Raises
    ------
    InputError
        If the folder is not a saved model, or a file in it is missing, damaged or modified.
    """
    folder = resolve_path(folder)
    manifest = read_manifest(folder)
    check_config(folder, saved=True)
    header = safetensors_header(folder / WEIGHTS_FILE)
    check_files(folder, manifest)
    target = pick_device(device)
    source = ModelSource(str(folder), trust_remote_code=trust_remote_code)
    config = model_config(source, folder)
    compute_dtype = pick_dtype(dtype, target, config)
    # Buffers that are not stored (rotary frequencies) are computed; parameters stay empty.
    with translate_build_errors(source, folder), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, experts_implementation="eager"
        )
    if (folder / GENERATION_CONFIG_FILE).is_file():
        with wrap_library_errors(
            lambda reason: f"{folder / GENERATION_CONFIG_FILE} cannot be read: {reason}."
        ):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    model.tie_weights()
    install(model, _empty_matrices(model, source, manifest), compute_dtype)
    check_free_memory(str(folder), (folder / WEIGHTS_FILE).stat().st_size, "packed form", target)
    _check_stored(model, header)
    with wrap_library_errors(lambda reason: f"{folder / WEIGHTS_FILE} cannot be loaded: {reason}."):
        state = load_file(folder / WEIGHTS_FILE, device=str(target))
    assign_tensors(model, state, compute_dtype)
    model = model.to(target).eval().requires_grad_(False)
    tokenizer = load_tokenizer(source, folder)
    return QuantizedModel(model, tokenizer, manifest, folder, str(target), str(compute_dtype)[6:])


def packed_names(model: nn.Module) -> set[str]:
    """Return the full names of the tensors of packed matrices."""
    return {f"{name}.{part}" for name, m in packed_modules(model).items() for part in m.names}


def _empty_matrices(
    model: nn.Module, source: ModelSource, manifest: dict
) -> dict[Matrix, StoredMatrix]:
    """Create matrices on the meta device for all modules in the manifest."""
    known = {m.name: m for m in iter_matrices(*find_blocks(model), left_out=True)}
    missing = sorted(set(manifest["modules"]) - set(known))
    if missing:
        raise InputError(
            f"{source.name} has a plan for {missing[0]}, which its config.json does not have."
        )
    quantizer, empty = manifest.get("quantizer", "hqq"), {}
    layout = quantizer_spec(quantizer).layout
    for name, entry in manifest["modules"].items():
        matrix, config = known[name], config_from_json(entry)
        stored = layout_for_format(
            layout(matrix.shape, config, manifest["metadata"]), manifest["format"]
        )
        tensors = make_meta_tensors(stored)
        kind = stored_matrix_class(quantizer, config)
        empty[matrix] = kind.from_tensors(tensors, matrix.shape, config, manifest["axis"])
    return empty


def _tie(model: nn.Module, tied: list[list[str]]) -> None:
    """Assign tied tensors, which are stored only once, under each of their names."""
    for names in tied:
        filled = [name for name in names if not _tensor(model, name).is_meta]
        for name in names if filled else ():
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, _tensor(model, filled[0]))


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def make_meta_tensors(stored: TensorLayout) -> dict[str, torch.Tensor]:
    """Create tensors on the meta device with the shapes and dtypes of a layout."""
    return {
        name: torch.empty(shape, dtype=torch_dtype(dtype), device="meta")
        for name, (shape, dtype) in stored.items()
    }


def _check_stored(model: nn.Module, header: dict[str, dict]) -> None:
    """Raise :class:`InputError` unless the stored shapes and dtypes match the model's."""
    packed = packed_names(model)
    for name, tensor in model.state_dict().items():
        entry = header.get(name)
        if entry is None:
            continue  # tied to another tensor, or missing, which assign_tensors reports
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        wrong = torch_dtype(dtype) != tensor.dtype if name in packed else dtype not in FLOATS
        wrong = wrong and tensor.is_floating_point() if name not in packed else wrong
        if shape != tuple(tensor.shape) or wrong:
            raise InputError(
                f"{WEIGHTS_FILE} does not match its plan at {name}, which is stored as {dtype} of "
                f"shape {list(shape)} but is {str(tensor.dtype)[6:]} of shape "
                f"{list(tensor.shape)} by the plan and config.json; save it again."
            )


def assign_tensors(model: nn.Module, state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Assign the stored tensors: packed ones unchanged, all others in the compute dtype."""
    packed = packed_names(model)
    cast = {
        n: t if n in packed or not t.is_floating_point() else t.to(dtype) for n, t in state.items()
    }
    tied = _tied_names(model)
    result = model.load_state_dict(cast, strict=False, assign=True)
    _tie(model, tied)
    empty = [n for n, t in model.state_dict().items() if t.is_meta]
    if empty or result.unexpected_keys:
        name = (empty or result.unexpected_keys)[0]
        raise InputError(f"{WEIGHTS_FILE} does not fit its plan at {name}; save it again.")


__all__ = [
    "QuantizedModel",
    "assign_tensors",
    "atomic_folder",
    "load_quantized",
    "packed_names",
    "save_quantized",
    "stored_state",
]
