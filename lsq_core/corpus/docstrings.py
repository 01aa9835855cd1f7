"""The docstrings of Python's standard library: a text corpus available on every machine."""

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

#: Docstrings must be longer than this many characters to count as text.
MIN_DOCSTRING_CHARS = 200
#: File and folder names that :func:`iter_docstrings` skips by default.
SKIP_PATTERNS = ("test*", "site-packages", "dist-packages")


def is_held_out(text: str) -> bool:
    """Return whether a text is for evaluation only: its SHA-256 (UTF-8) starts with a byte < 32.

    This is one text in eight, the same ones everywhere; duplicates are always in the same part.
    """
    return hashlib.sha256(text.encode("utf-8")).digest()[0] < 32


# --- Docstrings ----------------------------------------------------------------------------


def stdlib_docstrings(held_out: bool) -> list[str]:
    """Return the standard library's docstrings that are held out, or the others, in file order.

    The library is the running interpreter's. Tests (names starting with ``test``) and installed
    packages are skipped. The first call takes seconds, later ones none.

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
    """Yield long docstrings of all Python files below a folder, by sorted file in source order.

    Parameters
    ----------
    root
        The folder; ``skip`` does not apply to its own name or its parents.
    skip
        Patterns (:mod:`fnmatch`) for names of files and folders to skip.

    Yields
    ------
    str
        Docstrings of modules, classes and functions with over :data:`MIN_DOCSTRING_CHARS`
        characters after :func:`inspect.cleandoc`, including duplicates.
    """
    for path in sorted(_python_files(root, skip), key=lambda path: path.parts):
        yield from _docstrings_of_file(path)


def _python_files(root: Path, skip: Collection[str]) -> Iterator[Path]:
    """Yield the paths of Python files below ``root``, never entering skipped folders."""

    def wanted(name: str) -> bool:
        return not any(fnmatch.fnmatchcase(name, pattern) for pattern in skip)

    for folder, folders, files in os.walk(root):
        folders[:] = filter(wanted, folders)
        yield from (Path(folder, name) for name in files if name.endswith(".py") and wanted(name))


def _docstrings_of_file(path: Path) -> list[str]:
    # Some files that ship with Python and its packages are intentionally not valid Python
    # (templates, another version's syntax, a wrong encoding), so they have no docstrings.
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
        if not isinstance(child, ast.expr):  # expressions contain no definitions
            yield from _docstrings_in(child)


def _is_unicode(text: str) -> bool:
    """Return False for a lone surrogate, which a literal may contain but no encoding can write."""
    return not any("\ud800" <= char <= "\udfff" for char in text)
