"""Text for calibration and evaluation, and the tokens it becomes; none of this imports torch.

A corpus is named by a person: one of :data:`BUILT_IN`, ``hf:org/name[:config][@revision][#split]``
for any dataset on the Hugging Face Hub, or the path of a UTF-8 text file. Its calibration and
its evaluation part never share a text, except for a local file, which is used as it was given.

Where a dataset has a single split, the two parts are told apart by :func:`is_held_out`, so the
same text lands on the same side on every machine; C4 is the exception: its first 1,100 texts
are the evaluation part, as in GPTQ's and the SensiBoost authors' evaluations.
"""

from __future__ import annotations

import ast
import fnmatch
import hashlib
import itertools
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lsq_core.errors import InputError, LsqError, reason_of
from lsq_core.files import disk_error
from lsq_core.foreign import refusing
from lsq_core.hub import is_network_error

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SPLITS = ("calibration", "evaluation")

#: The corpora known by name, each with a line to show beside it.
BUILT_IN: dict[str, str] = {
    "stdlib": "Docstrings of this Python's standard library; always there, needs no network",
    "wikitext2": "WikiText-2 raw: validation to calibrate, test to evaluate",
    "c4": "C4, first validation shard: 1,100 texts to evaluate, the others to calibrate",
    "pileval": "The Pile's validation set: one text in eight to evaluate, the others to calibrate",
    "bos": "Branch-of-Science: one text in eight to evaluate, the others to calibrate",
}

#: A docstring has to be longer than this many characters to count as text.
MIN_DOCSTRING_CHARS = 200
#: File and folder names that :func:`docstrings_under` passes over unless told otherwise.
SKIPPED_NAMES = ("test*", "site-packages", "dist-packages")

_HUB_TIMEOUT_S = 15.0
_STRINGS = ("string", "large_string")
_HUB_NAME = re.compile(
    r"hf:(?P<path>[\w.-]+/[\w.-]+)(:(?P<config>[^:@#]+))?(@(?P<revision>[^@#]+))?(#(?P<split>[^#]+))?"
)


@dataclass(frozen=True)
class Corpus:
    """The texts of one part of a corpus, and where they come from.

    ``name`` is as the person typed it, ``split`` is ``calibration`` or ``evaluation``, and
    ``source`` says in words what the texts are, with the version or commit where there is one.
    """

    name: str
    split: str
    texts: tuple[str, ...]
    source: str


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """Calibration input: equal blocks of tokens.

    ``ids`` is int64 [blocks, block_tokens]; ``sha256`` is over its shape and its little-endian
    values, so it names what was fed to the model, whatever text it came from.
    """

    ids: np.ndarray
    sha256: str
    corpus: str
    source: str


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Evaluation input: one stream of tokens, none of them added by the tokenizer.

    ``ids`` is int64 [tokens]; ``sha256`` as in :class:`TokenBlocks`; ``truncated`` tells that
    the text went on where ``max_tokens`` ended it.
    """

    ids: np.ndarray
    sha256: str
    corpus: str
    source: str
    truncated: bool


@dataclass(frozen=True)
class _HubDataset:
    """A dataset on the hub; ``splits`` are those to calibrate and to evaluate on, if known."""

    path: str
    config: str | None = None
    revision: str = "main"
    data_file: str | None = None
    splits: tuple[str, str] | None = None
    evaluation_rows: int = 0

    @property
    def url(self) -> str:
        """Its address, which is never taken for a local folder of the same name."""
        return f"hf://datasets/{self.path}"

    @property
    def label(self) -> str:
        """How a sentence about it begins."""
        return f"The dataset '{self.path}'" + (f" ({self.config})" if self.config else "")


_HUB_DATASETS = {
    "wikitext2": _HubDataset(
        "Salesforce/wikitext", "wikitext-2-raw-v1", splits=("validation", "test")
    ),
    "c4": _HubDataset(
        "allenai/c4",
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",  # a copy of this one is found offline
        data_file="en/c4-validation.00000-of-00008.json.gz",
        splits=("validation", "validation"),
        evaluation_rows=1100,
    ),
    "pileval": _HubDataset("mit-han-lab/pile-val-backup", splits=("validation", "validation")),
    "bos": _HubDataset("schnell18/branch-of-science", splits=("train", "train")),
}


# --- Corpora -------------------------------------------------------------------------------


def load_corpus(name: str, split: str, max_texts: int | None = None) -> Corpus:
    """The texts of one part of the corpus that a person named.

    Parameters
    ----------
    name
        One of :data:`BUILT_IN`, ``hf:org/name[:config][@revision][#split]``, or a path. A
        local file's lines are its calibration texts, and the whole of it the evaluation text.
    split
        ``calibration`` or ``evaluation``. For a ``hf:`` dataset without a ``#split``, the first
        of test, validation, train is evaluated and the first other one of validation, train,
        test calibrated on; with one, or where there is only one, its texts are divided.
    max_texts
        Keep the texts up to this many that aren't blank.

    Raises
    ------
    InputError
        For a name that is nothing known, a file that isn't UTF-8 text, a dataset that does not
        exist or may not be read, or one without a text column.
    LsqError
        If a dataset cannot be downloaded.

    Examples
    --------
    >>> load_corpus("stdlib", "evaluation", max_texts=3).source  # doctest: +ELLIPSIS
    'standard library docstrings of Python ..., held out'
    """
    if split not in SPLITS:
        raise InputError(f"There is no part '{split}' of a corpus; ask for {' or '.join(SPLITS)}.")
    if max_texts is not None and max_texts < 1:
        raise InputError(f"A corpus of {max_texts} texts was asked for; ask for 1 or more.")
    if name == "stdlib":
        texts, source = _stdlib(split)
    elif name in _HUB_DATASETS or name.startswith("hf:"):
        texts, source = _from_hub(_HUB_DATASETS.get(name) or _parse_hub_name(name), split)
    else:
        texts, source = _from_file(name, split)
    texts = _first(texts, max_texts)
    if not any(text.strip() for text in texts):
        raise InputError(f"The corpus '{name}' has no text for {split}; choose another one.")
    return Corpus(name, split, tuple(texts), source)


def _first(texts: Sequence[str], count: int | None) -> Sequence[str]:
    """The texts up to and including the ``count``-th that isn't blank."""
    filled = itertools.accumulate(bool(text.strip()) for text in texts)
    end = next((i for i, seen in enumerate(filled, 1) if seen == count), len(texts))
    return texts[:end]


def is_held_out(text: str) -> bool:
    """Whether a text is for evaluation only: its SHA-256 (UTF-8) begins with a byte below 32.

    That is one text in eight, the same ones everywhere, and a copy goes where its original does.
    """
    return hashlib.sha256(text.encode("utf-8")).digest()[0] < 32


def corpus_identity(name: str) -> str:
    """What a corpus is, told without reading it all or asking the network: to find a profile by.

    The hash of the content for a file, and a dataset's name with its commit where one is named,
    mean the same text. The interpreter's version for ``stdlib``, and a dataset's branch such as
    ``main``, need not: there a profile is of the text that was there when it was measured, whose
    commit and hash of tokens are kept with it (``corpus_source``, ``corpus_sha256``), and what is
    measured on another text takes its place (:meth:`lsq_core.store.Store.keep_profile`).

    Raises
    ------
    InputError
        For a name that is nothing known, or a file that isn't UTF-8 text.
    """
    if name == "stdlib":
        return f"stdlib:{platform.python_version()}"
    if name in _HUB_DATASETS or name.startswith("hf:"):
        return f"{name}@{(_HUB_DATASETS.get(name) or _parse_hub_name(name)).revision}"
    return f"sha256:{_read_text(name)[1]}"


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
    texts = tuple(dict.fromkeys(docstrings_under(root)))
    if not texts:
        raise InputError(f"No source of the standard library is in {root}; choose another corpus.")
    return texts


def _stdlib(split: str) -> tuple[list[str], str]:
    held_out = split == "evaluation"
    part = "held out" if held_out else "without those held out"
    source = f"standard library docstrings of Python {platform.python_version()}, {part}"
    return stdlib_docstrings(held_out), source


def docstrings_under(root: Path, skip: Collection[str] = SKIPPED_NAMES) -> Iterator[str]:
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


# --- Local files ---------------------------------------------------------------------------


def _from_file(name: str, split: str) -> tuple[list[str], str]:
    text, digest = _read_text(name)
    source = f"text file {os.path.basename(name)}, SHA-256 {digest[:16]}"
    if split == "evaluation":
        return [text], source
    return [line for line in text.split("\n") if line.strip()], source


def _read_text(name: str) -> tuple[str, str]:
    """The text of the file that a person named, line ends as ``\\n``, and its bytes' SHA-256."""
    path = os.path.expanduser(name)
    if not os.path.isfile(path):  # unlike Path.is_file, no name makes it raise
        if name and os.path.isdir(path):
            raise InputError(f"'{name}' is a folder; give the path of a UTF-8 text file.")
        raise InputError(
            f"There is no corpus and no text file '{name}'; give the path of a UTF-8 text file, "
            f"hf:org/name, or one of {', '.join(BUILT_IN)}."
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


# --- The Hugging Face Hub ------------------------------------------------------------------


def _parse_hub_name(name: str) -> _HubDataset:
    match = _HUB_NAME.fullmatch(name)
    if not match:
        raise InputError(
            f"'{name}' does not name a dataset; write hf:org/name[:config][@revision][#split]."
        )
    split = match["split"]
    return _HubDataset(
        match["path"],
        match["config"],
        match["revision"] or "main",
        splits=(split, split) if split else None,
    )


def _from_hub(dataset: _HubDataset, split: str) -> tuple[list[str], str]:
    """Texts of one part of a dataset, and its commit, configuration and split in words."""
    dataset, commit = _pin(dataset)
    splits = dict(zip(SPLITS, dataset.splits or _choose_splits(dataset), strict=True))
    table = _download(dataset, splits[split])
    texts = [text or "" for text in table[_text_column(dataset, table.features)][:]]
    revision = commit[:12] if commit else f"{dataset.revision} (cached copy)"
    source = [f"{dataset.path}@{revision}", dataset.config, splits[split]]
    if len(set(splits.values())) == 1:
        texts = _divide(texts, split, dataset.evaluation_rows)
        source.append(f"({split} part)")
    return texts, " ".join(filter(None, source))


@contextmanager
def _asking_hub(dataset: _HubDataset) -> Iterator[None]:
    """Tell in a sentence what the hub, the network or the dataset's files failed at.

    It is put around calls of the libraries alone, and what is neither of these passes through: a
    defect of this project is no reason to check the network.
    """
    try:
        yield
    except Exception as cause:
        known = _hub_failure(dataset, cause)
        if known is None:
            raise
        raise known from cause


def _pin(dataset: _HubDataset) -> tuple[_HubDataset, str | None]:
    """The dataset at the commit its revision is at, and that commit; None when offline.

    One short request answers at once what ``load_dataset`` would retry for half a minute. With
    HF_HUB_OFFLINE set nothing is asked, and whatever copy is in the local cache is read.
    """
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        return dataset, None
    with _asking_hub(dataset):
        info = HfApi().dataset_info(dataset.path, revision=dataset.revision, timeout=_HUB_TIMEOUT_S)
    return replace(dataset, revision=info.sha), info.sha


def _choose_splits(dataset: _HubDataset) -> tuple[str, str]:
    """Splits to calibrate and to evaluate on, as :func:`load_corpus` describes."""
    from datasets import get_dataset_split_names

    with _asking_hub(dataset):
        names = get_dataset_split_names(dataset.url, dataset.config, revision=dataset.revision)
    if not names:
        raise InputError(f"{dataset.label} has no parts to read; choose another one.")
    evaluated = next((s for s in ("test", "validation", "train") if s in names), names[0])
    others = (s for s in ("validation", "train", "test") if s in names and s != evaluated)
    return next(others, evaluated), evaluated


def _download(dataset: _HubDataset, split: str) -> Dataset:
    from datasets import load_dataset
    from huggingface_hub import hf_hub_download

    with _asking_hub(dataset):
        if not dataset.data_file:
            return load_dataset(dataset.url, dataset.config, revision=dataset.revision, split=split)
        # load_dataset with data_files= would not find the copy it made when there is no network.
        file = hf_hub_download(
            dataset.path, dataset.data_file, repo_type="dataset", revision=dataset.revision
        )
        return load_dataset("json", data_files={split: file}, split=split)


def _text_column(dataset: _HubDataset, features: Mapping[str, object]) -> str:
    """The column called text or content, or else the only one that holds strings."""
    strings = [name for name, kind in features.items() if getattr(kind, "dtype", "") in _STRINGS]
    for name in ("text", "content"):
        if name in strings:
            return name
    if len(strings) != 1:
        raise InputError(
            f"{dataset.label} has no column called text or content and not just one of strings; "
            f"choose another one: its columns are {', '.join(features)}."
        )
    return strings[0]


def _divide(texts: list[str], split: str, evaluation_rows: int) -> list[str]:
    """The share of one split's texts that calibration or evaluation gets.

    Evaluation gets the first ``evaluation_rows`` texts or, if that is 0, those held out by
    hash. For calibration these are blanked, not removed: blank texts are skipped there, and
    the shuffle stays the permutation of the whole dataset that the authors drew from.
    """
    held_out = [
        row < evaluation_rows if evaluation_rows else is_held_out(text)
        for row, text in enumerate(texts)
    ]
    if split == "evaluation":
        return list(itertools.compress(texts, held_out))
    return ["" if held else text for text, held in zip(texts, held_out, strict=True)]


def _hub_failure(dataset: _HubDataset, cause: Exception) -> LsqError | None:
    """What to tell the person, in one sentence, about an exception while reading a dataset.

    None for one that neither the hub, nor the network, nor the dataset's files gave rise to.
    """
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    reason = reason_of(cause)
    instead = "or use 'stdlib', which needs no network."
    if isinstance(cause, RevisionNotFoundError):
        return InputError(
            f"{dataset.label} has no revision '{dataset.revision}'; check it {instead}"
        )
    if isinstance(cause, (RepositoryNotFoundError, DatasetNotFoundError)):
        return InputError(
            f"{dataset.label} does not exist, or is private or gated: check its name, accept its "
            f"terms on its page and set HF_TOKEN, {instead}"
        )
    if isinstance(cause, ImportError) or "zstd" in reason:
        return InputError(
            f"{dataset.label} needs a package that is not installed ({reason}): install it "
            f"(zstandard, for files that end in .zst), {instead}"
        )
    full = disk_error(cause)
    if full is not None:
        return full
    # What datasets itself lacks, a file say, is an OSError too.
    network = is_network_error(cause) and not isinstance(cause, DatasetsError)
    if (network or isinstance(cause, (DatasetsError, ValueError))) and is_offline_mode():
        return LsqError(
            f"{dataset.label} is not in the local cache and HF_HUB_OFFLINE forbids downloading it: "
            f"unset that, {instead}"
        )
    if isinstance(cause, ValueError) and not network:
        return InputError(f"{dataset.label} has no such part ({reason}): name another, {instead}")
    if network:
        return LsqError(
            f"{dataset.label} could not be downloaded ({type(cause).__name__}: {reason}): check "
            f"the network, set HF_HUB_OFFLINE=1 to use a copy in the local cache, {instead}"
        )
    if isinstance(cause, (DatasetsError, RuntimeError)):  # what its files hold
        told = reason_of(cause.__cause__ or cause)
        return InputError(f"{dataset.label} cannot be read ({told}): choose another one, {instead}")
    return None


# --- Tokens --------------------------------------------------------------------------------


def calibration_blocks(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 128,
    max_line_tokens: int = 512,
    block_tokens: int = 512,
    seed: int = 42,
) -> TokenBlocks:
    """Calibration input as the SensiBoost authors (and AWQ before them) draw it.

    The texts are shuffled and stripped, those empty or of over ``max_line_tokens`` tokens
    passed over, the first ``samples`` others joined without anything between them, and cut into
    blocks; what is left at the end is dropped. No special tokens are added. The permutation is
    that of ``datasets.Dataset.shuffle(seed=seed)`` over all texts, blank ones included.

    Raises
    ------
    InputError
        If a size is below 1, or the samples don't fill one block.
    """
    if min(samples, max_line_tokens, block_tokens) < 1:
        raise InputError("Calibration needs samples, line and block sizes of 1 or more.")
    order = np.random.default_rng(seed).permutation(len(corpus.texts))
    lines = (corpus.texts[row].strip() for row in order)
    encoded = (_encode(tokenizer, line, max_line_tokens) for line in lines if line)
    passed_over = 0

    def fits(ids: list[int]) -> bool:
        nonlocal passed_over
        passed_over += len(ids) > max_line_tokens
        return 0 < len(ids) <= max_line_tokens

    fitting = filter(fits, encoded)
    drawn = list(itertools.chain.from_iterable(itertools.islice(fitting, samples)))
    blocks = len(drawn) // block_tokens
    if blocks == 0:
        raise InputError(
            f"The corpus '{corpus.name}' gives {len(drawn)} calibration tokens where one block "
            f"needs {block_tokens}"
            + (
                f": {passed_over} of its lines were passed over, each longer than "
                f"{max_line_tokens} tokens; break them into shorter lines"
                if passed_over
                else "; use a longer text"
            )
            + " or use smaller blocks."
        )
    ids = np.array(drawn[: blocks * block_tokens], dtype=np.int64).reshape(blocks, block_tokens)
    return TokenBlocks(ids, _sha256(ids), corpus.name, corpus.source)


def token_stream(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None
) -> TokenStream:
    """Evaluation input: the texts joined by a blank line, as one stream without special tokens.

    With ``max_tokens`` only so much of the text is tokenized as that needs.

    Raises
    ------
    InputError
        If there are fewer than two tokens, so that none could be predicted.
    """
    if max_tokens is not None and max_tokens < 2:
        raise InputError(f"Evaluation on {max_tokens} tokens was asked for; it needs 2 or more.")
    ids = _encode(tokenizer, "\n\n".join(corpus.texts), max_tokens)
    if len(ids) < 2:
        raise InputError(
            f"The corpus '{corpus.name}' gives {len(ids)} tokens; evaluation needs 2 or more."
        )
    kept = np.array(ids[:max_tokens], dtype=np.int64)
    return TokenStream(kept, _sha256(kept), corpus.name, corpus.source, len(kept) < len(ids))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, enough: int | None = None) -> list[int]:
    """Token ids of a text without special tokens; more than ``enough``, if it has more.

    Text beyond that is not looked at: a prefix is tokenized, twice as long a one until there
    are tokens enough. Where a text is cut its last tokens may differ from those of the whole
    text, hence a margin of 64 that nobody reads.
    """
    chars = len(text) if enough is None else 8 * enough + 1024
    while True:
        with refusing(lambda reason: f"The model's tokenizer cannot read the text: {reason}."):
            ids = tokenizer(
                text[:chars],
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # it would warn that the text is longer than the model's context
            )["input_ids"]
        if chars >= len(text) or len(ids) > enough + 64:
            return ids
        chars *= 2


def _sha256(ids: np.ndarray) -> str:
    """SHA-256 over an array's shape and values, both as little-endian int64."""
    digest = hashlib.sha256(np.array(ids.shape, dtype="<i8").tobytes())
    digest.update(ids.astype("<i8").tobytes())
    return digest.hexdigest()
