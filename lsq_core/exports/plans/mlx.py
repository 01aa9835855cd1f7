"""MLX: the ``quantization`` of a ``config.json``, with an entry for each module by full name.

Its affine grid, ``q·scale + bias`` in groups along a row, is HQQ's with ``bias = −zero·scale``. The
experts of a block form one module for each of gate, up and down (mlx-lm 0.32,
``models/switch_layers.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

from lsq_core.errors import InputError
from lsq_core.exports.base import (
    Format,
    Module,
    PlanTarget,
    Translation,
    grouped_formats,
    most_frequent,
)
from lsq_core.exports.names import split_expert
from lsq_core.jsontext import json_text
from lsq_core.model.info import Matrix, ModelInfo

#: mlx-lm's module for the experts of a block, by model type.
EXPERT_PATHS = {
    "deepseek_v2": "mlp.switch_mlp",
    "deepseek_v3": "mlp.switch_mlp",
    "dots1": "mlp.experts",
    "ernie4_5_moe": "mlp.switch_mlp",
    "glm4_moe": "mlp.switch_mlp",
    "gpt_oss": "mlp.experts",
    "granitemoe": "block_sparse_moe.switch_mlp",
    "mixtral": "block_sparse_moe.switch_mlp",
    "olmoe": "mlp.switch_mlp",
    "phimoe": "block_sparse_moe.switch_mlp",
    "qwen2_moe": "mlp.switch_mlp",
    "qwen3_moe": "mlp.switch_mlp",
    "qwen3_next": "mlp.switch_mlp",
}


def module_names(info: ModelInfo, matrix: Matrix) -> list[str]:
    """Return mlx-lm's names for the modules that hold a matrix.

    Raises
    ------
    InputError
        If its names for the model's modules or experts are not known.
    """
    prefix = f"model.layers.{matrix.layer}."
    if not matrix.name.startswith(prefix):
        raise InputError(f"MLX's name for {matrix.name} is not known.")
    if matrix.expert is None:
        return [matrix.name]
    model_type = info.config.get("model_type", "")
    path = EXPERT_PATHS.get(model_type)
    if path is None:
        raise InputError(f"MLX's names for the experts of type '{model_type}' are not known.")
    return [f"{prefix}{path}.{part}" for part in split_expert(matrix)[1]]


def modules(info: ModelInfo, matrices: Sequence[Matrix]) -> list[Module]:
    """Return the modules of mlx-lm's model, with all experts of a projection in one."""
    held: dict[str, list[Matrix]] = {}
    parts: dict[str, int] = {}
    for matrix in matrices:
        names = module_names(info, matrix)
        for name in names:
            held.setdefault(name, []).append(matrix)
            parts[name] = len(names)
    return [Module(name, tuple(group), parts[name]) for name, group in held.items()]


def formats(out_features: int, in_features: int) -> tuple[Format, ...]:
    """Return 2 to 6 and 8 bits, with a 16-bit scale and bias for each group."""
    return grouped_formats(in_features, (2, 3, 4, 5, 6, 8), lambda width: 32)


def write(translation: Translation) -> str:
    """Return the ``quantization`` entry; modules without their own entry are not quantized."""
    bits, group = most_frequent(translation)
    own = {
        a.module.name: {"group_size": a.format.group_size, "bits": a.format.bits}
        for a in translation.assignments
        if not a.format.is_kept
    }
    whole = {"group_size": group, "bits": bits, "mode": "affine"}
    return json_text({"quantization": whole | own}, indent=1) + "\n"


def usage(translation: Translation, file_name: str) -> str:
    """Return code that converts a checkpoint with the plan."""
    return f"""\
import json
from mlx_lm import convert
plan = json.load(open({file_name!r}))["quantization"]
convert({translation.model_path!r}, "quantized", quantize=True,
        quant_predicate=lambda name, module: plan.get(name, False))"""


TARGET = PlanTarget(
    name="mlx",
    title="MLX",
    file_name="mlx.json",
    modules=modules,
    formats=formats,
    write=write,
    usage=usage,
    usage_language="python",
)
