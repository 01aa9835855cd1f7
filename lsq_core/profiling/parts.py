"""The parts of a decoder block: modules that read the same inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from lsq_core.model.info import Matrix
from lsq_core.profiling.block import Block
from lsq_core.profiling.grams import GramCollector


@dataclass(frozen=True)
class Part:
    """Matrices that the authors quantize together, and the output that they are scored by.

    ``container`` and ``output`` are module names inside the block ('' is the block itself).
    ``linear`` marks a part of one linear module, scored by its own output.
    """

    name: str
    matrices: tuple[Matrix, ...]
    container: str
    output: str
    linear: bool = False

    @property
    def comparison(self) -> tuple[str, str]:
        """Names of the module to rerun and of the module whose output is compared."""
        return self.container, self.output


# --- parts -----------------------------------------------------------------------------------


def find_parts(context: Block) -> tuple[Part, ...]:
    """Return the parts of a block: each container's last linear module, and its others together.

    On a Llama these are the authors' four parts: q, k and v, compared at the attention's output;
    o; gate and up, compared at the MLP's output; and down. Other architectures get their
    counterparts without a list of names: a container is any module that directly holds linear
    modules (a self-attention, an MLP, the block itself). If several modules come last (experts),
    the output of the block's child that contains them is compared.
    """
    order = _execution_order(context)
    containers: dict[str, list[Matrix]] = {}
    for matrix in context.matrices:
        containers.setdefault(_container(context, matrix), []).append(matrix)
    names = _container_names(context, containers)
    parts = []
    for container, matrices in containers.items():
        last_type = max(matrices, key=lambda m: order.get(m.name, -1)).type
        last = tuple(m for m in matrices if m.type == last_type)
        before = tuple(m for m in matrices if m.type != last_type)
        single = len(last) == 1 and last[0].expert is None
        around = container if single or container == "" else container.split(".")[0]
        output = context.name_in_block(last[0]) if single else around
        first_name, last_name = names[container]
        if before:
            parts.append(Part(first_name, before, around, output))
        parts.append(Part(last_name, last, around, output, linear=single))
    return tuple(parts)


def _container(context: Block, matrix: Matrix) -> str:
    """Return the path, without indices, of a module's parent or of the expert stack itself."""
    name_in_block = context.name_in_block(matrix)
    holder = name_in_block if matrix.expert is not None else name_in_block.rpartition(".")[0]
    return re.sub(r"\.\d+(?=\.|$)", "", holder)


def _container_names(context: Block, containers: dict) -> dict[str, tuple[str, str]]:
    """Return part names: the authors' for the first attention and MLP, path-based for others."""
    names, taken = {}, set()
    for container in containers:
        kind = "attn" if "attn" in container or "attention" in container else "mlp"
        if kind in taken:
            names[container] = (f"{container or 'block'}_in", f"{container or 'block'}_out")
        else:
            standard = {"attn": ("attn_in", "attn_out"), "mlp": ("mlp_gate", "mlp_down")}
            names[container] = standard[kind]
        taken.add(kind)
    return names


def _execution_order(context: Block) -> dict[str, int]:
    """Return the order in which matrices are first used by the first batch, by name."""
    seen: dict[str, int] = {}

    class Order(GramCollector):
        def add(self, matrix: Matrix, inputs: Tensor) -> None:
            seen.setdefault(matrix.name, len(seen))

    with Order(context).collecting_inputs():
        call = context.calls[0]
        context.block(context.hidden[0], *call.args, **call.kwargs)
    return seen
