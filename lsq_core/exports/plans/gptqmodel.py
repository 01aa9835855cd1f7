"""GPTQModel: a ``QuantizeConfig`` whose ``dynamic`` has a pattern for each module.

Patterns are PCRE, anchored only at the start, and the first match wins; those of the form
``^literal$`` are looked up as names, and ``-:`` excludes a module (7.6.0,
``quantization/config.py``).
"""

from __future__ import annotations

import re

from lsq_core.exports.base import (
    KEPT,
    Format,
    PlanTarget,
    Translation,
    grouped_formats,
    linear_modules,
    most_frequent,
)
from lsq_core.jsontext import json_text


def formats(out_features: int, in_features: int) -> tuple[Format, ...]:
    """Return 2, 3, 4 and 8 bits, with fp16 scales and zero points as wide as the codes.

    Each input also has a 32-bit group index. 5 to 7 bits would need another kind of checkpoint.
    """
    if out_features % 32 or in_features % 32:  # codes are packed 32 at a time
        return (KEPT,)
    index = 32 / out_features
    return tuple(
        f if f.is_kept else Format(f.name, f.bits, f.group_size, f.nominal_bits + index)
        for f in grouped_formats(in_features, (2, 3, 4, 8), lambda width: 16 + width)
    )


def write(translation: Translation) -> str:
    """Return the fields of ``QuantizeConfig``; the most frequent format is the config's own."""
    base_bits, base_group = most_frequent(translation)
    dynamic = {}
    for assignment in translation.assignments:
        pattern, form = f"^{re.escape(assignment.module.name)}$", assignment.format
        if form.is_kept:
            dynamic[f"-:{pattern}"] = {}
        else:
            dynamic[pattern] = {"bits": form.bits, "group_size": form.group_size}
    fields = {
        "bits": base_bits,
        "group_size": base_group,
        "sym": False,
        "desc_act": False,
        "dynamic": dynamic,
    }
    return json_text(fields, indent=1) + "\n"


def usage(translation: Translation, file_name: str) -> str:
    """Return code that quantizes a model with the plan."""
    return f"""\
import json
from gptqmodel import GPTQModel, QuantizeConfig
config = QuantizeConfig(**json.load(open({file_name!r})))
model = GPTQModel.load({translation.model_path!r}, config)
model.quantize(calibration)  # a list of texts
model.save("quantized")"""


def notes(translation: Translation) -> tuple[str, ...]:
    """Return notes on GPTQ's grid and on how vLLM uses the patterns."""
    grid = "GPTQ rounds on a grid with whole zero points."
    if len({a.format.settings for a in translation.assignments}) == 1:
        return (grid,)
    return (
        grid,
        "vLLM compares these patterns with its fused modules (qkv_proj, gate_up_proj), so it "
        "cannot load a model of several configurations; GPTQModel and transformers can.",
    )


TARGET = PlanTarget(
    name="gptqmodel",
    title="GPTQModel",
    file_name="gptqmodel.json",
    modules=linear_modules,
    formats=formats,
    write=write,
    usage=usage,
    usage_language="python",
    notes=notes,
)
