"""Save a quantized model as safetensors with its plan and provenance inside, and load it again.

A folder holds ``packed.safetensors`` (packed matrices, and everything else in the dtype of the
original checkpoint), ``config.json``, the tokenizer, and ``lsq.json``: the plan, what it was made
from, and the format's version. No pickle.
"""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lsq_core.config import config_of, format_bytes
from lsq_core.errors import InputError, LsqError
from lsq_core.load import describe, load_tokenizer, pick_device, pick_dtype
from lsq_core.model import MANIFEST, Matrix, ModelSource, folder_bytes, safetensors_header
from lsq_core.quantize import about, matrix_kind
from lsq_core.quantize.apply import install, packed_modules
from lsq_core.quantize.base import StoredMatrix
from lsq_core.quantize.layout import Stored, as_saved
from lsq_core.quantize.manifest import FORMAT, WEIGHTS, read_manifest

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
        The original model's folder, whose ``config.json`` goes with the copy.

    Raises
    ------
    InputError
        When the folder exists and is not empty.
    LsqError
        When the disk is full or cannot be written.
    """
    check_target(folder)
    state = _stored_state(model, source_folder)
    need = sum(t.nbytes for t in state.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _whole_or_nothing(folder, need) as unfinished:
        save_file(state, unfinished / WEIGHTS, metadata={"format": "pt"})
        shutil.copy(source_folder / "config.json", unfinished / "config.json")
        text = json.dumps({"format": FORMAT} | manifest, indent=1)
        (unfinished / MANIFEST).write_text(text, "utf8")
        tokenizer.save_pretrained(unfinished)
    return folder_bytes(folder)


def check_target(folder: Path) -> None:
    """Raise :class:`InputError` unless a model can be saved under this name without loss."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; choose another folder to save to.")


@contextmanager
def _whole_or_nothing(folder: Path, need: int) -> Iterator[Path]:
    """A temporary folder beside the target that becomes the target when all went well."""
    full = LsqError(
        f"The disk at {folder.parent} has {format_bytes(shutil.disk_usage(folder.parent).free)} "
        f"free and {format_bytes(need)} are needed to save {folder.name}; make room and try again."
    )
    if shutil.disk_usage(folder.parent).free < need:
        raise full
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        if folder.is_dir():
            folder.rmdir()
        unfinished.rename(folder)
    except Exception as error:
        no_space = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if no_space:
            raise full from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _stored_state(model: nn.Module, source_folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor once, but for matrices in the checkpoint's dtype where that is exact."""
    dtype = getattr(AutoConfig.from_pretrained(source_folder), "dtype", None)
    state, seen, packed = {}, set(), _packed_names(model)
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        as_is = name in packed or tensor.dtype != torch.float32
        if isinstance(dtype, torch.dtype) and not as_is:
            smaller = tensor.to(dtype)
            tensor = smaller if torch.equal(smaller.float(), tensor) else tensor
        state[name] = tensor.detach().cpu().contiguous()
    return state


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
        When it is no such folder, or a file in it is missing or damaged.
    """
    folder = Path(folder).expanduser().resolve()
    manifest = read_manifest(folder)
    safetensors_header(folder / WEIGHTS)
    target = pick_device(device)
    source = ModelSource(str(folder), trust_remote_code=trust_remote_code)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    compute_dtype = pick_dtype(dtype, target, config)
    # Buffers that no file holds (rotary frequencies) are computed; parameters stay empty.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, experts_implementation="eager"
        )
    install(model, _empty_matrices(model, source, manifest))
    _fill(model, load_file(folder / WEIGHTS), compute_dtype)
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
    known = {m.name: m for m in describe(model, source).matrices}
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


def empty_tensors(stored: Stored) -> dict[str, torch.Tensor]:
    """Tensors of the right shapes and dtypes on the meta device, to be filled from a file."""
    return {
        name: torch.empty(shape, dtype=_DTYPES[dtype], device="meta")
        for name, (shape, dtype) in stored.items()
    }


def _fill(model: nn.Module, state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Assign the stored tensors; packed ones as they are, all else in the compute dtype."""
    packed = _packed_names(model)
    cast = {
        n: t if n in packed or not t.is_floating_point() else t.to(dtype) for n, t in state.items()
    }
    result = model.load_state_dict(cast, strict=False, assign=True)
    model.tie_weights()
    empty = [n for n, t in model.state_dict().items() if t.is_meta]
    if empty or result.unexpected_keys:
        name = (empty or result.unexpected_keys)[0]
        raise InputError(f"{WEIGHTS} does not fit its plan at {name}; save it again.")


__all__ = [
    "QuantizedModel",
    "load_quantized",
    "save_quantized",
]
