"""Identify a model by the content of its files, without torch.

A model's *fingerprint* covers its weights and config (:func:`lsq_core.model.source.fingerprint`).
Measurements on a text also depend on the tokenizer, and on the model's own Python code if that is
run, so each of these has a hash too, and a profile is identified by all three.
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

#: Names of the files that tokenizers of any kind known to transformers are loaded from.
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
#: Entries of a tokenizer's JSON files that don't affect how plain text is tokenized.
_VOLATILE_TOKENIZER_KEYS = (
    "name_or_path",
    "tokenizer_file",
    "special_tokens_map_file",
    "transformers_version",
    "chat_template",
)


@dataclass(frozen=True)
class ModelIdentity:
    """Hashes that identify a model by its content.

    ``fingerprint`` covers weights and config and is never empty, ``tokenizer`` the tokenizer's
    files, and ``code`` the model's own Python code ('' if none is trusted to run).
    """

    fingerprint: str
    tokenizer: str
    code: str


def identify(source: ModelSource) -> ModelIdentity | None:
    """Return the identity of a source's model without downloading anything.

    It depends only on the files of the local folder or cached Hugging Face model, not on the name
    or revision. None if the files are not available locally.

    Raises
    ------
    InputError
        If the source is a folder without a usable model, or a GGUF file that doesn't exist.
    """
    if source.is_gguf:
        return _gguf_identity(cached_sha256(gguf.find_file(source.name)))
    folder = source.local_folder or cached_folder(source)
    if folder is None:
        return None
    check_model_folder(folder, source)
    return compute_identity(folder, source.trust_remote_code)


def compute_identity(folder: Path, trust_remote_code: bool = False) -> ModelIdentity:
    """Return the identity of the model in a folder already checked by :func:`find_model`."""
    origin = gguf.read_origin(folder)
    if origin is not None:
        return _gguf_identity(origin.sha256)
    code = code_hash(folder) if trust_remote_code else ""
    return ModelIdentity(fingerprint(folder), tokenizer_hash(folder), code)


def _gguf_identity(sha256: str) -> ModelIdentity:
    return ModelIdentity(*gguf.identity_hashes(sha256), code="")


def with_source(info: ModelInfo, source: ModelSource, identity: ModelIdentity) -> ModelInfo:
    """Return a description of the same weights with another source, tokenizer and code."""
    return replace(
        info,
        source=source.name,
        revision=source.revision,
        tokenizer=identity.tokenizer,
        code=identity.code,
    )


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files that a folder's tokenizer is loaded from, in name order."""
    paths = {path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)}
    return sorted(path for path in paths if path.is_file() and path.name != "config.json")


def tokenizer_hash(folder: Path) -> str:
    """Return the SHA-256 of a folder's tokenizer files: 64 hexadecimal digits, '' without any.

    Folders with the same hash give the same tokens. The folder's name and the chat template, which
    doesn't affect plain text, are ignored.
    """
    paths = tokenizer_files(folder)
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + _tokenizer_content(path) + b"\0")
    return digest.hexdigest() if paths else ""


def _tokenizer_content(path: Path) -> bytes:
    """Hash one file: a settings file by its non-volatile entries, any other by its bytes."""
    check_size(path, MAX_TOKENIZER_BYTES)
    raw = path.read_bytes()
    if path.name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        try:
            content = json.loads(raw)
        except (ValueError, RecursionError):
            content = None  # transformers will report what is wrong with it
        if isinstance(content, dict):
            stable_entries = {k: v for k, v in content.items() if k not in _VOLATILE_TOKENIZER_KEYS}
            raw = json.dumps(stable_entries, sort_keys=True).encode()
    return hashlib.sha256(raw).digest()


def code_hash(folder: Path) -> str:
    """Return the SHA-256 of a model's own Python files: 64 hexadecimal digits, '' without any.

    Only files in the folder itself count, since ``auto_map`` can reach no others.
    """
    paths = sorted(folder.glob("*.py")) if has_custom_code(folder) else []
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest() if paths else ""


def has_custom_code(folder: Path) -> bool:
    """Return whether a model or its tokenizer is built by Python code shipped with it."""
    if "auto_map" in read_config(folder):
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and "auto_map" in read_json_object(path)
