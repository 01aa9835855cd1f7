"""compressed-tensors, written by llm-compressor and served by vLLM: a ``quantization_config``.

Targets are full names here, which take precedence over patterns and class names; a name in two
groups would use the last one (0.20, ``quantization/lifecycle/apply.py``).
"""

from __future__ import annotations

from lsq_core.exports.base import (
    Format,
    PlanTarget,
    Translation,
    grouped_formats,
    linear_modules,
    refuse_conv1d,
    serving_note,
)
from lsq_core.jsontext import json_text


def formats(out_features: int, in_features: int) -> tuple[Format, ...]:
    """Return 2 to 6 and 8 bits, unpadded; 16-bit scales, zero points as wide as the codes."""
    return grouped_formats(in_features, (2, 3, 4, 5, 6, 8), lambda width: 16 + width)


def write(translation: Translation) -> str:
    """Return the config, which has a group for each format with the names of its modules."""
    targets: dict[Format, list[str]] = {}
    for assignment in translation.assignments:
        if not assignment.format.is_kept:
            targets.setdefault(assignment.format, []).append(assignment.module.name)
    groups = {
        form.name: {
            "targets": names,
            "weights": {
                "num_bits": form.bits,
                "type": "int",
                "symmetric": False,
                "strategy": "group",
                "group_size": form.group_size,
            },
        }
        for form, names in sorted(targets.items(), key=lambda item: item[0].nominal_bits)
    }
    content = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
    }
    return json_text(content, indent=1) + "\n"


def usage(translation: Translation, file_name: str) -> str:
    """Return code that quantizes a model with llm-compressor."""
    return f"""\
import json
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
groups = json.load(open({file_name!r}))["config_groups"]
oneshot(model={translation.model_path!r}, dataset="wikitext",
        dataset_config_name="wikitext-2-raw-v1",
        recipe=GPTQModifier(config_groups=groups), output_dir="quantized")"""


def notes(translation: Translation) -> tuple[str, ...]:
    """Return notes on the grid and on whether vLLM can serve the plan."""
    return ("Its zero points are whole numbers.", *serving_note(translation))


TARGET = PlanTarget(
    name="compressed-tensors",
    title="compressed-tensors",
    file_name="quantization_config.json",
    modules=refuse_conv1d(linear_modules, "compressed-tensors"),
    formats=formats,
    write=write,
    usage=usage,
    usage_language="python",
    notes=notes,
)
