"""Other tools' names for a model's matrices: GGUF tensors and individual experts.

transformers stacks the experts of a block in one parameter, and their gate and up projections in
one matrix, ``…experts.gate_up_proj``; other tools keep three matrices per expert, or a stack for
each of the three. Needs no torch; GGUF names come from the ``gguf`` package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from lsq_core.errors import InputError
from lsq_core.model.info import Matrix

if TYPE_CHECKING:
    from gguf import TensorNameMap

#: GGUF architectures by model type, if their name is not the model type with or without underscores
#: (llama.cpp, ``convert_hf_to_gguf.py``).
_GGUF_ARCHITECTURES = {
    "cohere": "command-r",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "ernie4_5_moe": "ernie4_5-moe",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "glm4_moe": "glm4moe",
    "gpt_neox": "gptneox",
    "gpt_oss": "gpt-oss",
    "granitemoe": "granite",
    "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe",
    "llama4_text": "llama4",
    "minimax_m2": "minimax-m2",
    "ministral": "llama",
    "mistral": "llama",
    "mixtral": "llama",
}
_STACK = re.compile(r"(?P<block>.+)\.experts\.(?P<part>gate_up_proj|gate_proj|up_proj|down_proj)")


# --- GGUF -----------------------------------------------------------------------------------


def gguf_architecture(config: Mapping) -> str:
    """Return llama.cpp's name for the architecture of a model with this config.

    Raises
    ------
    InputError
        If the ``gguf`` package has no such architecture.
    """
    from gguf import MODEL_ARCH_NAMES

    model_type = str(config.get("model_type", ""))
    bare = model_type.replace("_", "")
    for name in (_GGUF_ARCHITECTURES.get(model_type), model_type, bare):
        if name in MODEL_ARCH_NAMES.values():
            return name
    raise InputError(f"llama.cpp's names for models of type '{model_type}' are not known.")


def gguf_name_map(config: Mapping, layers: int) -> TensorNameMap:
    """Return the ``gguf`` package's map from a model's tensor names to those of GGUF files.

    Raises
    ------
    InputError
        See :func:`gguf_architecture`.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = gguf_architecture(config)
    by_name = {name: key for key, name in MODEL_ARCH_NAMES.items()}
    return get_tensor_name_map(by_name[architecture], layers)


def gguf_tensor_name(names: TensorNameMap, parameter: str) -> str:
    """Return the GGUF name of a parameter, both with a suffix: ``blk.0.attn_q.weight``.

    Raises
    ------
    InputError
        If the architecture has no such tensor.
    """
    found = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise InputError(f"llama.cpp has no name for {parameter}, so it cannot be written for it.")
    return found


def gguf_matrix_names(config: Mapping, layers: int, matrices: Iterable[Matrix]) -> dict[str, list]:
    """Return the matrices in each GGUF tensor, by the tensor's name.

    The experts of a block form one tensor for each of gate, up and down; a combined gate and up
    matrix is in two tensors.

    Raises
    ------
    InputError
        See :func:`gguf_architecture` and :func:`gguf_tensor_name`.
    """
    names = gguf_name_map(config, layers)
    tensors: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        parts = [matrix.name] if matrix.expert is None else _stacked_parts(matrix)
        for part in parts:
            tensors.setdefault(gguf_tensor_name(names, f"{part}.weight"), []).append(matrix)
    return tensors


# --- experts --------------------------------------------------------------------------------


def split_expert(matrix: Matrix) -> tuple[str, tuple[str, ...]]:
    """Return the block of an expert's matrix (``model.layers.0.mlp``) and the projections in it.

    These are gate and up, in this order, for ``gate_up_proj``; otherwise the one it is named after.

    Raises
    ------
    InputError
        If the stack has a different name, so that other tools' names for it are not known.
    """
    match = _STACK.fullmatch(matrix.name.rpartition(".")[0])
    if matrix.expert is None or match is None:
        raise InputError(
            f"Other tools' names for {matrix.name} are not known: its experts are not stacked as "
            "gate_up_proj and down_proj."
        )
    part = match["part"]
    return match["block"], ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)


def check_expert_stacks(matrices: Iterable[Matrix]) -> None:
    """Raise :class:`InputError` unless experts' gate and up matrices are stacked by rows.

    Some models (Llama 4) store them as (in, out), so that their halves are columns.
    """
    by_name = {m.name: m for m in matrices if m.expert is not None}
    for name, matrix in by_name.items():
        down = by_name.get(name.replace(".gate_up_proj.", ".down_proj."))
        if down is None or down is matrix:
            continue
        if (matrix.out_features, matrix.in_features) != (2 * down.in_features, down.out_features):
            raise InputError(
                f"{name} ({matrix.out_features}×{matrix.in_features}) does not stack gate and up "
                "by rows, so it cannot be split into other tools' modules."
            )


def _stacked_parts(matrix: Matrix) -> list[str]:
    """Return the expert stacks that a matrix belongs to: ``model.layers.0.mlp.experts.up_proj``.

    GGUF has one stack per projection, even for those that the checkpoint combines.
    """
    block, parts = split_expert(matrix)
    return [f"{block}.experts.{part}" for part in parts]


def expert_names(matrix: Matrix) -> tuple[str, ...]:
    """Return the linear modules that a matrix becomes in tools that separate experts.

    >>> expert_names(Matrix("model.layers.1.mlp.experts.gate_up_proj.3", 1, "", 8, 4, 3))
    ('model.layers.1.mlp.experts.3.gate_proj', 'model.layers.1.mlp.experts.3.up_proj')

    Raises
    ------
    InputError
        See :func:`split_expert`.
    """
    if matrix.expert is None:
        return (matrix.name,)
    block, parts = split_expert(matrix)
    return tuple(f"{block}.experts.{matrix.expert}.{part}" for part in parts)
