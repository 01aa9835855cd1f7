"""Servers and tools that a plan can target: the modules they fuse and configurations they support.

To add a server, add an entry to ``SERVERS``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lsq_core.bits import Config, MixedRows, is_divisible
from lsq_core.errors import InputError, choose
from lsq_core.model.info import Matrix
from lsq_core.planning.ties import Tie


@dataclass(frozen=True)
class Server:
    """The constraints on plans for a server, or for a tool that quantizes for one.

    ``bits`` and ``group_sizes`` are supported by its kernels for integer weights with zero points;
    groups lie within a row. ``fused`` lists modules that it loads as one. With ``fuses_experts``,
    all matrices of a layer's experts are loaded as one too.
    """

    name: str
    title: str
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    fused: tuple[Tie, ...]
    fuses_experts: bool

    def permitted(self, matrices: Sequence[Matrix], options: Sequence[Config]) -> np.ndarray:
        """Return whether the server supports each option for each matrix, bool (n, options).

        Raises
        ------
        InputError
            If the options are mixed rows.
        """
        if any(isinstance(option, MixedRows) for option in options):
            raise InputError(
                f"{self.title} does not support rows of different bits in a matrix; choose another "
                "method, or plan without --serve."
            )
        return np.array([[self._has(option, matrix) for option in options] for matrix in matrices])

    def _has(self, config: Config, matrix: Matrix) -> bool:
        is_known = config.bits in self.bits and config.group_size in self.group_sizes
        return is_known and is_divisible(matrix.in_features, config.group_size)

    def check_axis(self, axis: int) -> None:
        """Raise :class:`InputError` for groups that don't lie within a row."""
        if axis != 1:
            raise InputError(
                f"{self.title}'s groups lie within a row, which is axis 1; plan with --axis 1."
            )

    def groups(self, matrices: Sequence[Matrix]) -> list[list[int]]:
        """Return groups of matrices that the server fuses, as indices."""
        groups = [group for tie in self.fused for group in tie.groups(matrices)]
        if self.fuses_experts:
            stacks: dict[tuple, list[int]] = defaultdict(list)
            for i, matrix in enumerate(matrices):
                if matrix.expert is not None:  # a stack is a parameter or a module's weight
                    parent = matrix.type.removesuffix(".weight").rpartition(".")[0]
                    stacks[matrix.layer, parent].append(i)
            groups += [stack for stack in stacks.values() if len(stack) > 1]
        return groups

    @property
    def demand(self) -> str:
        """The constraints on a plan for this server, in a sentence."""
        fused = (
            f"{self.title} fuses q, k and v, gate and up, and a layer's experts, so each of these "
            "groups shares a configuration, and it supports "
        )
        return f"{fused if self.fused else f'{self.title} supports '}{self.summary}."

    @property
    def summary(self) -> str:
        """The supported options: ``4 and 8 bits in groups of 32, 64 and 128 within a row``."""
        return (
            f"{_listed(self.bits)} bits in groups of {_listed(sorted(self.group_sizes))} within a "
            "row"
        )


def _listed(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


#: vLLM. Bits: ``AutoGPTQConfig.TYPE_MAP`` has 4 and 8. For compressed-tensors,
#: ``WNA16_ZP_SUPPORTED_TYPES_MAP`` has 4 and 8 with zero points, which our grids need; 2 to 7 are
#: supported only for symmetric grids. Group sizes: ``MARLIN_SUPPORTED_GROUP_SIZES``. Fused modules:
#: ``packed_modules_mapping`` of its models (Llama and most others; LFM2; DeepSeek; Qwen3.5).
#: Experts: ``CompressedTensorsMoEMethod.get_moe_method`` requires one scheme for all projections.
#: Sources: vllm-project/vllm and docs.vllm.ai/en/stable/api, November 2026.
VLLM = Server(
    name="vllm",
    title="vLLM",
    bits=(4, 8),
    group_sizes=(128, 64, 32),
    fused=(
        Tie(("q_proj", "k_proj", "v_proj")),
        Tie(("gate_proj", "up_proj")),
        Tie(("w1", "w3")),
        Tie(("q_a_proj", "kv_a_proj_with_mqa")),
        Tie(("in_proj_qkv", "in_proj_z")),
        Tie(("in_proj_b", "in_proj_a")),
    ),
    fuses_experts=True,
)

#: gptqmodel, which produces GPTQ models. It quantizes modules one by one, so nothing is fused.
GPTQMODEL = Server(
    name="gptqmodel",
    title="gptqmodel",
    bits=(2, 3, 4, 8),
    group_sizes=(128, 64, 32),
    fused=(),
    fuses_experts=False,
)

SERVERS: dict[str, Server] = {server.name: server for server in (VLLM, GPTQMODEL)}


def get_server(name: str) -> Server:
    """Return the server with this name.

    Raises
    ------
    InputError
        If there is no such server.
    """
    return choose(SERVERS, name, "a server")
