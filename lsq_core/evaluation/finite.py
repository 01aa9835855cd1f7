"""Find the first module of a model whose output is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def watch_finite(module: nn.Module, prefix: str = "") -> Iterator[list[str]]:
    """Record the name of the first module whose output isn't finite within a ``with`` block.

    Names are relative to ``module`` and start with ``prefix``. The list is empty if all outputs
    are finite.
    """
    found: list[str] = []

    def make_hook(name: str) -> Callable:
        def hook(module: nn.Module, arguments: tuple, output: object) -> None:
            if not found and not _all_finite(output):
                found.append(name)

        return hook

    named = [(name, m) for name, m in module.named_modules(prefix=prefix) if name]
    hooks = [m.register_forward_hook(make_hook(name)) for name, m in named]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _all_finite(output: object) -> bool:
    """Return whether all floats in a module's output are finite, including nested containers."""
    if isinstance(output, Tensor):
        return not output.is_floating_point() or bool(torch.isfinite(output).all())
    if isinstance(output, dict):
        output = tuple(output.values())
    return all(map(_all_finite, output)) if isinstance(output, (tuple, list)) else True
