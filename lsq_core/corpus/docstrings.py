"""The docstrings of Python's standard library: a text corpus that every machine has."""

from __future__ import annotations

import ast
import fnmatch
import hashlib
import os
import platform
import sysconfig
import warnings
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path

from lsq_core.errors import InputError

#: A docstring has to be longer than this many characters to count as text.
MIN_DOCSTRING_CHARS = 200
#: File and folder names that :func:`iter_docstrings` skips by default.
SKIP_PATTERNS = ("test*", "site-packages", "dist-packages")


def is_held_out(text: str) -> bool:
    """Whether a text is for evaluation only: its SHA-256 (UTF-8) begins with a byte below 32.

    That is one text in eight, the same ones everywhere, and a copy goes where its original does.
    """
    return hashlib.sha256(text.encode("utf-8")).digest()[0] < 32


# --- Docstrings ----------------------------------------------------------------------------


def stdlib_docstrings(held_out: bool) -> list[str]:
    """Docstrings of the running interpreter's standard library, in the order of their files.

    Its tests are left out (names beginning with ``test``), and so is what was installed into
    it. The first call takes seconds, later ones none.

    Raises
    ------
    InputError
        If this interpreter comes without the source of its standard library.
    """
    return [text for text in _all_stdlib_docstrings() if is_held_out(text) == held_out]


@lru_cache(maxsize=1)
def _all_stdlib_docstrings() -> tuple[str, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    texts = tuple(dict.fromkeys(iter_docstrings(root)))
    if not texts:
        raise InputError(f"No source of the standard library is in {root}; choose another corpus.")
    return texts


def stdlib_split(split: str) -> tuple[list[str], str]:
    held_out = split == "evaluation"
    part = "held out" if held_out else "without those held out"
    source = f"standard library docstrings of Python {platform.python_version()}, {part}"
    return stdlib_docstrings(held_out), source


def iter_docstrings(root: Path, skip: Collection[str] = SKIP_PATTERNS) -> Iterator[str]:
    """Long docstrings of all Python files below a folder: files sorted, then in source order.

    Parameters
    ----------
    root
        The folder; its own name and what lies above it are not looked at.
    skip
        Patterns (:mod:`fnmatch`) for names of files and folders to pass over.

    Yields
    ------
    str
        Docstrings of modules, classes and functions of over :data:`MIN_DOCSTRING_CHARS`
        characters after :func:`inspect.cleandoc`; the same one as often as it occurs.
    """
    for path in sorted(_python_files(root, skip), key=lambda path: path.parts):
        yield from _docstrings_of_file(path)


def _python_files(root: Path, skip: Collection[str]) -> Iterator[Path]:
    """Paths of the Python files below ``root``, never entering a folder that is skipped."""

    def wanted(name: str) -> bool:
        return not any(fnmatch.fnmatchcase(name, pattern) for pattern in skip)

    for folder, folders, files in os.walk(root):
        folders[:] = filter(wanted, folders)
        yield from (Path(folder, name) for name in files if name.endswith(".py") and wanted(name))


def _docstrings_of_file(path: Path) -> list[str]:
    # Some files that ship with Python and its packages are no Python on purpose (templates,
    # another version's syntax, a wrong encoding): they have no docstrings to give.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            found = list(_docstrings_in(ast.parse(path.read_bytes())))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    return [text for text in found if len(text) > MIN_DOCSTRING_CHARS and _is_unicode(text)]


def _docstrings_in(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield ast.get_docstring(node) or ""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):  # no definition hides in an expression
            yield from _docstrings_in(child)


def _is_unicode(text: str) -> bool:
    """False for a lone surrogate, which a literal may hold but no encoding can write."""
    return not any("\ud800" <= char <= "\udfff" for char in text)
