"""The manifest of an exported folder: the plan and run that it came from. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsq_core.errors import InputError
from lsq_core.files import cached_sha256
from lsq_core.quantized.manifest import CHECKSUMS, EVALUATION_KEYS, read_manifest, with_checksums
from lsq_core.untrusted import resolve_inside

#: The manifest of an exported folder, in addition to the files of its format.
EXPORT_FILE = "lsq-export.json"
#: Entries in addition to those of a saved model: the format, the run that it was exported from, the
#: bytes of the planned matrices and of the weights file in this format, and each matrix's type.
_EXPORT_KEYS = ("exported_as", "exported_from", "exported_bytes", "exported_model_bytes", "types")


def is_exported_folder(folder: Path) -> bool:
    """Return whether a model was exported to this folder."""
    return (folder / EXPORT_FILE).is_file()


def write_export(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of an exported folder, with the SHA-256 of all its other files."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    complete = with_checksums(dict(manifest), folder, EXPORT_FILE, files)
    (folder / EXPORT_FILE).write_text(json.dumps(complete, indent=1), "utf8")


def read_export(folder: Path) -> dict:
    """Read the manifest of an exported folder, and check that its files have not changed.

    Raises
    ------
    InputError
        If it is not an exported folder, or a file in it is damaged, missing or modified.
    """
    manifest = read_manifest(folder, (*EVALUATION_KEYS, *_EXPORT_KEYS, CHECKSUMS), EXPORT_FILE)
    sizes = [manifest["exported_bytes"], manifest["exported_model_bytes"]]
    texts = [manifest["exported_as"], manifest["exported_from"]]
    if not all(type(size) is int for size in sizes) or not all(isinstance(t, str) for t in texts):
        raise InputError(f"{folder / EXPORT_FILE} is damaged; export the model again.")
    for name, sha256 in manifest[CHECKSUMS].items():
        path = resolve_inside(folder, name)
        if name != EXPORT_FILE and (not path.is_file() or cached_sha256(path) != sha256):
            raise InputError(f"{path} was changed or deleted since the export; export it again.")
    return manifest


def unrelated_export_files(folder: Path) -> list[str]:
    """List the names of files in an exported folder that are not part of the export.

    Raises
    ------
    InputError
        If the manifest is damaged.
    """
    own = {EXPORT_FILE, *read_manifest(folder, (CHECKSUMS,), EXPORT_FILE)[CHECKSUMS]}
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_symlink() or not path.is_file() or path.name not in own
    )
