"""Tokenizers in GGUF files: copied from a GGUF file, or written from ``tokenizer.json``.

llama.cpp splits text with its own named regular expressions; only tokenizers that split text in one
of these ways can be written. Source: llama.cpp, ``convert_hf_to_gguf.py`` and ``llama-vocab.cpp``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lsq_core.errors import InputError
from lsq_core.exports.weights.base import OriginalFiles

if TYPE_CHECKING:
    from gguf import GGUFWriter

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: llama.cpp's names of regular expressions that split text before byte-level BPE.
_SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}


def check_tokenizer(files: OriginalFiles) -> None:
    """Raise :class:`InputError` unless the model's tokenizer can be written into a GGUF file."""
    if files.gguf_file is None:
        _pre_tokenizer(files)


def write_tokenizer(writer: GGUFWriter, files: OriginalFiles, tokenizer: object) -> None:
    """Write the vocabulary, its merges and special tokens, and the chat template."""
    if files.gguf_file is not None:
        _copy_tokenizer(writer, files)
        return
    from gguf import SpecialVocab

    content = _tokenizer_content(files)
    tokens, types = zip(*_tokens(content, files.config["vocab_size"]), strict=True)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(files))
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types))
    SpecialVocab(files.folder, load_merges=True, n_vocab=len(tokens)).add_to_gguf(
        writer, quiet=True
    )


def _copy_tokenizer(writer: GGUFWriter, files: OriginalFiles) -> None:
    """Copy all tokenizer entries from the GGUF file that the model came from."""
    from gguf import GGUFReader, GGUFValueType

    for name, field in GGUFReader(files.gguf_file).fields.items():
        if name.startswith("tokenizer."):
            kind, inner = field.types[0], field.types[-1]
            inner = inner if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, inner)


def _tokenizer_content(files: OriginalFiles) -> dict[str, Any]:
    path = files.folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{files.folder} has no tokenizer.json, from which the tokenizer of a GGUF file is "
            "written; save it as lsq."
        )
    return json.loads(path.read_text("utf8"))


def _pre_tokenizer(files: OriginalFiles) -> str:
    """Return llama.cpp's name for how the tokenizer splits text.

    Raises
    ------
    InputError
        If it is not byte-level BPE, or llama.cpp has no name for its splitting.
    """
    content = _tokenizer_content(files)
    model, splitting = content["model"], content.get("pre_tokenizer") or {}
    parts = splitting.get("pretokenizers", [splitting])
    name = None
    if model.get("type") == "BPE" and not model.get("byte_fallback"):
        name = _split_name(parts)
    if name is None:
        kinds = ", ".join(str(part.get("type")) for part in parts)
        raise InputError(
            f"The tokenizer in {files.folder} ({model.get('type')}, split by {kinds}) is none of "
            "those that the export to GGUF knows: byte-level BPE as in GPT-2, SmolLM, Llama 3 or "
            "Qwen 2; save it as lsq."
        )
    return name


def _split_name(parts: list[dict[str, Any]]) -> str | None:
    """Return llama.cpp's name for a pre-tokenizer with these parts; None if it has none."""
    *before, last = parts
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    by_regex = last.get("use_regex", True)
    if not before:
        return "gpt-2" if by_regex else None
    if len(before) > 1:
        return None
    first = before[0]
    if first.get("type") == "Digits" and first.get("individual_digits") and by_regex:
        return "smollm"
    if first.get("type") != "Split" or by_regex:
        return None
    return _SPLITS.get(first.get("pattern", {}).get("Regex"))


def _tokens(content: dict[str, Any], rows: int) -> Iterator[tuple[str, int]]:
    """Yield every token with its type, one for each row of the embeddings."""
    from gguf import TokenType

    by_id = {id: (token, TokenType.NORMAL) for token, id in content["model"]["vocab"].items()}
    for added in content.get("added_tokens", []):
        kind = TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
        by_id[added["id"]] = (added["content"], kind)
    for id in range(rows):
        yield by_id.get(id, (f"[PAD{id}]", TokenType.UNUSED))
