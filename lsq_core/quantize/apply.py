"""Put packed matrices in the place of a model's linear modules and expert stacks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsq_core.architecture import get_weight, is_transposed, locate
from lsq_core.config import Config
from lsq_core.model import Matrix
from lsq_core.quantize.base import MatrixQuantizer, Progress, Rows, StoredMatrix
from lsq_core.quantize.remembered import Remembered
from lsq_core.quantize.rows import quantize_config


class PackedLinear(nn.Module):
    """A linear module that holds a :class:`StoredMatrix` and multiplies by what it decodes to.

    It takes the place of ``nn.Linear`` and of transformers' ``Conv1D``. The bias stays as it was.
    """

    def __init__(
        self,
        packed: StoredMatrix,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.transposed = transposed
        self.out_features, self.in_features = packed.shape
        self.config, self.axis, self.names = packed.config, packed.axis, list(packed.tensors)
        self.kind = type(packed)
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        # No values: it follows the model's dtype, in which `weight` is decoded.
        self.register_buffer("_as", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The decoded weight (out, in), for code that multiplies by it in its own way.

        Some architectures (Mamba, latent attention) read a linear module's weight instead of
        calling the module. It is decoded anew each time.
        """
        decoded = self.packed.dequantize(self._as.dtype)
        return decoded.T if self.transposed else decoded

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

    def decode(self) -> Tensor:
        """The parameter as the experts' module expects it."""
        weights = [expert.weight for expert in self]
        return torch.stack([w.T for w in weights] if self.transposed else weights)


def _decode_stacks(module: nn.Module, args: tuple) -> None:
    for name, child in module.named_children():
        if isinstance(child, PackedStack):
            module.__dict__[name] = child.decode()


def _drop_stacks(module: nn.Module, *_: object) -> None:
    for name, child in module.named_children():
        if isinstance(child, PackedStack):
            module.__dict__.pop(name, None)


def install(
    model: nn.Module,
    packed: Mapping[Matrix, StoredMatrix],
    dtype: torch.dtype | None = None,
) -> None:
    """Replace the modules of ``model`` that hold these matrices, in place.

    Modules that share a parameter (in blocks that are used more than once) share what takes its
    place. ``dtype`` is what the model computes in; None where its parameters have it already.
    """
    users = _users(model)
    stacks: dict[tuple[nn.Module, str], list[PackedLinear]] = {}
    for matrix, weights in packed.items():
        holder, name = locate(model, matrix)
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
            user.register_forward_pre_hook(_decode_stacks)
            user.register_forward_hook(_drop_stacks, always_call=True)


def _users(model: nn.Module) -> dict[int, dict[str, nn.Module]]:
    """By the identity of each parameter the modules that hold it, by their full names."""
    found: dict[int, dict[str, nn.Module]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            found.setdefault(id(parameter), {})[path] = module
    return found


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
    """Bytes of the stored tensors of all packed matrices, shared ones once, without biases."""
    modules = packed_modules(model).values()
    return sum({id(t): t.nbytes for m in modules for t in m.packed.tensors.values()}.values())


def model_bytes(model: nn.Module) -> int:
    """Bytes of every stored tensor of a model in memory, shared ones once."""
    seen = {t.data_ptr(): t.nbytes for t in chain(model.parameters(), model.buffers())}
    return sum(seen.values())
