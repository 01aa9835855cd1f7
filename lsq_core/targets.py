"""Check that a result can be written to its target before the work starts."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from lsq_core.errors import InputError


def check_folder_target(folder: Path) -> None:
    """Raise :class:`InputError` unless a model can be saved to this folder without losing data.

    The folder must be new or empty, and its parent writable; the check leaves nothing behind.
    """
    existing_parent = folder
    try:
        if folder.is_dir():
            if any(folder.iterdir()):
                raise InputError(
                    f"{folder} exists and is not empty; choose another folder to save to."
                )
            _check_replaceable(folder)
        elif folder.exists():
            raise InputError(f"{folder} is a file; choose a new folder to save to.")
        existing_parent = next(parent for parent in folder.parents if parent.exists())
        _check_writable(existing_parent)
    except OSError as error:
        raise InputError(_unwritable_message(folder, existing_parent, error)) from error


def check_file_target(path: Path) -> None:
    """Raise :class:`InputError` unless a file can be written under this name."""
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder; give the name of a file in it.")
        _check_writable(path.parent)
    except OSError as error:
        raise InputError(_unwritable_message(path, path.parent, error)) from error


def _check_writable(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".lsq-", dir=folder):
        pass


def _unwritable_message(target: Path, existing_parent: Path, error: OSError) -> str:
    """Return the error as one sentence, with long names truncated."""
    shown = [
        text if len(text) <= 200 else f"{text[:60]}…"
        for text in map(str, (target, existing_parent))
    ]
    return f"{shown[0]} cannot be written ({shown[1]}: {error.strerror or error})."


def _check_replaceable(folder: Path) -> None:
    """Raise unless the user may replace an empty folder, as saving does at the end."""
    user, parent = os.geteuid(), folder.parent.stat()
    sticky = bool(parent.st_mode & stat.S_ISVTX)
    owners = {folder.stat().st_uid, parent.st_uid}
    not_writable = not os.access(folder, os.W_OK, effective_ids=True)
    if user and (not_writable or (sticky and user not in owners)):
        raise InputError(f"{folder} belongs to another user; choose another folder to save to.")
