"""Models whose weights stay in their files and are read one decoder block, or matrix, at a time.

The modules are on the meta device. Weights are read from memory-mapped safetensors files by
transformers' own loading code, so checkpoints in other layouts (separate experts, fused
projections) become, bit for bit, the parameters that loading the full model would give.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from lsq_core.errors import InputError
from lsq_core.model.architecture import find_blocks, first_tensor
from lsq_core.model.causal import check_causal
from lsq_core.model.dtypes import torch_dtype
from lsq_core.model.fit import target_names
from lsq_core.model.loading import (
    LoadedModel,
    build_meta_model,
    check_memory,
    describe_files,
    embedding_rows,
    last_logits,
    load_tokenizer,
    model_config,
    pick_device,
    pick_dtype,
)
from lsq_core.model.source import ModelSource, find_model, read_config, weight_files

#: ``mallopt``'s parameter number for the mmap threshold, and the threshold to set, in bytes.
_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES = -3, 2**20


class _StopForward(Exception):
    """Ends a forward pass early."""


class NotStreamable(InputError):
    """The model cannot be streamed; the message is the reason."""


@dataclass(frozen=True, eq=False)
class StreamedModel(LoadedModel):
    """A model with only the weights currently in use in memory (see :func:`open_streamed`)."""

    checkpoint: Checkpoint
    streamed: ClassVar[bool] = True

    @contextmanager
    def materialize(self, name: str) -> Iterator[None]:
        """Hold a block's weights, or one of its parameters, on the device within a ``with``."""
        block = ".".join(name.split(".")[: self._block_depth])
        found = _meta_tensors(self.model.get_submodule(block), block)
        with self._materialized(name if name in self.checkpoint.keys_by_name else block, found):
            yield

    @contextmanager
    def materialize_embeddings(self) -> Iterator[None]:
        """Hold everything outside the blocks but the LM head on the device within a ``with``."""
        prefix = find_blocks(self.model)[0]
        head = self.checkpoint.head
        found = {
            name: slot
            for name, slot in _meta_tensors(self.model, "").items()
            if not name.startswith(f"{prefix}.") and name not in head
        }
        with self._materialized("", found):
            yield

    @contextmanager
    def materialize_head(self) -> Iterator[None]:
        """Hold everything outside the blocks, LM head included, on the device within a ``with``.

        Raises
        ------
        NotStreamable
            If the checkpoint has no LM head, and it isn't tied to the embedding.
        """
        prefix = find_blocks(self.model)[0]
        slots = _meta_tensors(self.model, "")
        found = {name: slot for name, slot in slots.items() if not name.startswith(f"{prefix}.")}
        if not found:  # already in memory
            yield
            return
        with self._materialized("", found):
            head = self.model.get_output_embeddings()
            if head.weight.is_meta:
                if not self.info.tied_embeddings:
                    raise NotStreamable("The checkpoint has no LM head")
                head.weight = self.model.get_input_embeddings().weight
            yield

    def first_block_output(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the first block's output (1, tokens, features) for ids (1, tokens).

        The weights of later blocks are not read.
        """
        prefix, blocks = find_blocks(self.model)
        found: list[torch.Tensor] = []

        def stop(_module: nn.Module, _args: tuple, output: object) -> None:
            found.append(first_tensor(output))
            raise _StopForward

        hook = blocks[0].register_forward_hook(stop)
        try:
            with (
                self.materialize_embeddings(),
                self.materialize(f"{prefix}.0"),
                suppress(_StopForward),
            ):
                last_logits(self.model, ids, ids.shape[1])
        finally:
            hook.remove()
        return found[0]

    @cached_property
    def _block_depth(self) -> int:
        return find_blocks(self.model)[0].count(".") + 2

    @contextmanager
    def _materialized(self, below: str, found: dict[str, _TensorSlot]) -> Iterator[None]:
        """Fill those of the meta tensors ``found`` that are under the name ``below``."""
        wanted = [n for n in found if not below or n == below or n.startswith(f"{below}.")]
        if not wanted:  # all are in memory already
            yield
            return
        try:
            self.checkpoint.fill(self.model, wanted)
            yield
        finally:
            for slot in found.values():
                slot.restore()


@dataclass(frozen=True, eq=False)
class _TensorSlot:
    """A meta tensor, and the module and name it belongs to."""

    module: nn.Module
    name: str
    empty: torch.Tensor

    def restore(self) -> None:
        tensors = self.module._parameters
        if self.name not in tensors:
            tensors = self.module._buffers
        tensors[self.name] = self.empty


def _meta_tensors(module: nn.Module, prefix: str) -> dict[str, _TensorSlot]:
    """Return every parameter and buffer of a module that is on the meta device, by full name."""
    found = {}
    for path, child in module.named_modules(prefix=prefix):
        for name, tensor in [*child._parameters.items(), *child._buffers.items()]:
            if tensor is not None and tensor.is_meta:
                found[f"{path}.{name}".lstrip(".")] = _TensorSlot(child, name, tensor)
    return found


class Checkpoint:
    """The tensors of safetensors files, and how they become a model's parameters.

    Raises
    ------
    NotStreamable
        If a weight of the model, other than the output head's, is missing or its shape is wrong.
    """

    def __init__(
        self, model: nn.Module, files: Iterable, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slices = {key: file.get_slice(key) for file in files for key in file.keys()}  # noqa: SIM118
        self._config = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=get_model_conversion_mapping(model),
            device_map={"": device},
        )
        #: Checkpoint keys by the (first) parameter name that they become.
        self.keys_by_name: dict[str, list[str]] = {}
        for key, name, _ in target_names(model, self.slices):
            self.keys_by_name.setdefault(name, []).append(key)
        #: Parameter names of the output head, which only evaluation needs.
        self.head = _parameter_names_in(model, model.get_output_embeddings())
        self._dry_run(model)

    def _dry_run(self, model: nn.Module) -> None:
        """Load all tensors on the meta device, to check in advance that they exist and fit."""
        empty = {
            key: torch.empty(part.get_shape(), dtype=_dtype_of(part), device="meta")
            for key, part in self.slices.items()
        }
        config = replace(self._config, device_map={"": "meta"})
        found, _ = convert_and_load_state_dict_in_model(model, empty, config)
        missing = sorted(found.missing_keys - self.head)
        wrong = sorted(str(name) for name, *_ in found.mismatched_keys)
        wrong += sorted(map(str, found.conversion_errors))
        if missing or wrong:
            raise NotStreamable(
                f"The checkpoint has no {missing[0]}"
                if missing
                else f"The checkpoint has {wrong[0]} in another shape"
            )

    def fill(self, model: nn.Module, names: Iterable[str]) -> None:
        """Read the named tensors of the model, and any others made from the same keys."""
        keys = {key for name in names for key in self.keys_by_name.get(name, ())}
        parts = {key: self.slices[key] for key in keys}
        convert_and_load_state_dict_in_model(model, parts, self._config)
        for name in names:
            tensor = _tensor(model, name)
            if tensor.is_floating_point():
                tensor.requires_grad_(False)


def _parameter_names_in(model: nn.Module, module: nn.Module | None) -> set[str]:
    """Return the full names of the tensors in a module of the model."""
    paths = [path for path, found in model.named_modules() if found is module]
    return {name for name in model.state_dict() for path in paths if name.startswith(f"{path}.")}


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def _dtype_of(part: object) -> torch.dtype:
    dtype = torch_dtype(part.get_dtype())
    if dtype is None:
        raise NotStreamable(f"The checkpoint holds weights as {part.get_dtype()}")
    return dtype


def open_streamed(source: ModelSource, device: str = "auto", dtype: str = "auto") -> StreamedModel:
    """Open a model, leaving its weights in their files, and load its tokenizer.

    Raises
    ------
    NotStreamable
        If the model has to be loaded in full (:func:`lsq_core.model.loading.load_model`).
    InputError
        If the source, device or dtype is invalid, or the model is not causal.
    LsqError
        If the largest part to be held at a time does not fit in the device's memory.
    """
    _release_freed_memory()
    target, folder = pick_device(device), find_model(source)
    if weight_files(folder)[0].suffix != ".safetensors":
        raise NotStreamable("The weights are pickled")
    if source.trust_remote_code and "auto_map" in read_config(folder):
        raise NotStreamable("The model uses custom code")
    compute_dtype = pick_dtype(dtype, target, model_config(source, folder))
    model = build_meta_model(source, folder, dtype=compute_dtype, experts_implementation="eager")
    # Sizes are reported in the checkpoint's dtype, which may differ from the compute dtype.
    info = describe_files(build_meta_model(source, folder), source, folder)
    check_memory(source.name, _max_resident_parameters(model), target, compute_dtype)
    files = [safe_open(path, framework="pt") for path in weight_files(folder)]
    checkpoint = Checkpoint(model, files, compute_dtype, target)
    _compute_buffers(model, target)
    streamed = StreamedModel(
        model.eval().requires_grad_(False),
        load_tokenizer(source, folder),
        info,
        folder,
        str(target),
        str(compute_dtype)[6:],
        checkpoint,
    )
    check_causal(
        source.name,
        streamed.first_block_output,
        vocabulary=embedding_rows(model),
        context=info.context,
        dtype=compute_dtype,
        device=target,
    )
    return streamed


def _max_resident_parameters(model: nn.Module) -> int:
    """Return the parameters of the largest block, or of everything outside the blocks if more."""
    sizes = [sum(p.numel() for p in block.parameters()) for block in find_blocks(model)[1]]
    return max(*sizes, sum(p.numel() for p in model.parameters()) - sum(sizes))


def _compute_buffers(model: nn.Module, device: torch.device) -> None:
    """Initialize the buffers that no checkpoint stores (rotary embeddings', say).

    The dry run has marked the weights as initialized, so they are left unchanged.
    """
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    model.initialize_weights()
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = buffer.to(device)


def _release_freed_memory() -> None:
    """Make glibc return large tensors' memory to the system as soon as they are freed.

    By default its mmap threshold grows to 32 MiB, and smaller freed chunks are not returned.
    Fragmented by tensors of other sizes, they can't be reused, and memory would grow with each
    block that is profiled.
    """
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
