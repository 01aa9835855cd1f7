"""Put packed matrices in the place of a model's linear modules and expert stacks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsq_core.config import Config
from lsq_core.load import get_weight, is_transposed, locate
from lsq_core.model import Matrix
from lsq_core.quantize.base import MatrixQuantizer, Progress, Rows, StoredMatrix
from lsq_core.quantize.remembered import Remembered
from lsq_core.quantize.rows import quantize_config


class PackedLinear(nn.Module):
    """A linear module that holds a :class:`StoredMatrix` and multiplies by what it decodes to.

    It takes the place of ``nn.Linear`` and of transformers' ``Conv1D``. The bias stays as it was.
    """

    def __init__(self, packed: StoredMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.config, self.axis, self.names = packed.config, packed.axis, list(packed.tensors)
        self.kind = type(packed)
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def packed(self) -> StoredMatrix:
        """The stored matrix."""
        tensors = {name: getattr(self, name) for name in self.names}
        shape = (self.out_features, self.in_features)
        return self.kind.from_tensors(tensors, shape, self.config, self.axis)

    @property
    def kernel(self) -> str:
        """What multiplies, for :func:`kernels`."""
        return "decoded, then multiplied by PyTorch"

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs`` (…, in) to (…, out), in the dtype of the inputs."""
        return F.linear(inputs, self.packed.dequantize(inputs.dtype), self.bias)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.in_features}, {self.out_features}, {self.config.name}"


class PackedStack(nn.ModuleList):
    """The packed experts of one stacked parameter.

    The experts' module reads its parameter as a tensor (experts, …) in ways of its own, so the
    stack is decoded into that attribute just before the module runs and dropped right after.
    """

    def __init__(self, experts: Iterable[PackedLinear], transposed: bool) -> None:
        super().__init__(experts)
        self.transposed = transposed

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The parameter as the experts' module expects it."""
        weights = [expert.packed.dequantize(dtype) for expert in self]
        return torch.stack([w.T for w in weights] if self.transposed else weights)


def _decode_stacks(module: nn.Module, args: tuple) -> None:
    dtype = next(a for a in args if torch.is_tensor(a) and a.is_floating_point()).dtype
    for name, child in module.named_children():
        if isinstance(child, PackedStack):
            module.__dict__[name] = child.decode(dtype)


def _drop_stacks(module: nn.Module, *_: object) -> None:
    for name, child in module.named_children():
        if isinstance(child, PackedStack):
            module.__dict__.pop(name, None)


def install(model: nn.Module, packed: Mapping[Matrix, StoredMatrix]) -> None:
    """Replace the modules of ``model`` that hold these matrices, in place."""
    stacks: dict[tuple[nn.Module, str], list[PackedLinear]] = {}
    for matrix, weights in packed.items():
        holder, parameter = locate(model, matrix)
        if matrix.expert is None:
            path, _, leaf = matrix.name.rpartition(".")
            setattr(model.get_submodule(path), leaf, PackedLinear(weights, holder.bias))
        else:
            stacks.setdefault((holder, parameter), []).append(PackedLinear(weights))
    for (holder, parameter), experts in stacks.items():
        delattr(holder, parameter)
        holder.add_module(parameter, PackedStack(experts, is_transposed(holder)))
    for holder in {holder for holder, _ in stacks}:
        holder.register_forward_pre_hook(_decode_stacks)
        holder.register_forward_hook(_drop_stacks, always_call=True)


def shallow_copy(model: nn.Module) -> nn.Module:
    """A copy whose modules are its own and whose parameters and buffers are the original's."""
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def quantize_model(
    model: nn.Module,
    choice: Mapping[Matrix, Config],
    quantizer: MatrixQuantizer,
    *,
    rows: Rows | None = None,
    axis: int = 1,
    metadata: str = "8bit",
    progress: Progress = lambda done, total, message: None,
    remembered: Remembered | None = None,
) -> nn.Module:
    """A quantized copy of ``model``; the original stays as it was and shares what isn't planned.

    Matrices that are ``remembered``, of this very model, are not quantized again.

    Raises
    ------
    InputError, LsqError
        As :func:`lsq_core.quantize.rows.quantize_config`.
    """
    rows, remembered = rows or {}, remembered or Remembered(0)

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
        packed[matrix] = remembered.get(key, partial(pack, matrix, config))
    progress(len(choice), len(choice), "quantized")
    return with_stored(model, packed)


def with_stored(
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


def packed_modules(model: nn.Module) -> dict[str, PackedLinear]:
    """Every packed module by full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}


def kernels(model: nn.Module) -> dict[str, str]:
    """What multiplies by each packed module, by full name.

    It is the same everywhere: the fast kernels that ``hqq`` can patch in (gemlite, torchao) want
    layouts of their own, and a second copy of the weights beside the one that was measured.
    """
    return {name: module.kernel for name, module in packed_modules(model).items()}


def measured_bytes(model: nn.Module) -> int:
    """Bytes of the stored tensors of all packed matrices, biases not counted."""
    return sum(m.packed.nbytes for m in packed_modules(model).values())


def model_bytes(model: nn.Module) -> int:
    """Bytes of every stored tensor of a model in memory, shared ones once."""
    seen = {t.data_ptr(): t.nbytes for t in chain(model.parameters(), model.buffers())}
    return sum(seen.values())
