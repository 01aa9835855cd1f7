"""AutoRound: a ``layer_config`` with an entry for each module.

AutoRound treats a name that is not a module of the model as a search pattern, and only warns about
patterns that match nothing; names are complete here. Modules whose rows or columns are not
divisible by 32 stay in 16 bits. 8-bit codes are symmetric: anything else is refused (0.16,
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
    """Return 2 to 6 and 8 bits, with 16-bit scales and zero points as wide as the codes."""
    if out_features % 32 or in_features % 32:
        return (KEPT,)
    return grouped_formats(in_features, (2, 3, 4, 5, 6, 8), lambda width: 16 + width)


def _entry(form: Format) -> dict:
    if form.is_kept:
        return {"bits": KEPT_BITS, "data_type": "float"}
    entry = {"bits": form.bits, "group_size": form.group_size}
    return entry if form.bits == 8 else entry | {"sym": False}


def write(translation: Translation) -> str:
    """Return the ``layer_config`` argument."""
    entries = {a.module.name: _entry(a.format) for a in translation.assignments}
    return json_text(entries, indent=1) + "\n"


def usage(translation: Translation, file_name: str) -> str:
    """Return code that quantizes a model with the plan."""
    return f"""\
import json
from auto_round import AutoRound
layer_config = json.load(open({file_name!r}))
ar = AutoRound({translation.model_path!r}, scheme="W4A16", layer_config=layer_config)
ar.quantize_and_save("quantized", format="auto_round")"""


def notes(translation: Translation) -> tuple[str, ...]:
    """Return notes on the grid and on whether vLLM can serve the plan."""
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
