"""Calibration text, tokenized for a model."""

from __future__ import annotations

from lsq_core.corpus.registry import load_corpus
from lsq_core.corpus.tokens import TokenBlocks, build_calibration_blocks
from lsq_core.model.loading import LoadedModel, check_token_ids
from lsq_core.settings import CalibrationSettings


def load_calibration(loaded: LoadedModel, text: CalibrationSettings) -> TokenBlocks:
    """Load the calibration blocks, each no longer than the model's context.

    Raises
    ------
    InputError
        If the corpus does not exist or is too short, or a token has no row in the embedding.
    """
    corpus = load_corpus(text.corpus, "calibration")
    blocks = build_calibration_blocks(
        corpus,
        loaded.tokenizer,
        samples=text.samples,
        max_line_tokens=512,
        block_tokens=min(text.block_tokens, loaded.info.context),
        seed=text.seed,
    )
    check_token_ids(loaded.model, [int(blocks.ids.max())])
    return blocks
