"""torchao: an ``FqnToConfig`` with a config for each module by its full name.

A name applies only to the module with exactly that name and takes precedence over patterns.
Integers below 8 bits take one byte each (0.18, ``quantization/quant_api.py``).
"""

from __future__ import annotations

from lsq_core.exports.base import (
    KEPT,
    Format,
    PlanTarget,
    Translation,
    grouped_formats,
    linear_modules,
    refuse_conv1d,
)

#: Bits stored per weight, and per group: a 16-bit scale and an 8-bit zero point.
_BITS_STORED, _GROUP_BITS = 8, 24


def formats(out_features: int, in_features: int) -> tuple[Format, ...]:
    """Return 1 to 6 and 8 bits, all stored in bytes."""
    grouped = grouped_formats(in_features, (1, 2, 3, 4, 5, 6, 8), lambda width: _GROUP_BITS)
    return tuple(
        f
        if f == KEPT
        else Format(
            f.name,
            f.bits,
            f.group_size,
            f.nominal_bits,
            padded_bits=_BITS_STORED + _GROUP_BITS / f.group_size,
        )
        for f in grouped
    )


def write(translation: Translation) -> str:
    """Return Python code that defines ``CONFIG``."""
    used = {a.format for a in translation.assignments if not a.format.is_kept}
    lines = [
        "import torch",
        "from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, MappingType, PerGroup",
        "",
    ]
    for form in sorted(used, key=lambda f: f.nominal_bits):
        lines.append(
            f"{form.name} = IntxWeightOnlyConfig("
            f"torch.int{form.bits}, PerGroup({form.group_size}), MappingType.ASYMMETRIC)"
        )
    lines += ["", "CONFIG = FqnToConfig({"]
    for assignment in translation.assignments:
        form = assignment.format
        config = "None" if form.is_kept else form.name
        lines.append(f"    {assignment.module.name!r}: {config},")
    return "\n".join([*lines, "})"]) + "\n"


def usage(translation: Translation, file_name: str) -> str:
    """Return code that quantizes a model in memory with the plan, after separating its experts."""
    experts = any(m.expert is not None for a in translation.assignments for m in a.module.matrices)
    defuse = "import defuser\ndefuser.convert_model(model)  # experts as linear modules\n"
    return f"""\
import runpy
from torchao.quantization import quantize_
{defuse if experts else ""}config = runpy.run_path({file_name!r})["CONFIG"]
quantize_(model, config, filter_fn=None)"""


def notes(translation: Translation) -> tuple[str, ...]:
    """Return a note that fewer than 8 bits save nothing."""
    return (
        "torchao keeps every code in a byte unless another packing is chosen, so fewer than 8 bits "
        "save nothing.",
    )


TARGET = PlanTarget(
    name="torchao",
    title="torchao",
    file_name="torchao_plan.py",
    modules=refuse_conv1d(linear_modules, "torchao"),
    formats=formats,
    write=write,
    usage=usage,
    usage_language="python",
    notes=notes,
)
