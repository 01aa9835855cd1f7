"""Text for calibration and evaluation. Needs no torch.

A corpus is given by name: one of :data:`BUILT_IN_CORPORA`,
``hf:org/name[:config][@revision][#split]`` for any dataset on the Hugging Face Hub, or the path of
a UTF-8 text file. Its calibration and evaluation parts never share a text, except for a local file,
which is used as given.

If a dataset has a single split, the two parts are separated by :func:`is_held_out`, so a text is in
the same part on every machine. C4 is the exception: its first 1,100 texts are the evaluation part,
as in GPTQ's and the SensiBoost authors' evaluations.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lsq_core.corpus.docstrings import stdlib_split
from lsq_core.corpus.hub import HUB_DATASETS, load_hub_corpus, parse_hub_name
from lsq_core.corpus.splits import SPLITS
from lsq_core.errors import InputError

#: The built-in corpora, each with a one-line description.
BUILT_IN_CORPORA: dict[str, str] = {
    "stdlib": "Docstrings of this Python's standard library; always available, no network needed",
    "wikitext2": "WikiText-2 raw: validation to calibrate, test to evaluate",
    "c4": "C4, first validation shard: 1,100 texts to evaluate, the others to calibrate",
    "pileval": "The Pile's validation set: one text in eight to evaluate, the others to calibrate",
    "bos": "Branch-of-Science: one text in eight to evaluate, the others to calibrate",
}


@dataclass(frozen=True)
class Corpus:
    """The texts of one part of a corpus, and where they come from.

    ``name`` is as the user typed it, ``split`` is ``calibration`` or ``evaluation``, and ``source``
    describes the texts in words, with the version or commit if there is one.
    """

    name: str
    split: str
    texts: tuple[str, ...]
    source: str


# --- Corpora -------------------------------------------------------------------------------


def load_corpus(name: str, split: str, max_texts: int | None = None) -> Corpus:
    """Load the texts of one part of a corpus.

    Parameters
    ----------
    name
        One of :data:`BUILT_IN_CORPORA`, ``hf:org/name[:config][@revision][#split]``, or a path. A
        local file's lines are its calibration texts, and the entire file is its evaluation text.
    split
        ``calibration`` or ``evaluation``. For a ``hf:`` dataset without ``#split``, the first
        existing split of test, validation, train is for evaluation and the first other one of
        validation, train, test for calibration; with ``#split``, or if there is only one split, its
        texts are divided.
    max_texts
        Keep texts until this many of them are not blank.

    Raises
    ------
    InputError
        If the name is unknown, a file is not UTF-8 text, or a dataset does not exist, is not
        accessible or has no text column.
    LsqError
        If a dataset cannot be downloaded.

    Examples
    --------
    >>> load_corpus("stdlib", "evaluation", max_texts=3).source  # doctest: +ELLIPSIS
    'standard library docstrings of Python ..., held out'
    """
    if split not in SPLITS:
        raise InputError(f"A corpus has no split '{split}'; choose {' or '.join(SPLITS)}.")
    if max_texts is not None and max_texts < 1:
        raise InputError(f"A corpus needs 1 or more texts, not {max_texts}.")
    if name == "stdlib":
        texts, source = stdlib_split(split)
    elif name in HUB_DATASETS or name.startswith("hf:"):
        texts, source = load_hub_corpus(HUB_DATASETS.get(name) or parse_hub_name(name), split)
    else:
        texts, source = _load_from_file(name, split)
    texts = _take_texts(texts, max_texts)
    if not any(text.strip() for text in texts):
        raise InputError(f"The corpus '{name}' has no text for {split}; choose another corpus.")
    return Corpus(name, split, tuple(texts), source)


def _take_texts(texts: Sequence[str], count: int | None) -> Sequence[str]:
    """Return the texts up to and including the ``count``-th non-blank one."""
    filled = itertools.accumulate(bool(text.strip()) for text in texts)
    end = next((i for i, seen in enumerate(filled, 1) if seen == count), len(texts))
    return texts[:end]


def corpus_identity(name: str) -> str:
    """Return the identity of a corpus, which is part of a profile's key, without using the network.

    A file's content hash, or a dataset's name with an explicit commit, always denotes the same
    text. The interpreter's version for ``stdlib``, or a dataset's branch such as ``main``, need
    not: there, a profile is for the text at the time it was measured, whose commit and token hash
    are stored with it (``corpus_source``, ``corpus_sha256``), and measurements on a different text
    replace it (:meth:`lsq_core.store.store.Store.merge_profile`).

    Raises
    ------
    InputError
        If the name is unknown, or a file is not UTF-8 text.
    """
    if name == "stdlib":
        return f"stdlib:{platform.python_version()}"
    if name in HUB_DATASETS or name.startswith("hf:"):
        return f"{name}@{(HUB_DATASETS.get(name) or parse_hub_name(name)).revision}"
    return f"sha256:{_read_text(name)[1]}"


# --- Local files ---------------------------------------------------------------------------


def _load_from_file(name: str, split: str) -> tuple[list[str], str]:
    text, digest = _read_text(name)
    source = f"text file {os.path.basename(name)}, SHA-256 {digest[:16]}"
    if split == "evaluation":
        return [text], source
    return [line for line in text.split("\n") if line.strip()], source


def _read_text(name: str) -> tuple[str, str]:
    """Return the text of a file, with line ends as ``\\n``, and the SHA-256 of its bytes."""
    path = os.path.expanduser(name)
    if not os.path.isfile(path):  # unlike Path.is_file, it never raises
        if name and os.path.isdir(path):
            raise InputError(f"'{name}' is a folder; give the path of a UTF-8 text file.")
        raise InputError(
            f"There is no corpus or text file '{name}'; give the path of a UTF-8 text file, "
            f"hf:org/name, or one of {', '.join(BUILT_IN_CORPORA)}."
        )
    try:
        raw = Path(path).read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as cause:
        raise InputError(f"The file '{name}' cannot be read: {cause.strerror}.") from cause
    except UnicodeDecodeError as cause:
        raise InputError(f"The file '{name}' is not UTF-8 text; save it as UTF-8.") from cause
    if "\0" in text:
        raise InputError(f"The file '{name}' is binary; give a UTF-8 text file.")
    if not text.strip():
        raise InputError(f"The file '{name}' is empty; give one that has text in it.")
    return text.replace("\r\n", "\n"), hashlib.sha256(raw).hexdigest()
