"""compressed-tensors, which llm-compressor writes and vLLM serves: a ``quantization_config``.

Targets are whole names here, which go before patterns and class names; a name in two groups would
take the last (0.20, ``quantization/lifecycle/apply.py``).
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
    """Codes of 2 to 8 bits without padding, 16-bit scales, zero points of the codes' width."""
    return grouped_formats(in_features, (2, 3, 4, 5, 6, 8), lambda width: 16 + width)


def write(translation: Translation) -> str:
    """A group for each format, with the names of its modules."""
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
    """Quantize with llm-compressor."""
    return f"""\
import json
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
groups = json.load(open({file_name!r}))["config_groups"]
oneshot(model={translation.model_path!r}, dataset="wikitext",
        dataset_config_name="wikitext-2-raw-v1",
        recipe=GPTQModifier(config_groups=groups), output_dir="quantized")"""


def notes(translation: Translation) -> tuple[str, ...]:
    """The grid, and whether vLLM can serve the plan."""
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
