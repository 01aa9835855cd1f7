"""ModelOpt: a ``quant_cfg``, in which later entries override earlier ones.

``quantizer_name`` is matched against a quantizer's full name by ``fnmatch``. A stack of experts has
a quantizer for each expert, ``…gate_up_proj_weight_quantizers.3`` (0.47,
``torch/quantization/plugins/huggingface.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from glob import escape
from pprint import pformat

from lsq_core.errors import InputError
from lsq_core.exports.base import Format, Module, PlanTarget, Translation, grouped_formats
from lsq_core.exports.names import split_expert
from lsq_core.model.info import Matrix, ModelInfo

#: Model types whose experts share one quantizer or have a different layout.
_SHARED_QUANTIZERS = ("dbrx", "gpt_oss", "llama4", "llama4_text")


def modules(info: ModelInfo, matrices: Sequence[Matrix]) -> list[Module]:
    """Return the weight quantizers of the planned matrices.

    Raises
    ------
    InputError
        If the model's experts do not have separate quantizers.
    """
    return [Module(_quantizer(info, matrix), (matrix,)) for matrix in matrices]


def _quantizer(info: ModelInfo, matrix: Matrix) -> str:
    if matrix.expert is None:
        return f"{matrix.name}.weight_quantizer"
    model_type = info.config.get("model_type", "")
    if model_type in _SHARED_QUANTIZERS:
        raise InputError(
            f"ModelOpt gives the experts of type '{model_type}' one quantizer together, so a plan "
            "of experts cannot be written for it."
        )
    split_expert(matrix)  # other stacks have no such quantizers
    stack, _, expert = matrix.name.rpartition(".")
    return f"{stack}_weight_quantizers.{expert}"


def formats(out_features: int, in_features: int) -> tuple[Format, ...]:
    """Return 2, 3, 4 and 8 bits: symmetric integers with a 16-bit scale per group."""
    return grouped_formats(in_features, (2, 3, 4, 8), lambda width: 16)


def write(translation: Translation) -> str:
    """Return Python code that defines ``QUANT_CFG``; group sizes need the integer key -1."""
    entries: list[dict] = [{"quantizer_name": "*", "enable": False}]
    for assignment in translation.assignments:
        form = assignment.format
        if not form.is_kept:
            config = {"num_bits": form.bits, "block_sizes": {-1: form.group_size}}
            name = escape(assignment.module.name)
            entries.append({"quantizer_name": name, "cfg": config, "enable": True})
    return f"QUANT_CFG = {pformat(entries, width=200, sort_dicts=False)}\n"


def usage(translation: Translation, file_name: str) -> str:
    """Return code that quantizes a model in memory with the plan."""
    return f"""\
import runpy
import modelopt.torch.quantization as mtq
plan = runpy.run_path({file_name!r})["QUANT_CFG"]
config = {{"quant_cfg": plan, "algorithm": "max"}}
model = mtq.quantize(model, config, forward_loop=None)"""


def notes(translation: Translation) -> tuple[str, ...]:
    """Return a note on ModelOpt's integers."""
    return (
        "ModelOpt's integers are symmetric, and simulated in the model's own dtype: the size is "
        "that of codes and scales once they are packed.",
    )


TARGET = PlanTarget(
    name="modelopt",
    title="ModelOpt",
    file_name="modelopt_plan.py",
    modules=modules,
    formats=formats,
    write=write,
    usage=usage,
    usage_language="python",
    notes=notes,
)
