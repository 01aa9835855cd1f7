"""Text datasets from the Hugging Face hub, pinned to a revision and downloaded once."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lsq_core.corpus.docstrings import is_held_out
from lsq_core.corpus.splits import SPLITS
from lsq_core.errors import InputError, LsqError, exception_reason
from lsq_core.files import translate_disk_error
from lsq_core.hub import is_network_error

if TYPE_CHECKING:
    from datasets import Dataset

#: The types of a text column.
_STRINGS = ("string", "large_string")
_HUB_TIMEOUT_S = 15.0
_HUB_NAME = re.compile(
    r"hf:(?P<path>[\w.-]+/[\w.-]+)(:(?P<config>[^:@#]+))?(@(?P<revision>[^@#]+))?(#(?P<split>[^#]+))?"
)


@dataclass(frozen=True)
class _HubDataset:
    """A dataset on the hub; ``splits`` are those for calibration and evaluation, if known."""

    path: str
    config: str | None = None
    revision: str = "main"
    data_file: str | None = None
    splits: tuple[str, str] | None = None
    evaluation_rows: int = 0

    @property
    def url(self) -> str:
        """Its address, which is never mistaken for a local folder with the same name."""
        return f"hf://datasets/{self.path}"

    @property
    def label(self) -> str:
        """The start of a sentence about the dataset."""
        return f"The dataset '{self.path}'" + (f" ({self.config})" if self.config else "")


HUB_DATASETS = {
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


# --- The Hugging Face Hub ------------------------------------------------------------------


def parse_hub_name(name: str) -> _HubDataset:
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


def load_hub_corpus(dataset: _HubDataset, split: str) -> tuple[list[str], str]:
    """Return one part's texts, and the dataset's commit, configuration and split in words."""
    dataset, commit = _pin_revision(dataset)
    splits = dict(zip(SPLITS, dataset.splits or _choose_splits(dataset), strict=True))
    table = _download(dataset, splits[split])
    texts = [text or "" for text in table[_text_column(dataset, table.features)][:]]
    revision = commit[:12] if commit else f"{dataset.revision} (cached copy)"
    source = [f"{dataset.path}@{revision}", dataset.config, splits[split]]
    if len(set(splits.values())) == 1:
        texts = _split_texts(texts, split, dataset.evaluation_rows)
        source.append(f"({split} part)")
    return texts, " ".join(filter(None, source))


@contextmanager
def _translate_hub_errors(dataset: _HubDataset) -> Iterator[None]:
    """Raise :class:`LsqError` for failures of the hub, the network or the dataset's files.

    Use it only around library calls. Other exceptions pass through: a bug in this project is no
    reason to check the network.
    """
    try:
        yield
    except Exception as cause:
        known = _explain_hub_error(dataset, cause)
        if known is None:
            raise
        raise known from cause


def _pin_revision(dataset: _HubDataset) -> tuple[_HubDataset, str | None]:
    """Return the dataset pinned to its revision's commit, and that commit; None when offline.

    One short request fails quickly where ``load_dataset`` would retry for half a minute. With
    HF_HUB_OFFLINE set, no request is made, and whatever copy is in the local cache is used.
    """
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        return dataset, None
    with _translate_hub_errors(dataset):
        info = HfApi().dataset_info(dataset.path, revision=dataset.revision, timeout=_HUB_TIMEOUT_S)
    return replace(dataset, revision=info.sha), info.sha


def _choose_splits(dataset: _HubDataset) -> tuple[str, str]:
    """Return the splits for calibration and evaluation, as described in :func:`load_corpus`."""
    from datasets import get_dataset_split_names

    with _translate_hub_errors(dataset):
        names = get_dataset_split_names(dataset.url, dataset.config, revision=dataset.revision)
    if not names:
        raise InputError(f"{dataset.label} has no splits; choose another dataset.")
    evaluated = next((s for s in ("test", "validation", "train") if s in names), names[0])
    others = (s for s in ("validation", "train", "test") if s in names and s != evaluated)
    return next(others, evaluated), evaluated


def _download(dataset: _HubDataset, split: str) -> Dataset:
    from datasets import load_dataset
    from huggingface_hub import hf_hub_download

    with _translate_hub_errors(dataset):
        if not dataset.data_file:
            return load_dataset(dataset.url, dataset.config, revision=dataset.revision, split=split)
        # Without a network, load_dataset with data_files= would not find its own cached copy.
        file = hf_hub_download(
            dataset.path, dataset.data_file, repo_type="dataset", revision=dataset.revision
        )
        return load_dataset("json", data_files={split: file}, split=split)


def _text_column(dataset: _HubDataset, features: Mapping[str, object]) -> str:
    """Return the column called text or content, or else the only one that holds strings."""
    strings = [name for name, kind in features.items() if getattr(kind, "dtype", "") in _STRINGS]
    for name in ("text", "content"):
        if name in strings:
            return name
    if len(strings) != 1:
        raise InputError(
            f"{dataset.label} has no column called text or content, and not exactly one column of "
            f"strings; choose another dataset. Its columns are {', '.join(features)}."
        )
    return strings[0]


def _split_texts(texts: list[str], split: str, evaluation_rows: int) -> list[str]:
    """Return the calibration or evaluation part of the texts of a single split.

    Evaluation gets the first ``evaluation_rows`` texts or, if that is 0, those held out by hash.
    For calibration, these are blanked rather than removed: blank texts are skipped there, and the
    shuffle remains the permutation of the full dataset that the authors sampled from.
    """
    held_out = [
        row < evaluation_rows if evaluation_rows else is_held_out(text)
        for row, text in enumerate(texts)
    ]
    if split == "evaluation":
        return list(itertools.compress(texts, held_out))
    return ["" if held else text for text, held in zip(texts, held_out, strict=True)]


def _explain_hub_error(dataset: _HubDataset, cause: Exception) -> LsqError | None:
    """Return an error that explains, in one sentence, an exception raised while reading a dataset.

    None if it was not caused by the hub, the network or the dataset's files.
    """
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    reason = exception_reason(cause)
    stdlib_hint = "or use 'stdlib', which needs no network."
    if isinstance(cause, RevisionNotFoundError):
        return InputError(
            f"{dataset.label} has no revision '{dataset.revision}'; check it {stdlib_hint}"
        )
    if isinstance(cause, (RepositoryNotFoundError, DatasetNotFoundError)):
        return InputError(
            f"{dataset.label} does not exist, or is private or gated: check its name, accept its "
            f"terms on its page and set HF_TOKEN, {stdlib_hint}"
        )
    if isinstance(cause, ImportError) or "zstd" in reason:
        return InputError(
            f"{dataset.label} needs a package that is not installed ({reason}): install it "
            f"(zstandard, for files that end in .zst), {stdlib_hint}"
        )
    disk_failure = translate_disk_error(cause)
    if disk_failure is not None:
        return disk_failure
    # Errors of datasets itself, such as a missing file, can also be OSErrors.
    network = is_network_error(cause) and not isinstance(cause, DatasetsError)
    if (network or isinstance(cause, (DatasetsError, ValueError))) and is_offline_mode():
        return LsqError(
            f"{dataset.label} is not in the local cache and HF_HUB_OFFLINE forbids downloading it: "
            f"unset that, {stdlib_hint}"
        )
    if isinstance(cause, ValueError) and not network:
        return InputError(
            f"{dataset.label} has no such part ({reason}): name another, {stdlib_hint}"
        )
    if network:
        return LsqError(
            f"{dataset.label} could not be downloaded ({type(cause).__name__}: {reason}): check "
            f"the network, set HF_HUB_OFFLINE=1 to use a copy in the local cache, {stdlib_hint}"
        )
    if isinstance(cause, (DatasetsError, RuntimeError)):  # caused by the content of its files
        detail = exception_reason(cause.__cause__ or cause)
        return InputError(
            f"{dataset.label} cannot be read ({detail}): choose another one, {stdlib_hint}"
        )
    return None
