"""Build models without weights, and load them with weights."""

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

#: Limits on the tensors, matrices in them and weights of a model; published models have up to
#: 10¹² weights.
_MAX_TENSORS, _MAX_MATRICES, _MAX_WEIGHTS = 50_000, 200_000, 10**13


@dataclass(frozen=True, eq=False)
class BlockModel:
    """A model whose decoder blocks can be held in memory one at a time."""

    model: nn.Module

    @cached_property
    def _prefix_and_blocks(self) -> tuple[str, nn.ModuleList]:
        return find_blocks(self.model)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, in order."""
        return self._prefix_and_blocks[1]

    def block_name(self, layer: int) -> str:
        """Return the full name of a decoder block."""
        return f"{self._prefix_and_blocks[0]}.{layer}"

    def materialize(self, name: str) -> AbstractContextManager:
        """Hold a block's weights, or one of its parameters, in memory (here they always are)."""
        return nullcontext()

    def materialize_embeddings(self) -> AbstractContextManager:
        """Hold everything outside the blocks but the LM head in memory (here it always is)."""
        return nullcontext()

    def materialize_head(self) -> AbstractContextManager:
        """Hold everything outside the blocks, LM head included, in memory (here it always is)."""
        return nullcontext()


@dataclass(frozen=True, eq=False)
class LoadedModel(BlockModel):
    """A model with its weights, tokenizer and description."""

    tokenizer: object
    info: ModelInfo
    folder: Path
    device: str
    dtype: str
    #: Whether weights are read only when needed.
    streamed: ClassVar[bool] = False


# --- devices and dtypes -------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """Return a device by name; ``auto`` is the first GPU, or the CPU without GPUs.

    ``cuda`` is ``cuda:0``.

    Raises
    ------
    InputError
        If the device does not exist on this machine, or is neither a CPU nor a CUDA device.
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
    """Return the compute dtype; ``auto`` is float32 on a CPU, on a GPU the checkpoint's own.

    On a CPU with hardware support for bfloat16 (``avx512_bf16``, AMX), bfloat16 takes half the
    time. But it changes SmolLM2's perplexity by 0.14 % and that of a 4-bit plan by 0.36 %: more
    than the paired interval attributes to chance, and as much as good plans differ. So ``auto``
    remains float32 there, and figures in different dtypes are never paired. Checkpoints in float64
    or of unknown dtype are computed in float32.

    Raises
    ------
    InputError
        If ``name`` is none of ``auto``, float32, bfloat16 and float16.
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
    """Return a note that a processor emulates a dtype, '' if it supports the dtype.

    With only AVX2, a linear layer of SmolLM2 takes 6 to 8 times as long in half precision.
    """
    emulated = platform.machine() in ("x86_64", "AMD64") and (
        torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    )
    if device != "cpu" or dtype not in ("bfloat16", "float16") or not emulated:
        return ""
    return (
        f"This processor has no native support for {dtype}, which is several times slower than "
        "float32 here."
    )


# --- the skeleton of a model, without weights ---------------------------------------------


def inspect_model(source: ModelSource) -> ModelInfo:
    """Describe a model's layers, parameters, bytes and matrices without loading its weights.

    The fingerprint is empty unless the model's files are available locally.

    Raises
    ------
    InputError
        If there is no such model, or it has no linear decoder blocks.
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
    """Describe a model with complete local files, from its modules and its file headers.

    ``model`` is its skeleton in the checkpoint's dtype.

    Raises
    ------
    InputError
        If the files are not the weights of this model (:func:`lsq_core.model.fit.check_fit`).
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
    """Build the model's modules on the meta device: shapes without memory.

    ``settings`` are passed to transformers' ``from_config``, for example ``dtype``.

    Raises
    ------
    InputError
        If transformers cannot build a causal language model from the config.
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
    """Return transformers' config of the model in a folder, without prompting at the terminal.

    Its ``dtype`` is the checkpoint's: the one it names, else that of most bytes of the weights.

    Raises
    ------
    InputError
        If transformers cannot read it, or it needs code that is not trusted.
    """
    with translate_build_errors(source, folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    config.dtype = config.dtype or stored_dtype(folder)
    return config


def _config_with_dtype(folder: Path) -> dict:
    """Return the folder's config, with the checkpoint's dtype added if it names none itself."""
    config, dtype = read_config(folder), stored_dtype(folder)
    named = any(config.get(key) for key in ("dtype", "torch_dtype"))
    return config if named or dtype is None else config | {"dtype": str(dtype)[6:]}


def stored_dtype(folder: Path) -> torch.dtype | None:
    """Return a checkpoint's dtype: the one named in its config, else that of most bytes.

    None if neither is known.
    """
    named = config_dtype(read_config(folder))
    return named if named is not None else most_stored_dtype(folder)


def most_stored_dtype(folder: Path) -> torch.dtype | None:
    """Return the float dtype of most bytes of a checkpoint.

    None if there are no complete safetensors files with float weights.
    """
    sizes = dict.fromkeys(FLOATS, 0)
    try:
        files = [path for path in weight_files(folder) if path.suffix == ".safetensors"]
        entries = read_entries(folder, files)
    except InputError:
        return None  # only the small files of a remote model may have been downloaded
    for entry in entries.values():
        if entry.dtype in sizes:
            sizes[entry.dtype] += entry.bytes
    most = max(sizes, key=sizes.get)
    return torch_dtype(most) if sizes[most] else None


@contextmanager
def translate_build_errors(source: ModelSource, folder: Path) -> Iterator[None]:
    """Translate transformers' errors while it builds a model, and limit the model's size.

    Raises
    ------
    InputError
        Instead of transformers' own errors.
    """
    config = read_config(folder)

    def make_message(reason: str) -> str:
        if not source.trust_remote_code and "auto_map" in config:
            return (
                f"'{source.name}' uses custom Python code, which only runs if you trust "
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
    """Abort building a model within a ``with`` block if it becomes implausibly large.

    Raises
    ------
    InputError
        As soon as the modules built in this thread have more tensors, matrices or weights than any
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
    """Load a model with its weights on a device, and its tokenizer.

    Experts run one by one (``eager``), so that each one's inputs can be observed.

    Raises
    ------
    InputError
        If the source, device or dtype is invalid, or the model is not causal.
    LsqError
        If the model does not fit in the device's memory.
    """
    target = pick_device(device)
    folder = find_model(source)
    info = describe_files(build_meta_model(source, folder), source, folder)
    compute_dtype = pick_dtype(dtype, target, model_config(source, folder))
    check_memory(info.source, info.parameters, target, compute_dtype)
    if weight_files(folder)[0].suffix != ".safetensors":  # pickled files are first read in full
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
                device_map={"": target},  # load each tensor directly onto the device
            )
        model = model.eval().requires_grad_(False)
    except torch.OutOfMemoryError as error:
        need = info.parameters * compute_dtype.itemsize
        format_name = str(compute_dtype)[6:]
        raise LsqError(_too_large_message(info.source, need, format_name, target)) from error
    missing = sorted(found["missing_keys"])
    if missing:  # transformers would continue with random values
        raise InputError(
            f"The weights in {folder} lack {missing[0]}"
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
    """Load the model's tokenizer.

    Raises
    ------
    InputError
        If the folder has none that can be loaded.
    """
    for path in tokenizer_files(folder):
        check_size(path, MAX_TOKENIZER_BYTES)
    with wrap_library_errors(
        lambda reason: f"{folder} has no tokenizer that can be loaded: {reason}."
    ):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=source.trust_remote_code)


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory currently free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def check_memory(name: str, parameters: int, device: torch.device, dtype: torch.dtype) -> None:
    """Raise :class:`LsqError` if a device has too little free memory for the parameters."""
    check_free_memory(name, parameters * dtype.itemsize, str(dtype)[6:], device)


def check_free_memory(name: str, need: int, format_name: str, device: torch.device) -> None:
    """Raise :class:`LsqError` if a device has less than ``need`` bytes of free memory.

    ``format_name`` names the format of the weights for the message: a dtype, or packed matrices.
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
    """Return the last ``keep`` tokens' logits (sequences, keep, vocabulary).

    ``ids`` is (sequences, tokens). The head runs only on those last tokens if the model allows it.
    """
    accepted = inspect.signature(model.forward).parameters
    extra = {"logits_to_keep": keep} if "logits_to_keep" in accepted else {}
    return model(ids, use_cache=False, **extra).logits[:, -keep:]


def embedding_rows(model: nn.Module) -> int:
    """Return the number of rows of the model's embedding."""
    return model.get_input_embeddings().weight.shape[0]


def check_token_ids(model: nn.Module, ids: Iterable[int]) -> None:
    """Raise :class:`InputError` if a token has no row in the model's embedding.

    A tokenizer's vocabulary may exceed the embedding; only the tokens of a text matter.
    """
    largest, rows = max(ids, default=0), embedding_rows(model)
    if largest >= rows:
        raise InputError(
            f"The tokenizer produces token {largest} and the model's embedding ends at {rows - 1}: "
            "they don't belong together, or tokens were added to the tokenizer alone; use the "
            "tokenizer that the model was trained with."
        )
