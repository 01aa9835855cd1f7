"""AutoRound: a ``layer_config`` with an entry for each module.

A name that is no module of the model becomes a pattern that is searched for, and one that matches
nothing only warns; names are whole here. Rows or columns that 32 does not divide stay in 16 bits.
8-bit codes are symmetric: asking for anything else is refused (0.16,
``compressors/layer_config_resolver.py``).
"""

from __future__ import annotations

from lsq_core.exports.base import (
    KEPT,
    KEPT_BITS,
    Format,
    PlanTarget,
    Translation,
    grouped_formats,
    linear_modules,
    serving_note,
)
from lsq_core.jsontext import json_text


def formats(out_features: int, in_features: int) -> tuple[Format, ...]:
    """2 to 6 and 8 bits; 16-bit scales, zero points of the codes' width."""
    if out_features % 32 or in_features % 32:
        return (KEPT,)
    return grouped_formats(in_features, (2, 3, 4, 5, 6, 8), lambda width: 16 + width)


def _entry(form: Format) -> dict:
    if form.is_kept:
        return {"bits": KEPT_BITS, "data_type": "float"}
    entry = {"bits": form.bits, "group_size": form.group_size}
    return entry if form.bits == 8 else entry | {"sym": False}


def write(translation: Translation) -> str:
    """The argument ``layer_config``."""
    entries = {a.module.name: _entry(a.format) for a in translation.assignments}
    return json_text(entries, indent=1) + "\n"


def usage(translation: Translation, file_name: str) -> str:
    """Quantize with it."""
    return f"""\
import json
from auto_round import AutoRound
layer_config = json.load(open({file_name!r}))
ar = AutoRound({translation.model_path!r}, scheme="W4A16", layer_config=layer_config)
ar.quantize_and_save("quantized", format="auto_round")"""


def notes(translation: Translation) -> tuple[str, ...]:
    """The grid, and whether vLLM can serve the plan."""
    eight = any(a.format.bits == 8 for a in translation.assignments)
    grid = ("Its 8-bit modules have no zero points.",) if eight else ()
    return (*grid, *serving_note(translation))


TARGET = PlanTarget(
    name="auto-round",
    title="AutoRound",
    file_name="layer_config.json",
    modules=linear_modules,
    formats=formats,
    write=write,
    usage=usage,
    usage_language="python",
    notes=notes,
)
