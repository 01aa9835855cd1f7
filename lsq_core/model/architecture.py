"""The structure of a model: its decoder blocks, and the weight matrices that plans cover.

Nothing here depends on a model's name. A matrix is planned if multiplying by a decoded copy of it
gives what the model computes: a module whose ``forward`` is that of ``nn.Linear`` or ``Conv1D``, or
a stack of expert weights. Everything else is left unchanged and listed.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lsq_core.bits import LADDER, is_divisible
from lsq_core.errors import InputError
from lsq_core.model.info import Matrix, ModelInfo
from lsq_core.model.source import ModelSource

#: Config keys for the number of positions.
_CONTEXT_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_target_positions",
)
#: The longest context, in tokens, that fits a signed 32-bit database column.
_MAX_CONTEXT = 2**31 - 1
#: Computation order of modules that some blocks define in another order.
_QKV_RANK = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


class CompressedWeights(nn.Module):
    """A module that replaces a planned matrix and stores its weights in another form."""

    @property
    def numel(self) -> int:
        """Number of weights in the matrix."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class BlockParameter:
    """A parameter of two or more dimensions in a decoder block.

    ``reason`` is why plans exclude it, '' if they don't.
    """

    #: Name of the module within its block, and of the parameter within the module.
    module_name: str
    parameter_name: str
    module: nn.Module
    reason: str = ""

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself."""
        return getattr(self.module, self.parameter_name)

    @property
    def is_stacked(self) -> bool:
        """Whether it holds the weights of several experts."""
        return self.parameter.dim() == 3

    @property
    def name(self) -> str:
        """Its name within the block: the module's name for an unstacked ``weight``."""
        if self.parameter_name == "weight" and not self.is_stacked:
            return self.module_name
        return f"{self.module_name}.{self.parameter_name}".lstrip(".")

    @property
    def type(self) -> str:
        """The name without indices."""
        return re.sub(r"\.\d+(?=\.|$)", "", self.name)


# --- what a model consists of ---------------------------------------------------------------


def describe_model(model: nn.Module, source: ModelSource) -> ModelInfo:
    """Describe a model from its modules: parameters (tied ones once), blocks and matrices.

    Raises
    ------
    InputError
        If the model has no decoder blocks, or none of their matrices can be planned.
    """
    prefix, blocks = find_blocks(model)
    found = list(iter_matrices(prefix, blocks))
    usable = [m for m in found if any(is_divisible(m.numel, c.group_size) for c in LADDER)]
    if not usable:
        raise InputError(
            f"No matrix of {source.name} divides into groups of 32, 64 or 128 weights, so there "
            f"is nothing to plan; the largest has {max(m.numel for m in found):,} weights."
        )
    planned = set(usable)  # a list would be searched once for each of many thousand experts
    return ModelInfo(
        source=source.name,
        revision=source.revision,
        architecture=type(model).__name__,
        layers=len(blocks),
        context=context_length(model),
        parameters=sum(p.numel() for p in model.parameters()),
        file_bytes=0,
        matrices=tuple(usable),
        left_out=_list_excluded_weights(model, blocks, [m for m in found if m not in planned]),
        tied_embeddings=bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False)),
        other_bytes=_other_bytes(model, usable),
    )


def context_length(model: nn.Module) -> int:
    """Return a model's context length in tokens; 2048 if its config doesn't specify one."""
    text = model.config.get_text_config()
    named = [getattr(text, name, None) for name in _CONTEXT_LENGTH_KEYS]
    context = min(next((n for n in named if isinstance(n, int) and n > 0), 2048), _MAX_CONTEXT)
    tokens = model.get_input_embeddings()
    for module in model.modules():  # learned positions may start after a padding index
        if module is tokens:
            continue  # a vocabulary may be as large as the context
        if isinstance(module, nn.Embedding) and module.num_embeddings == context:
            context -= 0 if module.padding_idx is None else module.padding_idx + 1
            break
    return context


def _other_bytes(model: nn.Module, matrices: list[Matrix]) -> int:
    """Return the bytes of unplanned parameters in the config's dtype (16 bits if it has none)."""
    stored = getattr(model.config, "dtype", None)
    itemsize = stored.itemsize if isinstance(stored, torch.dtype) else 2
    total = sum(p.numel() for p in model.parameters())
    return itemsize * (total - sum(m.numel for m in matrices))


def _list_excluded_weights(
    model: nn.Module, blocks: nn.ModuleList, indivisible: list[Matrix]
) -> tuple[str, ...]:
    """List the block weights that plans exclude, one line per type: name, share, reason."""
    layers: Counter[tuple[str, str]] = Counter()
    weights: Counter[tuple[str, str]] = Counter()
    indivisible_by_layer: dict[int, list[Matrix]] = {}
    for matrix in indivisible:
        indivisible_by_layer.setdefault(matrix.layer, []).append(matrix)
    for layer, block in enumerate(blocks):
        excluded = [
            (w.type, w.reason, w.parameter.numel())
            for w in iter_block_parameters(block)
            if w.reason
        ]
        excluded += [(m.type, _NOT_DIVISIBLE, m.numel) for m in indivisible_by_layer.get(layer, ())]
        for kind, reason, numel in excluded:
            weights[kind, reason] += numel
        layers.update({(kind, reason) for kind, reason, _ in excluded})
    total = sum(p.numel() for p in model.parameters())
    return tuple(
        f"{kind} in {layers[kind, reason]} of {len(blocks)} layers, "
        f"{100 * numel / total:.2g} % of the weights: {reason}"
        for (kind, reason), numel in weights.most_common()
    )


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the decoder blocks, preceded by their name in the model.

    They are the outermost ``ModuleList`` whose every member contains matrices that can be planned
    (or that a plan has compressed). If there are several such lists (a vision tower beside the
    decoder, say), the one with the most weights is used.

    Raises
    ------
    InputError
        If the model has no such list.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    outermost: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(f"{outer}.") for outer in outermost):
            continue
        if all(_holds_matrices(block) for block in module):
            outermost.append(name)
            size = _count_weights(module)
            if best is None or size > best[0]:
                best = (size, name, module)
    if best is None:
        raise InputError(
            f"{type(model).__name__} has no decoder blocks with linear modules, so there is "
            "nothing to plan."
        )
    return best[1], best[2]


def _holds_matrices(block: nn.Module) -> bool:
    """Return whether a block has matrices that can be planned or that a plan has compressed."""
    return any(isinstance(module, CompressedWeights) for module in block.modules()) or any(
        not weights.reason for weights in iter_block_parameters(block)
    )


def _count_weights(module: nn.Module) -> int:
    """Count a module's weights, including compressed ones."""
    compressed = sum(m.numel for m in module.modules() if isinstance(m, CompressedWeights))
    return compressed + sum(p.numel() for p in module.parameters())


# --- the weights of a block -----------------------------------------------------------------

_NOT_DIVISIBLE = "no supported group size divides it"
_CUSTOM_FORWARD = "its module has a custom forward"
_SINGLE_ROW_GATE = "a single-row gate"
_ROUTER = "it is an expert router"
_NOT_LINEAR = "it is not the weight of a linear module"


def iter_block_parameters(block: nn.Module) -> Iterator[BlockParameter]:
    """Yield every parameter of two or more dimensions in a block, in module order."""
    stacks = [module for module in block.modules() if _is_expert_stack(module)]
    experts = {p.shape[0] for s in stacks for p in s.parameters(recurse=False) if p.dim() == 3}
    for name, module in block.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            reason = _exclusion_reason(name, module, parameter_name, parameter, experts)
            yield BlockParameter(name, parameter_name, module, reason)


def _exclusion_reason(
    name: str, module: nn.Module, parameter_name: str, parameter: nn.Parameter, experts: set[int]
) -> str:
    """Return why a parameter is excluded from plans, '' if it isn't."""
    if parameter.dim() == 3 and _is_expert_stack(module):
        return "" if min(parameter.shape[1:]) > 1 else _NOT_LINEAR
    if parameter_name != "weight" or not isinstance(module, (nn.Linear, Conv1D)):
        return _NOT_LINEAR
    if not has_linear_forward(module):
        return _CUSTOM_FORWARD
    if min(parameter.shape) == 1:
        return _SINGLE_ROW_GATE
    is_router = parameter.shape[0] in experts or (experts and "router" in name.split("."))
    return _ROUTER if is_router else ""


def has_linear_forward(module: nn.Module) -> bool:
    """Return whether a module computes exactly what ``nn.Linear`` or transformers' ``Conv1D`` does.

    A subclass with its own ``forward`` is tested on a small example: some (Falcon's) are
    equivalent, others (routers, grouped projections) aren't.
    """
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    weight, bias = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]]), torch.tensor([1.0, 0.0, 2])
    inputs = torch.tensor([[[1.0, -2.0], [0.25, 3.0]]])
    small = copy.copy(module)
    small._parameters = {
        "weight": nn.Parameter(weight, requires_grad=False),
        "bias": None if module.bias is None else nn.Parameter(bias, requires_grad=False),
    }
    try:
        output = type(module).forward(small, inputs)
    except Exception:  # a forward that fails on plain inputs is not that of a linear module
        return False
    expected = F.linear(inputs, weight, small.bias)
    return (
        torch.is_tensor(output)
        and output.shape == expected.shape
        and bool((output == expected).all())
    )


def _is_expert_stack(module: nn.Module) -> bool:
    """Return whether a module stacks the weights of its experts, (experts, …) per parameter."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return False
    return hasattr(module, "is_transposed") or "Expert" in type(module).__name__


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module stores its weight as (in, out): Conv1D, and experts marked so."""
    return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))


def iter_matrices(
    prefix: str, blocks: nn.ModuleList, *, left_out: bool = False
) -> Iterator[Matrix]:
    """Yield every weight matrix of the decoder blocks, in computation order as far as known.

    A stack of expert weights yields one matrix per expert; the index is not part of the type.
    A parameter shared by several modules is one matrix, named after the first of them.
    ``left_out`` also yields linear modules that plans exclude.
    """
    seen: set[int] = set()
    for layer, block in enumerate(blocks):
        weights = [
            w for w in iter_block_parameters(block) if not w.reason or (left_out and _is_linear(w))
        ]
        for weight in sorted(weights, key=_computation_order):
            if id(weight.parameter) in seen:
                continue
            seen.add(id(weight.parameter))
            out_features, in_features = weight.parameter.shape[-2:]
            if is_transposed(weight.module):
                out_features, in_features = in_features, out_features
            full, shape = f"{prefix}.{layer}.{weight.name}", (out_features, in_features)
            if not weight.is_stacked:
                yield Matrix(full, layer, weight.type, *shape)
                continue
            for expert in range(weight.parameter.shape[0]):
                yield Matrix(f"{full}.{expert}", layer, weight.type, *shape, expert)


def _is_linear(weight: BlockParameter) -> bool:
    return isinstance(weight.module, (nn.Linear, Conv1D)) and weight.parameter_name == "weight"


def _computation_order(weight: BlockParameter) -> tuple[int, int]:
    """Return a sort key that moves q, k, v to the front of their block."""
    leaf = weight.module_name.rpartition(".")[2]
    return (0, _QKV_RANK[leaf]) if leaf in _QKV_RANK else (1, 0)


# --- one matrix -----------------------------------------------------------------------------


def get_weight(model: nn.Module, matrix: Matrix) -> torch.Tensor:
    """Return a matrix's weight as a view (out_features, in_features), in the model's dtype."""
    holder, parameter = locate_parameter(model, matrix)
    return matrix_view(getattr(holder, parameter), holder, matrix)


def matrix_view(tensor: torch.Tensor, holder: nn.Module, matrix: Matrix) -> torch.Tensor:
    """Return a matrix's part of a tensor shaped like its parameter, as a view (out, in)."""
    share = tensor if matrix.expert is None else tensor[matrix.expert]
    return share.T if is_transposed(holder) else share


def locate_parameter(model: nn.Module, matrix: Matrix) -> tuple[nn.Module, str]:
    """Return the module that holds a matrix, and the name of its parameter."""
    if matrix.expert is None:
        return model.get_submodule(matrix.name), "weight"
    path, parameter, _ = matrix.name.rsplit(".", 2)
    return model.get_submodule(path), parameter


def parameter_name(matrix: Matrix) -> str:
    """Return the full name of the parameter that holds a matrix, alone or in a stack."""
    return f"{matrix.name}.weight" if matrix.expert is None else matrix.name.rpartition(".")[0]


def first_tensor(output: object) -> torch.Tensor:
    """Return a module's output tensor: the output itself, or the first of a tuple or list."""
    return output[0] if isinstance(output, (tuple, list)) else output
