"""Build models without weights, and load them with their weights."""

from __future__ import annotations

import inspect
import platform
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from lsq_core.devices import canonical_device
from lsq_core.errors import InputError, LsqError
from lsq_core.memory import available_memory, describe_memory_limit
from lsq_core.model.architecture import describe_model, find_blocks
from lsq_core.model.causal import check_causal
from lsq_core.model.checkpoint import read_entries
from lsq_core.model.dtypes import COMPUTE, FLOATS, config_dtype, torch_dtype, torch_name
from lsq_core.model.fit import check_fit, read_pickled_entries
from lsq_core.model.gguf import read_origin
from lsq_core.model.identity import compute_identity, tokenizer_files, with_source
from lsq_core.model.info import ModelInfo
from lsq_core.model.sizes import find_invalid_sizes
from lsq_core.model.source import (
    ModelSource,
    cached_folder,
    find_config,
    find_model,
    read_config,
    remote_file_bytes,
    weight_files,
)
from lsq_core.units import format_bytes
from lsq_core.untrusted import MAX_TOKENIZER_BYTES, check_size, wrap_library_errors

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

#: Tensors, matrices in them and weights of the largest model that is built; published ones have
#: up to 10¹² weights.
_MAX_TENSORS, _MAX_MATRICES, _MAX_WEIGHTS = 50_000, 200_000, 10**13


@dataclass(frozen=True, eq=False)
class BlockModel:
    """A model whose decoder blocks can be had in memory one by one."""

    model: nn.Module

    @cached_property
    def _prefix_and_blocks(self) -> tuple[str, nn.ModuleList]:
        return find_blocks(self.model)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, in order."""
        return self._prefix_and_blocks[1]

    def block_name(self, layer: int) -> str:
        """The full name of a decoder block."""
        return f"{self._prefix_and_blocks[0]}.{layer}"

    def materialize(self, name: str) -> AbstractContextManager:
        """Have the weights of a block, or of one parameter in it, in memory; all are, here."""
        return nullcontext()

    def materialize_embeddings(self) -> AbstractContextManager:
        """Have what comes before the first block in memory; it is, here."""
        return nullcontext()

    def materialize_head(self) -> AbstractContextManager:
        """Have all that is outside the blocks in memory, the LM head included; it is, here."""
        return nullcontext()


@dataclass(frozen=True, eq=False)
class LoadedModel(BlockModel):
    """A model with its weights, its tokenizer, and what is known of it."""

    tokenizer: object
    info: ModelInfo
    folder: Path
    device: str
    dtype: str
    #: Whether weights are read as they are needed.
    streamed: ClassVar[bool] = False


# --- devices and dtypes -------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is the first GPU where there is one, else the CPU; ``cuda`` is ``cuda:0``.

    Raises
    ------
    InputError
        When the device does not exist on this machine.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(canonical_device(name))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only these two have been tried")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"Device '{name}' is not available; give cpu, cuda, cuda:1 or auto."
        ) from error
    return device


def pick_dtype(name: str, device: torch.device, config: object) -> torch.dtype:
    """The dtype a model computes in: ``auto`` is float32 on a CPU, on a GPU the checkpoint's own.

    On a CPU bfloat16 is a choice: where the processor has units for it (``avx512_bf16``, AMX) it
    takes half the time. It moves SmolLM2's perplexity by 0.14 %, that of a 4-bit plan by 0.36 %:
    more than the paired interval leaves to chance, and as much as good plans differ. So float32
    stays what ``auto`` means there, and figures of the two are never paired. A checkpoint in
    float64, or one whose dtype nothing tells, is computed in float32.

    Raises
    ------
    InputError
        When ``name`` is neither ``auto`` nor float32, bfloat16 or float16.
    """
    if name != "auto":
        if name not in COMPUTE:
            raise InputError(f"'{name}' is not a dtype; use auto, float32, bfloat16 or float16.")
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    stored = getattr(config, "dtype", None)
    return stored if torch_name(stored) in COMPUTE else torch.float32


def slow_dtype_note(device: str, dtype: str) -> str:
    """Say that a processor computes in a dtype by emulation; nothing where it has units for it.

    With AVX2 alone a linear layer of SmolLM2 takes 6 to 8 times as long in half precision.
    """
    emulated = platform.machine() in ("x86_64", "AMD64") and (
        torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    )
    if device != "cpu" or dtype not in ("bfloat16", "float16") or not emulated:
        return ""
    return (
        f"This processor has no units for {dtype}, in which it computes several times more slowly "
        "than in float32."
    )


# --- the skeleton of a model, without weights ---------------------------------------------


def inspect_model(source: ModelSource) -> ModelInfo:
    """Layers, parameters, bytes and matrices from the config alone; no weights are loaded.

    The fingerprint is filled in for a model whose files are here, and empty for one not fetched.

    Raises
    ------
    InputError
        When there is no such model, or it has no linear decoder blocks.
    """
    folder = find_config(source)
    model = build_meta_model(source, folder)
    local = find_model(source) if source.is_local else cached_folder(source)
    if local is not None:
        return describe_files(model, source, local)
    return replace(
        describe_model(model, source),
        file_bytes=remote_file_bytes(source),
        config=read_config(folder),
    )


def describe_files(model: nn.Module, source: ModelSource, folder: Path) -> ModelInfo:
    """The description of a model whose files are all here: its modules and what holds them.

    ``model`` is its skeleton in the dtype that its config names.

    Raises
    ------
    InputError
        When the files are not the weights of this model (:func:`lsq_core.model.fit.check_fit`).
    """
    info = describe_model(model, source)
    files = weight_files(folder)
    pickled = files[0].suffix != ".safetensors"
    entries = read_pickled_entries(files) if pickled else read_entries(folder, files)
    identity, origin = compute_identity(folder, source.trust_remote_code), read_origin(folder)
    notes = check_fit(model, entries, find_blocks(model)[0], folder)
    return replace(
        with_source(info, source, identity),
        fingerprint=identity.fingerprint,
        file_bytes=origin.bytes if origin else sum(path.stat().st_size for path in files),
        config=_config_with_dtype(folder),
        notes=(*notes, origin.note) if origin and origin.note else notes,
    )


def build_meta_model(source: ModelSource, folder: Path, **settings: object) -> nn.Module:
    """The model's modules on the meta device: shapes without memory.

    ``settings`` are those of transformers' ``from_config``, such as ``dtype``.

    Raises
    ------
    InputError
        When transformers cannot build a causal language model from the config.
    """
    with translate_build_errors(source, folder):
        config = model_config(source, folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=source.trust_remote_code, **settings
            )
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)) and module.weight.numel() == 0:
                raise ValueError(f"its {name} would have no weights")
    return model


def model_config(source: ModelSource, folder: Path) -> object:
    """transformers' config of the model in a folder; never asks at the terminal.

    Its ``dtype`` is that of the checkpoint: the one that it names, or that of most of the weights
    where it names none.

    Raises
    ------
    InputError
        When transformers cannot read it, or it needs code that is not trusted.
    """
    with translate_build_errors(source, folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    config.dtype = config.dtype or stored_dtype(folder)
    return config


def _config_with_dtype(folder: Path) -> dict:
    """The folder's config; where it names no dtype, with the one that the weights have."""
    config, dtype = read_config(folder), stored_dtype(folder)
    named = any(config.get(key) for key in ("dtype", "torch_dtype"))
    return config if named or dtype is None else config | {"dtype": str(dtype)[6:]}


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of a checkpoint: the one that its config names, or else that of most bytes.

    None where nothing tells.
    """
    named = config_dtype(read_config(folder))
    return named if named is not None else most_stored_dtype(folder)


def most_stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of most bytes of a checkpoint, None where its files are not all here or no
    safetensors files.
    """
    sizes = dict.fromkeys(FLOATS, 0)
    try:
        files = [path for path in weight_files(folder) if path.suffix == ".safetensors"]
        entries = read_entries(folder, files)
    except InputError:
        return None  # of a remote model's files only the small ones may be here
    for entry in entries.values():
        if entry.dtype in sizes:
            sizes[entry.dtype] += entry.bytes
    most = max(sizes, key=sizes.get)
    return torch_dtype(most) if sizes[most] else None


@contextmanager
def translate_build_errors(source: ModelSource, folder: Path) -> Iterator[None]:
    """Turn what transformers raises while it builds a model into a sentence, and limit its size.

    Raises
    ------
    InputError
        In the place of transformers' own errors.
    """
    config = read_config(folder)

    def make_message(reason: str) -> str:
        if not source.trust_remote_code and "auto_map" in config:
            return (
                f"'{source.name}' is built by Python code of its own, which only runs if you trust "
                "it: read its .py files, then give --trust-remote-code (in the app: Trust remote "
                "code)."
            )
        suspicious_sizes = ", ".join(find_invalid_sizes(config)[:3])
        return (
            f"'{source.name}' is not a decoder-only language model that transformers can build: "
            f"{reason}{f' (in its config.json {suspicious_sizes})' if suspicious_sizes else ''}."
        )

    with wrap_library_errors(make_message), limit_model_size(source.name):
        yield


@contextmanager
def limit_model_size(name: str) -> Iterator[None]:
    """Within the ``with``, stop a model that is being built when it becomes larger than any.

    Raises
    ------
    InputError
        As soon as the modules that this thread builds have more weights or tensors than any
        published model.
    """
    thread, count = threading.get_ident(), Counter()

    def on_tensor(module: nn.Module, key: str, tensor: torch.Tensor | None) -> None:
        if tensor is None or threading.get_ident() != thread:
            return
        count["tensors"] += 1
        count["matrices"] += tensor.shape[0] if tensor.dim() > 2 else 1  # experts in a stack
        count["weights"] += tensor.numel()
        most = {"tensors": _MAX_TENSORS, "matrices": _MAX_MATRICES, "weights": _MAX_WEIGHTS}
        exceeded = next((kind for kind in most if count[kind] > most[kind]), None)
        if exceeded:
            raise InputError(
                f"'{name}' is larger than any model that can be planned: its config.json describes "
                f"more than {most[exceeded]:,} {exceeded}."
            )

    hooks = [
        register_module_parameter_registration_hook(on_tensor),
        register_module_buffer_registration_hook(on_tensor),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- weights --------------------------------------------------------------------------------


def load_model(source: ModelSource, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """The model with its weights on a device, and its tokenizer.

    Experts run one by one (``eager``), so that each one's inputs can be seen.

    Raises
    ------
    InputError
        When the source, device or dtype is wrong, or the model is no causal one.
    LsqError
        When the model does not fit into the device's memory.
    """
    target = pick_device(device)
    folder = find_model(source)
    info = describe_files(build_meta_model(source, folder), source, folder)
    compute_dtype = pick_dtype(dtype, target, model_config(source, folder))
    check_memory(info.source, info.parameters, target, compute_dtype)
    if weight_files(folder)[0].suffix != ".safetensors":  # those are read as a whole first
        check_memory(info.source, info.parameters, torch.device("cpu"), compute_dtype)
    try:
        with wrap_library_errors(
            lambda reason: f"The weights in {folder} cannot be loaded: {reason}."
        ):
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=compute_dtype,
                use_safetensors=None if source.allow_pickle else True,
                trust_remote_code=source.trust_remote_code,
                experts_implementation="eager",
                output_loading_info=True,
                device_map={"": target},  # each tensor straight to where it is used
            )
        model = model.eval().requires_grad_(False)
    except torch.OutOfMemoryError as error:
        need = info.parameters * compute_dtype.itemsize
        format_name = str(compute_dtype)[6:]
        raise LsqError(_too_large_message(info.source, need, format_name, target)) from error
    missing = sorted(found["missing_keys"])
    if missing:  # transformers would go on with random ones
        raise InputError(
            f"The weights in {folder} have no {missing[0]}"
            + (f" and {len(missing) - 1} more" if missing[1:] else "")
            + "; fetch or save the model again."
        )
    check_causal(
        info.source,
        lambda ids: last_logits(model, ids, ids.shape[1]),
        vocabulary=embedding_rows(model),
        context=info.context,
        dtype=compute_dtype,
        device=target,
    )
    tokenizer = load_tokenizer(source, folder)
    return LoadedModel(model, tokenizer, info, folder, str(target), str(compute_dtype)[6:])


def load_tokenizer(source: ModelSource, folder: Path) -> object:
    """The model's tokenizer.

    Raises
    ------
    InputError
        When the folder has none that can be loaded.
    """
    for path in tokenizer_files(folder):
        check_size(path, MAX_TOKENIZER_BYTES)
    with wrap_library_errors(
        lambda reason: f"{folder} has no tokenizer that can be loaded: {reason}."
    ):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=source.trust_remote_code)


def free_bytes(device: torch.device) -> int:
    """Memory of a device that is free now, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def check_memory(name: str, parameters: int, device: torch.device, dtype: torch.dtype) -> None:
    """Raise :class:`LsqError` when a device has too little memory for so many parameters."""
    check_free_memory(name, parameters * dtype.itemsize, str(dtype)[6:], device)


def check_free_memory(name: str, need: int, format_name: str, device: torch.device) -> None:
    """Raise :class:`LsqError` when a device has less than ``need`` bytes of memory free.

    ``format_name`` says what they are: a dtype, or packed matrices.
    """
    if need > free_bytes(device):
        raise LsqError(_too_large_message(name, need, format_name, device))


def _too_large_message(name: str, need: int, format_name: str, device: torch.device) -> str:
    limit = describe_memory_limit(format_bytes) if device.type == "cpu" else ""
    return (
        f"'{name}' needs {format_bytes(need)} in {format_name} and {device} has "
        f"{format_bytes(free_bytes(device))} free{limit and f' ({limit})'}: choose another device "
        "or a smaller model."
    )


def last_logits(model: nn.Module, ids: torch.Tensor, keep: int) -> torch.Tensor:
    """Logits (sequences, keep, vocabulary) of the last tokens of ``ids`` (sequences, tokens).

    The head runs on those tokens alone where the model can do that.
    """
    accepted = inspect.signature(model.forward).parameters
    extra = {"logits_to_keep": keep} if "logits_to_keep" in accepted else {}
    return model(ids, use_cache=False, **extra).logits[:, -keep:]


def embedding_rows(model: nn.Module) -> int:
    """How many tokens the model's embedding has a row for."""
    return model.get_input_embeddings().weight.shape[0]


def check_token_ids(model: nn.Module, ids: Iterable[int]) -> None:
    """Raise :class:`InputError` when a token has no row in the model's embedding.

    A tokenizer may well be larger than the embedding; only what it gives for a text counts.
    """
    largest, rows = max(ids, default=0), embedding_rows(model)
    if largest >= rows:
        raise InputError(
            f"The tokenizer gives token {largest} and the model's embedding ends at {rows - 1}: "
            "they don't belong together, or tokens were added to the tokenizer alone; take the "
            "tokenizer that the model was trained with."
        )
