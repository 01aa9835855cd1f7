"""Check that a checkpoint fits the architecture named in its config.

transformers silently drops tensors that the architecture has no place for, and casts the codes of
a quantized model to floating point as if they were weights. Either way the model computes a
different function from the checkpoint's. So every stored tensor is traced to the parameter it
becomes, using transformers' own renaming and only the file headers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils.loading_report import LoadStateDictInfo

from lsq_core.errors import InputError
from lsq_core.model.checkpoint import TensorEntry, have_same_content
from lsq_core.model.dtypes import FLOATS, safetensors_name

#: Name endings that quantization tools use for the tensors that turn codes into weights.
_QUANTIZATION_SUFFIXES = re.compile(
    r"(scale|scales|scale_inv|scale_2|scb|zero|zeros|zero_point|qweight|qzeros|g_idx|absmax|"
    r"quant_map|packed|blocks)$",
    re.IGNORECASE,
)


def check_fit(
    model: nn.Module, entries: Mapping[str, TensorEntry], blocks: str, folder: Path
) -> tuple[str, ...]:
    """Return notes, a sentence each, on harmless tensors of a checkpoint that the model ignores.

    Parameters
    ----------
    model
        The architecture, on the meta device or with weights.
    entries
        The stored tensors by name.
    blocks
        The full name of the list of decoder blocks.

    Raises
    ------
    InputError
        If tensors are quantized codes or have the wrong shape, two stored tensors become the same
        parameter, tied parameters differ, or the architecture has no place for a tensor that
        affects the output.
    """
    expected = model.state_dict()
    targets = list(target_names(model, entries))
    _check_unique_targets(targets, folder)
    _check_tied(model, targets, entries, folder)
    for key, name, _ in targets:
        parameter, dtype = expected.get(name), entries[key].dtype
        if parameter is not None and parameter.is_floating_point() and dtype not in FLOATS:
            raise InputError(_quantized_codes_message(key, dtype, entries, folder))
    for key, name, standalone in targets:
        parameter, shape = expected.get(name), entries[key].shape
        if standalone and parameter is not None and tuple(parameter.shape) != shape:
            raise InputError(
                f"{key} in {folder} has the shape {_shape(shape)}, but {_shape(parameter.shape)} "
                "by "
                "its config.json; give the config.json that belongs to these weights."
            )
    unused = _unused_names(model, [name for _, name, _ in targets if name not in expected])
    required = [name for name in unused if _affects_output(name, model, blocks)]
    if required:
        raise InputError(_mismatch_message(required, model, folder))
    return (_unused_note(unused, model),) if unused else ()


def _shape(shape: Iterable[int]) -> str:
    return " × ".join(map(str, shape)) or "of a single number"


def target_names(model: nn.Module, keys: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """Yield (key, name, standalone) for each stored tensor.

    ``name`` is the model's name for it after transformers' renaming; ``standalone`` is whether it
    becomes that parameter by itself rather than being only a part of it.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    expected, prefix = model.state_dict(), model.base_model_prefix
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], prefix, expected)
        yield key, name, pattern is None


def _check_unique_targets(targets: list[tuple[str, str, bool]], folder: Path) -> None:
    seen: dict[str, str] = {}
    for key, name, standalone in targets:
        if standalone and name in seen:
            raise InputError(
                f"{seen[name]} and {key} in {folder} are both {name} of the model, so it is "
                "unclear which to use; remove the outdated one."
            )
        if standalone:
            seen[name] = key


def _check_tied(
    model: nn.Module,
    targets: list[tuple[str, str, bool]],
    entries: Mapping[str, TensorEntry],
    folder: Path,
) -> None:
    """Raise if the config ties two parameters whose stored values differ."""
    key_by_name = {name: key for key, name, standalone in targets if standalone}
    for name, other in getattr(model, "all_tied_weights_keys", {}).items():
        one, two = (entries.get(key_by_name.get(n, "")) for n in (name, other))
        # Pickled tensors have no known file offset; transformers compares those itself.
        if one and two and one.bytes and not have_same_content(one, two):
            raise InputError(
                f"config.json in {folder} ties {name} to {other}, but the files hold different "
                "values of the two; set tie_word_embeddings to false if both are meant, else "
                "remove one."
            )


def _quantized_codes_message(
    key: str, dtype: str, entries: Mapping[str, TensorEntry], folder: Path
) -> str:
    siblings = [n for n in entries if n.startswith(key.removesuffix("weight")) and n != key]
    scales = [n for n in siblings if _QUANTIZATION_SUFFIXES.search(n)]
    with_scales = f", with {scales[0]} beside it" if scales else ""
    return (
        f"{key} in {folder} is stored as {dtype}{with_scales}: these are codes of a quantized "
        "model, not weights, though config.json doesn't say so; give the full-precision model "
        "instead."
    )


def _unused_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names that the architecture neither ignores deliberately nor has as buffers."""
    found = LoadStateDictInfo(set(), set(names), set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(found)
    computed = {name for name, _ in model.named_buffers()}
    return sorted(found.unexpected_keys - computed)


def _affects_output(name: str, model: nn.Module, blocks: str) -> bool:
    """Return whether a tensor without a matching parameter would affect the model's output.

    It would if it lies in a decoder block, or directly in a module that the model has. It would
    not if it belongs to a module that the model lacks: a vision tower, another head, or one of the
    blocks past the last that the config declares for multi-token prediction.
    """
    layer = re.match(rf"{re.escape(blocks)}\.(\d+)\.", name)
    if layer:
        text = model.config.get_text_config()
        layers = len(model.get_submodule(blocks))
        more = getattr(text, "num_nextn_predict_layers", None)
        more = more if isinstance(more, int) else 0
        return not layers <= int(layer[1]) < layers + more
    parent = name.rpartition(".")[0]
    return parent in {path for path, _ in model.named_modules()}


def _mismatch_message(required: list[str], model: nn.Module, folder: Path) -> str:
    more = f" and {len(required) - 1} more" if required[1:] else ""
    architecture = type(model).__name__
    if all(_QUANTIZATION_SUFFIXES.search(name) for name in required):
        return (
            f"{folder} holds {required[0]}{more}, which turn codes of a quantized model into "
            "weights, though config.json doesn't say that it is one; give the full-precision "
            "model instead."
        )
    return (
        f"{folder} holds {required[0]}{more}, for which {architecture} as described by its "
        "config.json has no place, so its outputs would be wrong; give the config.json that "
        "belongs to these weights."
    )


def _unused_note(unused: list[str], model: nn.Module) -> str:
    top_modules = sorted({name.partition(".")[0] for name in unused})
    count = f"{len(unused)} stored tensors are" if unused[1:] else "One stored tensor is"
    return (
        f"{count} not used: {type(model).__name__} has no {', '.join(top_modules)[:80]} "
        f"({unused[0]}{', …' if unused[1:] else ''})."
    )


def read_pickled_entries(files: Iterable[Path]) -> dict[str, TensorEntry]:
    """Return every tensor of pickled weight files, by name; the files must be trusted.

    Files that contain anything else (an optimizer's state, say) are skipped.
    """
    found: dict[str, TensorEntry] = {}
    for path in files:
        content = torch.load(path, map_location="meta", weights_only=True)
        for name, tensor in content.items() if isinstance(content, dict) else ():
            if isinstance(tensor, torch.Tensor):
                short = safetensors_name(tensor.dtype)
                found[name] = TensorEntry(path, short, tuple(tensor.shape))
    return found
