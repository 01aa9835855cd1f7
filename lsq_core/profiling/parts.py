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
    """Matrices that the authors quantize together, and the output by which they are scored.

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
        """The module that is run again for it, and the one whose output is compared."""
        return self.container, self.output


# --- parts -----------------------------------------------------------------------------------


def find_parts(context: Block) -> tuple[Part, ...]:
    """Return the parts of a block: per container the last linear module, and the others together.

    This gives the authors' four parts on a Llama - q, k, v against the attention's output, o,
    gate and up against the MLP's output, down - and their counterparts elsewhere, without a list
    of names: a container is what directly holds linear modules (a self-attention, an MLP, the
    block itself). Where several modules are last (experts), the output of the block's child
    around them is compared.
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
    """Return the parent of a matrix's module, or the stack of experts itself; without indices."""
    name_in_block = context.name_in_block(matrix)
    holder = name_in_block if matrix.expert is not None else name_in_block.rpartition(".")[0]
    return re.sub(r"\.\d+(?=\.|$)", "", holder)


def _container_names(context: Block, containers: dict) -> dict[str, tuple[str, str]]:
    """Return the authors' part names for the first attention and the first MLP, else paths."""
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
    """Return the rank of each matrix's first use when the first batch runs through the block."""
    seen: dict[str, int] = {}

    class Order(GramCollector):
        def add(self, matrix: Matrix, inputs: Tensor) -> None:
            seen.setdefault(matrix.name, len(seen))

    with Order(context).collecting_inputs():
        call = context.calls[0]
        context.block(context.hidden[0], *call.args, **call.kwargs)
    return seen
