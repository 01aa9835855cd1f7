"""Tokenized texts: calibration blocks, and the stream that perplexity is measured on."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lsq_core.corpus.registry import Corpus
from lsq_core.errors import InputError
from lsq_core.untrusted import wrap_library_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """Calibration input: token blocks of equal length.

    ``ids`` is int64 [blocks, block_tokens]; ``sha256`` is computed over its shape and little-endian
    values, so it identifies the model's input, whatever text it came from.
    """

    ids: np.ndarray
    sha256: str
    corpus: str
    source: str


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Evaluation input: one stream of tokens, none of them added by the tokenizer.

    ``ids`` is int64 [tokens]; ``sha256`` as in :class:`TokenBlocks`; ``truncated`` is whether
    ``max_tokens`` cut off the text.
    """

    ids: np.ndarray
    sha256: str
    corpus: str
    source: str
    truncated: bool


# --- Tokens --------------------------------------------------------------------------------


def build_calibration_blocks(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 128,
    max_line_tokens: int = 512,
    block_tokens: int = 512,
    seed: int = 42,
) -> TokenBlocks:
    """Build calibration blocks the way the SensiBoost authors (and AWQ before them) do.

    The texts are shuffled and stripped; empty ones and those with more than ``max_line_tokens``
    tokens are skipped. The first ``samples`` others are concatenated without a separator and cut
    into blocks; the remainder is dropped. No special tokens are added. The permutation is that of
    ``datasets.Dataset.shuffle(seed=seed)`` over all texts, including blank ones.

    Raises
    ------
    InputError
        If a size is below 1 or above 2^31 - 1, or the samples don't fill one block.
    """
    sizes = samples, max_line_tokens, block_tokens
    if not 1 <= min(sizes) <= max(sizes) < 2**31:
        raise InputError(
            "Calibration needs samples, line and block sizes from 1 to 2147483647, not "
            f"{samples}, {max_line_tokens} and {block_tokens}."
        )
    order = np.random.default_rng(seed).permutation(len(corpus.texts))
    lines = (corpus.texts[row].strip() for row in order)
    encoded = (_encode(tokenizer, line, max_line_tokens) for line in lines if line)
    skipped_lines = 0

    def fits(ids: list[int]) -> bool:
        nonlocal skipped_lines
        skipped_lines += len(ids) > max_line_tokens
        return 0 < len(ids) <= max_line_tokens

    fitting = filter(fits, encoded)
    token_ids = list(itertools.chain.from_iterable(itertools.islice(fitting, samples)))
    blocks = len(token_ids) // block_tokens
    if blocks == 0:
        raise InputError(
            f"The corpus '{corpus.name}' gives {len(token_ids)} calibration tokens where one block "
            f"needs {block_tokens}"
            + (
                f": {skipped_lines} of its lines were skipped, each longer than "
                f"{max_line_tokens} tokens; break them into shorter lines"
                if skipped_lines
                else "; use a longer text"
            )
            + " or use smaller blocks."
        )
    ids = np.array(token_ids[: blocks * block_tokens], dtype=np.int64).reshape(blocks, block_tokens)
    return TokenBlocks(ids, _sha256(ids), corpus.name, corpus.source)


def build_token_stream(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None
) -> TokenStream:
    """Tokenize the texts, joined by blank lines, as one stream without special tokens.

    With ``max_tokens``, only as much text is tokenized as needed.

    Raises
    ------
    InputError
        If there are fewer than two tokens, so that none could be predicted.
    """
    if max_tokens is not None and max_tokens < 2:
        raise InputError(f"Evaluation needs at least 2 tokens, not {max_tokens}.")
    ids = _encode(tokenizer, "\n\n".join(corpus.texts), max_tokens)
    if len(ids) < 2:
        raise InputError(
            f"The corpus '{corpus.name}' gives {len(ids)} tokens; evaluation needs 2 or more."
        )
    stream_ids = np.array(ids[:max_tokens], dtype=np.int64)
    return TokenStream(
        stream_ids, _sha256(stream_ids), corpus.name, corpus.source, len(stream_ids) < len(ids)
    )


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: str, min_tokens: int | None = None
) -> list[int]:
    """Return the token ids of a text without special tokens; at least ``min_tokens`` if possible.

    Only a prefix is tokenized, doubled in length until there are enough tokens. The last tokens of
    a prefix may differ from those of the full text, hence a margin of 64 unused tokens.
    """
    chars = len(text) if min_tokens is None else 8 * min_tokens + 1024
    while True:
        with wrap_library_errors(
            lambda reason: f"The model's tokenizer cannot read the text: {reason}."
        ):
            ids = tokenizer(
                text[:chars],
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # it would warn that the text is longer than the model's context
            )["input_ids"]
        if chars >= len(text) or len(ids) > min_tokens + 64:
            return ids
        chars *= 2


def _sha256(ids: np.ndarray) -> str:
    """Return the SHA-256 of an array's shape and values, both as little-endian int64."""
    digest = hashlib.sha256(np.array(ids.shape, dtype="<i8").tobytes())
    digest.update(ids.astype("<i8").tobytes())
    return digest.hexdigest()
