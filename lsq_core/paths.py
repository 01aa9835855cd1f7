"""Locations of this project's own files, in a checkout of its repository or installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lsq_core.errors import InputError

_PACKAGE = Path(__file__).resolve().parent
#: The folder that ``lsq_core`` is imported from: a checkout's root, or site-packages. Child
#: processes run there, so that they import the same package.
IMPORT_FOLDER = _PACKAGE.parent
#: Files next to the package in the repository, which ``setup.py`` copies here in a wheel, in the
#: same layout.
_BUNDLED = _PACKAGE / "bundled"
IN_CHECKOUT = not _BUNDLED.is_dir()
#: The folder with ``app.py``, ``pages/``, ``.streamlit/`` and ``data/demo_model/``.
RESOURCES = IMPORT_FOLDER if IN_CHECKOUT else _BUNDLED


def data_folder() -> Path:
    """Return the folder for the database, jobs and saved models; it may not exist yet.

    It is ``LSQ_HOME`` if set, ``data/`` in a checkout, or else ``lsq-explorer`` in the platform's
    folder for application data: ``~/Library/Application Support`` on macOS, otherwise according to
    the XDG Base Directory Specification.

    Raises
    ------
    InputError
        If the path needs a home directory that is not known.
    """
    chosen = os.environ.get("LSQ_HOME")
    if not chosen and IN_CHECKOUT:
        return IMPORT_FOLDER / "data"
    try:
        return Path(chosen).expanduser().resolve() if chosen else _user_data() / "lsq-explorer"
    except RuntimeError as error:
        raise InputError(
            "The data folder is not known, because there is no home directory; set LSQ_HOME to "
            "the path of a folder."
        ) from error


def _user_data() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    # The specification says to ignore relative paths.
    folder = Path(os.environ.get("XDG_DATA_HOME", ""))
    return folder if folder.is_absolute() else Path.home() / ".local" / "share"
