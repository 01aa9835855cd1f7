"""Where this project's own files are, in a checkout of its repository and installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lsq_core.errors import InputError

_PACKAGE = Path(__file__).resolve().parent
#: The folder that ``lsq_core`` is imported from: a checkout's root, or site-packages. Child
#: processes run there, so that they import the same package.
IMPORT_FOLDER = _PACKAGE.parent
#: ``setup.py`` puts into a wheel what the repository has beside the package, in the same layout.
_BUNDLED = _PACKAGE / "bundled"
IN_CHECKOUT = not _BUNDLED.is_dir()
#: The folder with ``app.py``, ``pages/``, ``.streamlit/`` and ``data/demo_model/``.
RESOURCES = IMPORT_FOLDER if IN_CHECKOUT else _BUNDLED


def data_folder() -> Path:
    """The folder for the database, jobs and saved models; it need not exist.

    ``LSQ_HOME`` where that is set, else ``data/`` in a checkout, else the platform's folder for
    the data of applications: ``~/Library/Application Support`` on macOS, otherwise by the XDG
    Base Directory Specification.

    Raises
    ------
    InputError
        When the home directory that a path needs is not known.
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
    # The specification has relative paths ignored.
    folder = Path(os.environ.get("XDG_DATA_HOME", ""))
    return folder if folder.is_absolute() else Path.home() / ".local" / "share"
