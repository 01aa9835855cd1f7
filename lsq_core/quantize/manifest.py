"""What a saved quantized model says of itself; needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lsq_core.errors import InputError
from lsq_core.model import MANIFEST

#: 3 since a matrix's scales have a power of two of their own (:func:`layout.as_saved`);
#: 2 since quantizers store matrices in layouts of their own, and matrices may have mixed rows;
#: 1 had this project's packing alone, at one width a matrix.
FORMAT = 3
#: Not ``model.safetensors``: transformers alone would load that with random packed modules.
WEIGHTS = "packed.safetensors"
#: What tells a saved model's run and plan, beside the format.
RUN = ("run", "fingerprint", "modules", "metadata")


def is_quantized_folder(folder: Path) -> bool:
    """Whether a quantized model was saved in this folder."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path, needed: Sequence[str] = ("modules",)) -> dict:
    """The plan and provenance inside a saved model; ``needed`` keys have to be there.

    Raises
    ------
    InputError
        When the folder holds none, a damaged one, or one of a newer format.
    """
    if not is_quantized_folder(folder):
        raise InputError(f"{folder} is not a model that LSQ Explorer saved: it has no {MANIFEST}.")
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf8"))
        newer = manifest["format"] > FORMAT
        whole = all(key in manifest for key in needed)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / MANIFEST} is damaged; save the model again.") from error
    if newer:
        raise InputError(f"{folder} was saved by a newer LSQ Explorer; update to load it.")
    if not whole:
        raise InputError(f"{folder / MANIFEST} is damaged; save the model again.")
    return manifest
