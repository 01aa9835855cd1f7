"""Count the kernels that a computation launches and the results it waits for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lsq_core.quantization.hqq import solver, solver_triton

#: Operations whose result the host needs, and methods that copy one to it.
_WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}
_COPYING = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}
#: Operations other than views that compute nothing.
_FREE = {
    "aten::empty",
    "aten::new_empty",
    "aten::detach",
    "aten::_unsafe_view",
    "aten::scalar_tensor",
}


class Launches(TorchDispatchMode):
    """Counts operations by name: ``kernels`` that compute, and ``waits`` for a result."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        masks = args[1] if name in _INDEXING else ()
        if name in _WAITING or any(m is not None and m.dtype == torch.bool for m in masks):
            self.waits[name] += 1
        returns = [result.alias_info for result in func._schema.returns]
        if name not in _FREE and all(alias is None or alias.is_write for alias in returns):
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """Counts copies to the host, which dispatch no operation if the device is the host."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _COPYING:
            self.launches.waits[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def count_launches(monkeypatch) -> Iterator[Launches]:
    """Count operations in a ``with`` block; the solver's steps count as one kernel, as on a GPU."""
    launches = Launches()

    def one_kernel(weight: Tensor, scale: Tensor, zero: Tensor, tops, axis: int, **_):
        launches.kernels["solver"] += 1
        with _disable_current_modes():
            return solver._solve_in_pieces(weight, scale, zero, tops, axis)

    with monkeypatch.context() as patch:
        patch.setattr(solver, "_uses_triton", lambda device: True)
        patch.setattr(solver_triton, "run_all_steps", one_kernel)
        with launches, _Copies(launches):
            yield launches
