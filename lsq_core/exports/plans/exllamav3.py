"""exllamav3: a recipe for ``convert.py --recipe``, with the bits of every module.

Its trellis codes have a bit width but no groups. A recipe lists every tensor of the decoder by its
key, which is the checkpoint's; missing or unknown keys are refused (``doc/optimize.md``,
``conversion/allocation.py``).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from lsq_core.errors import InputError
from lsq_core.exports.base import (
    KEPT,
    Format,
    Module,
    PlanTarget,
    Translation,
    linear_modules,
)
from lsq_core.model.info import Matrix, ModelInfo

#: Modules of a block whose keys are the same in exllamav3.
_KEY = re.compile(
    r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|"
    r"mlp\.((experts\.\d+|shared_experts?)\.)?(gate|up|down)_proj)"
)
#: Model types in which the experts of ``mlp`` have other keys.
_RENAMED = ("mixtral", "phimoe")
_RENAMED_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
#: Bits of the head: the maximum in exllamav3.
_HEAD_BITS = 8


def modules(info: ModelInfo, matrices: Sequence[Matrix]) -> list[Module]:
    """Return the planned modules, named by their keys.

    Raises
    ------
    InputError
        If exllamav3's key for a module is not known, as for fused ones.
    """
    renamed = info.config.get("model_type") in _RENAMED
    found = []
    for module in linear_modules(info, matrices):
        if _KEY.fullmatch(module.name) is None:
            raise InputError(f"exllamav3's key for {module.name} is not known.")
        name = module.name
        if renamed and module.matrices[0].expert is not None:
            stack, _, part = name.rpartition(".")
            name = f"{stack.replace('.mlp.', '.block_sparse_moe.')}.{_RENAMED_PARTS[part]}"
        found.append(Module(name, module.matrices, module.parts))
    return found


def formats(out_features: int, in_features: int) -> tuple[Format, ...]:
    """Return 1 to 8 bits, with a 16-bit sign and scale for each input and output."""
    vectors = 16 / in_features + 16 / out_features
    return (*(Format(f"{b}-bit", b, None, b + vectors) for b in range(1, 9)), KEPT)


def write(translation: Translation) -> str:
    """Return a recipe in YAML."""
    weights = sum(a.module.numel for a in translation.assignments if not a.format.is_kept)
    bits = sum(
        a.module.numel * a.format.bits for a in translation.assignments if not a.format.is_kept
    )
    mean = bits / weights if weights else 0.0
    lines = [f"target_bpw: {mean:.4f}", f"achieved_bpw: {mean:.4f}", f"head_bits: {_HEAD_BITS}"]
    lines += ["tensors:", *(f"  {a.module.name}: {a.format.bits}" for a in translation.assignments)]
    return "\n".join(lines) + "\n"


def usage(translation: Translation, file_name: str) -> str:
    """Return a command that converts a checkpoint with the plan."""
    model, recipe = shlex.quote(translation.model_path), shlex.quote(file_name)
    return f"python convert.py -i {model} -w work -o quantized --recipe {recipe}"


def notes(translation: Translation) -> tuple[str, ...]:
    """Return a note on the head."""
    return (f"exllamav3 also quantizes the head, to {_HEAD_BITS} bits in this recipe.",)


TARGET = PlanTarget(
    name="exllamav3",
    title="exllamav3",
    file_name="recipe.yaml",
    modules=modules,
    formats=formats,
    write=write,
    usage=usage,
    usage_language="bash",
    notes=notes,
)
