"""Second moments of the inputs of a block's linear modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lsq_core.model.architecture import get_weight, locate_parameter
from lsq_core.model.info import Matrix
from lsq_core.profiling.block import Block

# --- Gram matrices ---------------------------------------------------------------------------


class GramCollector:
    """Sums XᵀX over all inputs of the linear modules and experts of a block."""

    def __init__(self, context: Block) -> None:
        self.context = context
        self.sums: dict[object, tuple[Tensor, int]] = {}
        #: Key of each matrix's sum, shared by matrices with the same input tensor.
        self.key_by_matrix: dict[Matrix, object] = {}
        self.key_by_input: dict[int, object] = {}
        self.alive: list[Tensor] = []

    @contextmanager
    def collecting_inputs(self) -> Iterator[None]:
        stacked = [m for m in self.context.matrices if m.expert is not None]
        with ExitStack() as stack:
            for matrix in self.context.matrices:
                if matrix.expert is None:
                    holder, _ = locate_parameter(self.context.loaded.model, matrix)
                    handle = holder.register_forward_pre_hook(self._hook(matrix))
                    stack.callback(handle.remove)
            if stacked:
                stack.enter_context(_ExpertInputRecorder(self, stacked))
            yield

    def _hook(self, matrix: Matrix) -> Callable:
        return lambda module, args: self.add(matrix, args[0])

    def add(self, matrix: Matrix, inputs: Tensor) -> None:
        """Add the inputs of one call, once for all matrices that share them."""
        shared = self.key_by_input.get(id(inputs)) if matrix.expert is None else None
        if shared is not None:
            self.key_by_matrix[matrix] = shared
            return
        self.key_by_matrix[matrix] = matrix
        self.key_by_input[id(inputs)] = matrix
        self.alive.append(inputs)  # an id is unique only while its object is alive
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        before, tokens = self.sums.get(matrix, (None, 0))
        self.sums[matrix] = (self.sum(before, rows), tokens + len(rows))

    def sum(self, before: Tensor | None, rows: Tensor) -> Tensor:
        """Return the running sum with rows (n, in) added."""
        return rows.T @ rows if before is None else before.addmm_(rows.T, rows)

    def end_batch(self) -> None:
        self.key_by_input.clear()
        self.alive.clear()

    def result(self) -> dict[Matrix, tuple[Tensor, int]]:
        none = {}
        for matrix in self.context.matrices:
            if matrix not in self.key_by_matrix:
                device = self.context.weight(matrix).device
                size = matrix.in_features
                none[matrix] = (torch.zeros(size, size, device=device), 0)
        return none | {m: self.sums[key] for m, key in self.key_by_matrix.items()}


class MomentCollector(GramCollector):
    """Sums only the diagonals of XᵀX."""

    def sum(self, before: Tensor | None, rows: Tensor) -> Tensor:
        squares = rows.square().sum(0)
        return squares if before is None else before.add_(squares)


class _ExpertInputRecorder(TorchFunctionMode):
    """Records the inputs of each expert of a stack.

    Experts are not modules: the module that holds them calls ``linear`` or a matrix product with
    a slice of the stacked parameter, which is identified by its memory address.
    """

    def __init__(self, collector: GramCollector, matrices: list[Matrix]) -> None:
        super().__init__()
        self.collector = collector
        model = collector.context.loaded.model
        self.by_address = {get_weight(model, m).data_ptr(): m for m in matrices}

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func in _PRODUCTS and len(args) >= 2 and torch.is_tensor(args[1]):
            matrix = self.by_address.get(args[1].data_ptr())
            if matrix is not None and args[0].shape[-1] == matrix.in_features:
                self.collector.add(matrix, args[0])
        return func(*args, **(kwargs or {}))


_PRODUCTS = {
    torch.nn.functional.linear,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.mm,
    torch.Tensor.mm,
}
