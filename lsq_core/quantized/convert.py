"""Quantize a full-precision model into a copy that shares its unquantized parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from lsq_core.bits import Config
from lsq_core.model.architecture import get_weight, is_transposed, locate_parameter
from lsq_core.model.info import Matrix
from lsq_core.quantization.base import MatrixQuantizer, StoredMatrix
from lsq_core.quantization.cache import PackedMatrixCache
from lsq_core.quantization.rows import quantize_config
from lsq_core.quantization.task import ModelQuantizer, QuantizationTask
from lsq_core.quantized.modules import (
    PackedLinear,
    PackedStack,
    decode_stacks,
    drop_stacks,
    packed_modules,
)
from lsq_core.settings import GridSettings


def install(
    model: nn.Module,
    packed: Mapping[Matrix, StoredMatrix],
    dtype: torch.dtype | None = None,
) -> None:
    """Replace the modules of ``model`` that use these matrices with packed ones, in place.

    Modules that share a parameter (in blocks that are used more than once) share the packed
    matrix. ``dtype`` is the model's compute dtype; None for that of its parameters.
    """
    users = _modules_by_parameter(model)
    stacks: dict[tuple[nn.Module, str], list[PackedLinear]] = {}
    for matrix, weights in packed.items():
        holder, name = locate_parameter(model, matrix)
        parameter = getattr(holder, name)
        if matrix.expert is not None:
            made = PackedLinear(weights, dtype=dtype or parameter.dtype)
            stacks.setdefault((holder, name), []).append(made)
            continue
        for path, user in users[id(parameter)].items():
            parent, _, leaf = path.rpartition(".")
            made = PackedLinear(
                weights,
                user.bias,
                dtype=dtype or parameter.dtype,
                transposed=is_transposed(user),
            )
            setattr(model.get_submodule(parent), leaf, made)
    for (holder, name), experts in stacks.items():
        stack = PackedStack(experts, is_transposed(holder))
        for user in dict.fromkeys(users[id(getattr(holder, name))].values()):
            delattr(user, name)
            user.add_module(name, stack)
            user.register_forward_pre_hook(decode_stacks)
            user.register_forward_hook(drop_stacks, always_call=True)


def _modules_by_parameter(model: nn.Module) -> dict[int, dict[str, nn.Module]]:
    """Map the identity of each parameter to the modules that use it, by their full names."""
    modules_of: dict[int, dict[str, nn.Module]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            modules_of.setdefault(id(parameter), {})[path] = module
    return modules_of


def shallow_copy(model: nn.Module, replaced: Iterable[nn.Module] = ()) -> nn.Module:
    """Copy the modules of a model, sharing its parameters and buffers.

    Modules in ``replaced``, which the caller replaces in the copy next, are shared to avoid copying
    them.
    """
    shared = {id(t): t for t in chain(model.parameters(), model.buffers(), replaced)}
    return copy.deepcopy(model, shared)


def _replaced_modules(model: nn.Module, matrices: Iterable[Matrix]) -> list[nn.Module]:
    """Return the modules that :func:`install` replaces: those whose parameter is one matrix."""
    return [locate_parameter(model, m)[0] for m in matrices if m.expert is None]


def quantize_model(
    task: QuantizationTask, quantizer: MatrixQuantizer | ModelQuantizer
) -> nn.Module:
    """Return a quantized copy of a task's model that shares the parameters not in the plan.

    A :class:`MatrixQuantizer` quantizes the planned matrices one by one, except those in the
    task's cache; a :class:`ModelQuantizer` handles the entire model itself. The original model is
    not modified.

    Raises
    ------
    InputError, LsqError
        See :func:`lsq_core.quantization.rows.quantize_config` and
        :meth:`ModelQuantizer.quantize_model`.
    """
    if not isinstance(quantizer, MatrixQuantizer):
        return quantizer.quantize_model(task)
    packed = {}
    for done, (matrix, config) in enumerate(task.choice.items()):
        task.progress(done, len(task.choice), matrix.name)
        packed[matrix] = _quantize_matrix(task, quantizer, matrix, config)
    task.progress(len(packed), len(packed), "quantized")
    return replace_matrices(task.loaded.model, packed)


def _quantize_matrix(
    task: QuantizationTask, quantizer: MatrixQuantizer, matrix: Matrix, config: Config
) -> StoredMatrix:
    """Quantize one matrix of a task, or take it from the task's cache."""
    weight = get_weight(task.loaded.model, matrix)
    rows = task.rows.get(matrix.name)
    return quantize_matrix(weight, matrix, config, quantizer, task.grid, task.cache, rows)


def quantize_matrix(
    weight: Tensor,
    matrix: Matrix,
    config: Config,
    quantizer: MatrixQuantizer,
    grid: GridSettings,
    cache: PackedMatrixCache,
    rows: Sequence[int] | None = None,
) -> StoredMatrix:
    """Quantize a weight (out, in), or take it from the cache of the model's matrices.

    ``rows`` are the high-impact rows, for a configuration that mixes widths.

    Raises
    ------
    InputError, LsqError
        See :func:`lsq_core.quantization.rows.quantize_config`.
    """
    high_impact = tuple(() if rows is None else rows)
    key = (matrix.name, config, high_impact, type(quantizer), grid.axis, grid.metadata)
    return cache.get(
        key,
        lambda: quantize_config(
            weight,
            config,
            quantizer,
            rows=rows,
            axis=grid.axis,
            metadata=grid.metadata,
            name=matrix.name,
        ),
    )


def quantize_block(task: QuantizationTask, quantizer: MatrixQuantizer, layer: int) -> nn.Module:
    """Return a quantized copy of one block that shares the parameters not in the plan.

    The block's weights must be in memory; the task's progress is not reported.

    Raises
    ------
    InputError, LsqError
        See :func:`lsq_core.quantization.rows.quantize_config`.
    """
    packed = {
        matrix: _quantize_matrix(task, quantizer, matrix, config)
        for matrix, config in task.choice.items()
        if matrix.layer == layer
    }
    block = task.loaded.blocks[layer]
    block = shallow_copy(block, _replaced_modules(task.loaded.model, packed))
    install(_nest(task.loaded.block_name(layer), block), packed)
    return block


def _nest(name: str, module: nn.Module) -> nn.Module:
    """Nest ``module`` in empty modules so that it has this full name, and return the outermost."""
    for part in reversed(name.split(".")):
        holder = nn.Module()
        holder.add_module(part, module)
        module = holder
    return module


def replace_matrices(
    model: nn.Module,
    packed: Mapping[Matrix, StoredMatrix],
    changed: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Return a copy of ``model`` with these matrices that shares all other parameters.

    ``changed`` are further parameters, by full name, that the quantizer changed.
    """
    quantized = shallow_copy(model, _replaced_modules(model, packed))
    install(quantized, packed)
    quantized.load_state_dict(dict(changed or {}), strict=False, assign=True)
    return quantized


def cast_copies(models: Sequence[nn.Module], dtype: torch.dtype) -> list[nn.Module]:
    """Return copies of models that compute in another dtype and share tensors like the originals.

    Packed matrices are shared with the originals and decoded in the new dtype.
    """
    packed = {
        id(tensor)
        for model in models
        for module in packed_modules(model).values()
        for tensor in module.packed.tensors.values()
    }
    cast: dict[int, Tensor] = {}
    for model in models:
        for tensor in chain(model.parameters(), model.buffers()):
            if id(tensor) in packed or not tensor.is_floating_point():
                cast[id(tensor)] = tensor
            elif id(tensor) not in cast:
                values = tensor.detach().to(dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                cast[id(tensor)] = nn.Parameter(values, False) if is_parameter else values
    return [copy.deepcopy(model, dict(cast)) for model in models]
