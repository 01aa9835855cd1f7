"""The manifest of a saved quantized model, and the checksums of its files. Needs no torch."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from lsq_core.bits import METADATA_FORMATS, config_from_json
from lsq_core.errors import InputError
from lsq_core.files import cached_sha256, file_sha256
from lsq_core.model.identity import tokenizer_files
from lsq_core.model.source import MANIFEST_FILE
from lsq_core.untrusted import check_links, read_json_object, resolve_inside

#: 3: the scales of a matrix share a power of two (:func:`layout.layout_for_format`);
#: 2: each quantizer has its own layout, and matrices may have mixed rows;
#: 1: only this project's packing, with one bit width per matrix.
FORMAT_VERSION = 3
#: Not ``model.safetensors``: plain transformers would load that with randomly initialized modules.
WEIGHTS_FILE = "packed.safetensors"
#: Entries needed to load a saved model.
LOAD_KEYS = ("modules", "metadata", "axis")
#: Entries that identify a saved model's run and plan.
RUN_KEYS = ("run", "fingerprint", "modules", "metadata")
#: Entries that are stored with a result.
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
#: SHA-256 of each file by name; the manifest's own covers all its other entries. Absent in models
#: saved by earlier versions.
CHECKSUMS = "sha256"

#: Files of a saved model that do not affect results: generation settings and chat templates.
_AUXILIARY_FILES = ("generation_config.json", "chat_template.jinja", "chat_template.json")
#: File name prefix that safetensors uses until a file is complete.
_TEMPORARY_PREFIX = ".tmp"
#: Suffix of the hidden folder in which a model is written until it is complete.
UNFINISHED_SUFFIX = ".unfinished"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_size(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 2**63  # which NaN is not


#: Validators of entries; all entries are optional.
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
    """Return whether a quantized model was saved in this folder."""
    return (folder / MANIFEST_FILE).is_file()


def read_manifest(
    folder: Path, required_keys: Sequence[str] = LOAD_KEYS, name: str = MANIFEST_FILE
) -> dict:
    """Read the plan and provenance of a saved model, or of an exported one with its file's name.

    Raises
    ------
    InputError
        If the folder has no manifest, or its manifest is damaged, lacks a required key or has a
        newer format.
    """
    path = folder / name
    if not path.is_file():
        raise InputError(f"{folder} is not a model that LSQ Explorer saved: it has no {name}.")
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
        what = f"has no {missing[0]}" if missing else f"has an invalid {wrong[0]}"
        raise InputError(f"{path} is damaged: it {what}; save the model again.")
    own = _manifest_sha256(manifest, name) if CHECKSUMS in manifest else None
    if own is not None and manifest[CHECKSUMS].get(name) != own:
        raise InputError(f"{path} is damaged: {_CHECKSUM_MISMATCH}.")
    return manifest


def _passes(valid: Callable[[object], bool], value: object) -> bool:
    try:
        return valid(value)
    except TypeError:  # a list instead of a name
        return False


def unfinished_folders(parent: Path, prefix: str = ".") -> list[Path]:
    """List the folders in which a model is being saved, or was when its process was killed."""
    folders = parent.glob(f"{glob.escape(prefix)}*{UNFINISHED_SUFFIX}")
    return sorted(path for path in folders if path.is_dir() and not path.is_symlink())


# --- checksums --------------------------------------------------------------------------------

_CHECKSUM_MISMATCH = (
    "its SHA-256 is not that of what was saved; copy it here again or save the model again"
)


def with_checksums(
    manifest: dict, folder: Path, name: str = MANIFEST_FILE, files: Sequence[Path] | None = None
) -> dict:
    """Return the manifest to write as ``name``, with the SHA-256 of all files that affect results.

    These are the files of a saved model unless ``files`` are given.
    """
    files = _checksummed_files(folder) if files is None else files
    complete = json.loads(json.dumps({"format": FORMAT_VERSION} | manifest))
    complete[CHECKSUMS] = {path.name: file_sha256(path) for path in files}
    complete[CHECKSUMS][name] = _manifest_sha256(complete, name)
    return complete


def _checksummed_files(folder: Path) -> list[Path]:
    """Return the weights, config, tokenizer and code files, but not :data:`_AUXILIARY_FILES`."""
    beside = [*tokenizer_files(folder), *sorted(folder.glob("*.py"))]
    return [folder / WEIGHTS_FILE, folder / "config.json", *beside]


def _manifest_sha256(manifest: dict, name: str) -> str:
    """Return the SHA-256 of all entries of a manifest, including the other files' checksums."""
    sums = {file: value for file, value in manifest[CHECKSUMS].items() if file != name}
    text = json.dumps(manifest | {CHECKSUMS: sums}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def changed_files(folder: Path, manifest: dict) -> list[str] | None:
    """List the files that were modified or deleted; None if the manifest has no checksums."""
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
    """Raise :class:`InputError` if a file was modified or deleted since it was saved."""
    changed = changed_files(folder, manifest)
    if changed:
        raise InputError(f"{folder / changed[0]} is damaged or missing: {_CHECKSUM_MISMATCH}.")


def unrelated_files(folder: Path) -> list[str]:
    """List the names of files in a folder that are not part of a saved model."""
    own = {*_AUXILIARY_FILES, MANIFEST_FILE, *(path.name for path in _checksummed_files(folder))}
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_symlink()
        or not path.is_file()
        or not (path.name in own or path.name.startswith(_TEMPORARY_PREFIX))
    )
