"""What a saved quantized model says of itself, and whether its files are those that were saved.

Needs no torch.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from lsq_core.bits import METADATA_FORMATS, config_from_json
from lsq_core.errors import InputError
from lsq_core.files import cached_sha256, file_sha256
from lsq_core.model.identity import tokenizer_files
from lsq_core.model.source import MANIFEST_FILE
from lsq_core.untrusted import check_links, read_json_object, resolve_inside

#: 3 since a matrix's scales have a power of two of their own (:func:`layout.layout_for_format`);
#: 2 since quantizers store matrices in layouts of their own, and matrices may have mixed rows;
#: 1 had this project's packing alone, at one width a matrix.
FORMAT_VERSION = 3
#: Not ``model.safetensors``: transformers alone would load that with random packed modules.
WEIGHTS_FILE = "packed.safetensors"
#: What a saved model is loaded by, whoever made it.
LOAD_KEYS = ("modules", "metadata", "axis")
#: What tells a saved model's run and plan, beside the format.
RUN_KEYS = ("run", "fingerprint", "modules", "metadata")
#: What a result is kept with.
EVALUATION_KEYS = (
    *RUN_KEYS,
    "axis",
    "method",
    "quantizer",
    "bits_per_param",
    "nominal_bytes",
    "planned_bytes",
    "model_bytes",
    "device",
    "dtype",
    "versions",
)
#: SHA-256 of each file by its name; that of the manifest is of all else in it. Absent in models
#: that earlier versions saved.
CHECKSUMS = "sha256"

#: Files of a saved model that decide no result: how texts are generated and chats are laid out.
_AUXILIARY_FILES = ("generation_config.json", "chat_template.jinja", "chat_template.json")
#: The beginning of the name that safetensors gives a file until it is whole.
_TEMPORARY_PREFIX = ".tmp"
#: The end of the hidden folder's name in which a model lies until it is whole.
UNFINISHED_SUFFIX = ".unfinished"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_size(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value < 2**63


#: What an entry has to be, where it is there.
_VALIDATORS: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("run", "fingerprint", "method", "quantizer", "source"), _is_text),
    **dict.fromkeys(("device", "dtype"), _is_text),
    **dict.fromkeys(("bits_per_param", "nominal_bytes", "planned_bytes", "model_bytes"), _is_size),
    "format": lambda value: type(value) is int and value > 0,
    "revision": lambda value: value is None or _is_text(value),
    "modules": lambda value: isinstance(value, dict) and all(map(_is_module, value.values())),
    "metadata": lambda value: value in METADATA_FORMATS,
    "axis": lambda value: type(value) is int and value in (0, 1),
    "versions": lambda value: isinstance(value, dict),
    CHECKSUMS: lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
}


def _is_module(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    try:
        config_from_json(entry)
    except (InputError, KeyError, TypeError):
        return False
    return True


def is_quantized_folder(folder: Path) -> bool:
    """Whether a quantized model was saved in this folder."""
    return (folder / MANIFEST_FILE).is_file()


def read_manifest(folder: Path, required_keys: Sequence[str] = LOAD_KEYS) -> dict:
    """The plan and provenance inside a saved model; ``needed`` keys have to be there.

    Raises
    ------
    InputError
        When the folder holds none, a damaged one, or one of a newer format.
    """
    path = folder / MANIFEST_FILE
    if not is_quantized_folder(folder):
        raise InputError(
            f"{folder} is not a model that LSQ Explorer saved: it has no {MANIFEST_FILE}."
        )
    check_links(folder)
    try:
        manifest = read_json_object(path)
    except InputError as error:
        raise InputError(f"{path} is damaged; save the model again. ({error})") from error
    number = manifest.get("format")
    if type(number) is int and number > FORMAT_VERSION:
        raise InputError(f"{folder} was saved by a newer LSQ Explorer; update to load it.")
    missing = [key for key in ("format", *required_keys) if key not in manifest]
    wrong = [
        key
        for key, valid in _VALIDATORS.items()
        if key in manifest and not _passes(valid, manifest[key])
    ]
    if missing or wrong:
        what = f"has no {missing[0]}" if missing else f"says of {wrong[0]} what can't be"
        raise InputError(f"{path} is damaged: it {what}; save the model again.")
    if CHECKSUMS in manifest and manifest[CHECKSUMS].get(MANIFEST_FILE) != _manifest_sha256(
        manifest
    ):
        raise InputError(f"{path} is damaged: {_CHECKSUM_MISMATCH}.")
    return manifest


def _passes(valid: Callable[[object], bool], value: object) -> bool:
    try:
        return valid(value)
    except TypeError:  # a list in the place of a name
        return False


def unfinished_folders(parent: Path, prefix: str = ".") -> list[Path]:
    """What saving left in a folder when it was killed, or writes at this moment."""
    folders = parent.glob(f"{glob.escape(prefix)}*{UNFINISHED_SUFFIX}")
    return sorted(path for path in folders if path.is_dir() and not path.is_symlink())


# --- checksums --------------------------------------------------------------------------------

_CHECKSUM_MISMATCH = (
    "its SHA-256 is not that of what was saved; copy it here again or save the model again"
)


def with_checksums(manifest: dict, folder: Path) -> dict:
    """A manifest as it is written, with the SHA-256 of the folder's files that decide a result."""
    complete = json.loads(json.dumps({"format": FORMAT_VERSION} | manifest))
    complete[CHECKSUMS] = {path.name: file_sha256(path) for path in _checksummed_files(folder)}
    complete[CHECKSUMS][MANIFEST_FILE] = _manifest_sha256(complete)
    return complete


def _checksummed_files(folder: Path) -> list[Path]:
    """Weights, config, tokenizer and code; not :data:`_AUXILIARY_FILES`."""
    beside = [*tokenizer_files(folder), *sorted(folder.glob("*.py"))]
    return [folder / WEIGHTS_FILE, folder / "config.json", *beside]


def _manifest_sha256(manifest: dict) -> str:
    """SHA-256 of all that a manifest says, and of the checksums of the other files."""
    sums = {name: value for name, value in manifest[CHECKSUMS].items() if name != MANIFEST_FILE}
    text = json.dumps(manifest | {CHECKSUMS: sums}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def changed_files(folder: Path, manifest: dict) -> list[str] | None:
    """Files that are not as they were saved, or gone; None where the manifest has no checksums."""
    if CHECKSUMS not in manifest:
        return None
    sums = {name: value for name, value in manifest[CHECKSUMS].items() if name != MANIFEST_FILE}
    paths = {name: resolve_inside(folder, name) for name in {WEIGHTS_FILE, *sums}}
    return sorted(
        name
        for name, path in paths.items()
        if not path.is_file() or cached_sha256(path) != sums.get(name)
    )


def check_files(folder: Path, manifest: dict) -> None:
    """Raise :class:`InputError` unless the files are those that were saved, as far as known."""
    changed = changed_files(folder, manifest)
    if changed:
        raise InputError(f"{folder / changed[0]} is damaged or gone: {_CHECKSUM_MISMATCH}.")


def unrelated_files(folder: Path) -> list[str]:
    """What lies in a folder and is no part of a saved model, whole or unfinished; names."""
    own = {*_AUXILIARY_FILES, MANIFEST_FILE, *(path.name for path in _checksummed_files(folder))}
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_symlink()
        or not path.is_file()
        or not (path.name in own or path.name.startswith(_TEMPORARY_PREFIX))
    )
