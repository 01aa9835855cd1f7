"""Which model is this? Answered by the content of its files, in one place, without torch.

A model's *fingerprint* is of its weights and config (:func:`lsq_core.model.source.fingerprint`).
What is measured on a text depends on its tokenizer, and on its own Python code where that runs,
so both have a hash of their own here, and a profile is known by all three.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from lsq_core.files import cached_sha256
from lsq_core.model import gguf
from lsq_core.model.info import ModelInfo
from lsq_core.model.source import (
    ModelSource,
    cached_folder,
    check_model_folder,
    fingerprint,
    read_config,
)
from lsq_core.untrusted import MAX_TOKENIZER_BYTES, check_size, read_json_object

#: Names of the files that a tokenizer is loaded from, of any kind that transformers knows.
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.bpe",
)
#: Entries of a tokenizer's JSON files that change no token of a plain text.
_VOLATILE_TOKENIZER_KEYS = (
    "name_or_path",
    "tokenizer_file",
    "special_tokens_map_file",
    "transformers_version",
    "chat_template",
)


@dataclass(frozen=True)
class ModelIdentity:
    """A model by its content.

    ``fingerprint`` is of weights and config and never empty; ``tokenizer`` of the tokenizer's
    files; ``code`` of the model's own Python code, '' where none is trusted to run.
    """

    fingerprint: str
    tokenizer: str
    code: str


def identify(source: ModelSource) -> ModelIdentity | None:
    """The model that a source names, by its content; nothing is fetched.

    A local folder, or a Hugging Face model in the local cache, is known by its files, whatever
    name or revision it was asked for by before. None for one whose files are not here.

    Raises
    ------
    InputError
        When the source names a folder that holds no usable model.
    """
    if source.is_gguf:
        return _gguf_identity(cached_sha256(gguf.find_file(source.name)))
    folder = source.local_folder or cached_folder(source)
    if folder is None:
        return None
    check_model_folder(folder, source)
    return compute_identity(folder, source.trust_remote_code)


def compute_identity(folder: Path, trust_remote_code: bool = False) -> ModelIdentity:
    """The identity of the model in a folder that was checked (:func:`find_model`)."""
    origin = gguf.read_origin(folder)
    if origin is not None:
        return _gguf_identity(origin.sha256)
    code = code_hash(folder) if trust_remote_code else ""
    return ModelIdentity(fingerprint(folder), tokenizer_hash(folder), code)


def _gguf_identity(sha256: str) -> ModelIdentity:
    return ModelIdentity(*gguf.identity_hashes(sha256), code="")


def with_source(info: ModelInfo, source: ModelSource, identity: ModelIdentity) -> ModelInfo:
    """A description of the same weights, under the name and with the tokenizer asked for."""
    return replace(
        info,
        source=source.name,
        revision=source.revision,
        tokenizer=identity.tokenizer,
        code=identity.code,
    )


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that a folder's tokenizer is loaded from, in name order."""
    paths = {path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)}
    return sorted(path for path in paths if path.is_file() and path.name != "config.json")


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 over the files that a folder's tokenizer is loaded from; 64 hexadecimal digits.

    Two folders whose hash is the same give the same tokens; a chat template, which no plain
    text goes through, and the name of the folder make no difference. '' where there are none.
    """
    paths = tokenizer_files(folder)
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + _tokenizer_content(path) + b"\0")
    return digest.hexdigest() if paths else ""


def _tokenizer_content(path: Path) -> bytes:
    """A hash of one file: of a settings file by its entries, of any other by its bytes."""
    check_size(path, MAX_TOKENIZER_BYTES)
    raw = path.read_bytes()
    if path.name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        try:
            content = json.loads(raw)
        except (ValueError, RecursionError):
            content = None  # transformers will say what is wrong with it
        if isinstance(content, dict):
            stable_entries = {k: v for k, v in content.items() if k not in _VOLATILE_TOKENIZER_KEYS}
            raw = json.dumps(stable_entries, sort_keys=True).encode()
    return hashlib.sha256(raw).digest()


def code_hash(folder: Path) -> str:
    """SHA-256 over a model's own Python files; 64 hexadecimal digits, '' where it has none.

    Only files that ``auto_map`` can reach count: those in the folder itself.
    """
    paths = sorted(folder.glob("*.py")) if has_custom_code(folder) else []
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest() if paths else ""


def has_custom_code(folder: Path) -> bool:
    """Whether a model or its tokenizer is built by Python code that comes with it."""
    if "auto_map" in read_config(folder):
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and "auto_map" in read_json_object(path)
