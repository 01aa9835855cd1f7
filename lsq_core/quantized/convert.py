"""From a full-precision model to a quantized copy of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from lsq_core.bits import Config
from lsq_core.model.architecture import get_weight, is_transposed, locate_parameter
from lsq_core.model.info import Matrix
from lsq_core.progress import Progress, no_progress
from lsq_core.quantization.base import HighImpactRows, MatrixQuantizer, StoredMatrix
from lsq_core.quantization.cache import PackedMatrixCache
from lsq_core.quantization.rows import quantize_config
from lsq_core.quantization.task import ModelQuantizer, QuantizationTask
from lsq_core.quantized.modules import PackedLinear, PackedStack, decode_stacks, drop_stacks


def install(
    model: nn.Module,
    packed: Mapping[Matrix, StoredMatrix],
    dtype: torch.dtype | None = None,
) -> None:
    """Replace the modules of ``model`` that hold these matrices, in place.

    Modules that share a parameter (in blocks that are used more than once) share what takes its
    place. ``dtype`` is what the model computes in; None where its parameters have it already.
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
    """By the identity of each parameter the modules that hold it, by their full names."""
    modules_of: dict[int, dict[str, nn.Module]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            modules_of.setdefault(id(parameter), {})[path] = module
    return modules_of


def shallow_copy(model: nn.Module) -> nn.Module:
    """A copy whose modules are its own and whose parameters and buffers are the original's."""
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def run_task(task: QuantizationTask, quantizer: MatrixQuantizer | ModelQuantizer) -> nn.Module:
    """A quantized copy of a task's model, matrix by matrix where the quantizer works like that.

    Raises
    ------
    InputError, LsqError
        As :func:`quantize_model` and :meth:`ModelQuantizer.quantize_model`.
    """
    if not isinstance(quantizer, MatrixQuantizer):
        return quantizer.quantize_model(task)
    return quantize_model(
        task.loaded.model,
        task.choice,
        quantizer,
        rows=task.rows,
        axis=task.grid.axis,
        metadata=task.grid.metadata,
        progress=task.progress,
        matrix_cache=task.cache,
    )


def quantize_model(
    model: nn.Module,
    choice: Mapping[Matrix, Config],
    quantizer: MatrixQuantizer,
    *,
    rows: HighImpactRows | None = None,
    axis: int = 1,
    metadata: str = "8bit",
    progress: Progress = no_progress,
    matrix_cache: PackedMatrixCache | None = None,
) -> nn.Module:
    """A quantized copy of ``model``; the original stays as it was and shares what isn't planned.

    Matrices that are ``remembered``, of this very model, are not quantized again.

    Raises
    ------
    InputError, LsqError
        As :func:`lsq_core.quantization.rows.quantize_config`.
    """
    rows, matrix_cache = rows or {}, matrix_cache or PackedMatrixCache(0)

    def pack(matrix: Matrix, config: Config) -> StoredMatrix:
        return quantize_config(
            get_weight(model, matrix),
            config,
            quantizer,
            rows=rows.get(matrix.name),
            axis=axis,
            metadata=metadata,
            name=matrix.name,
        )

    packed = {}
    for done, (matrix, config) in enumerate(choice.items()):
        progress(done, len(choice), matrix.name)
        own = tuple(rows.get(matrix.name, ()))
        key = matrix.name, config, own, type(quantizer), axis, metadata
        packed[matrix] = matrix_cache.get(key, partial(pack, matrix, config))
    progress(len(choice), len(choice), "quantized")
    return replace_matrices(model, packed)


def replace_matrices(
    model: nn.Module,
    packed: Mapping[Matrix, StoredMatrix],
    changed: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """A copy of ``model`` that holds these matrices, and shares what isn't among them.

    ``changed`` are other parameters, by full name, that the quantizer changed as well.
    """
    quantized = shallow_copy(model)
    install(quantized, packed)
    quantized.load_state_dict(dict(changed or {}), strict=False, assign=True)
    return quantized
