"""Perplexity by named protocols, distance to full precision, and speed (method §6).

A protocol's windows are laid over a token stream that begins with the tokenizer's
beginning-of-sequence token, where it has one; every later window has that token in the place of
its first. So a window never exceeds the model's context, and each token but the stream's first
is predicted at most once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lsq_core.evaluation.branches import Walk
from lsq_core.evaluation.protocol import EvaluationText
from lsq_core.evaluation.result import EvaluationPair
from lsq_core.evaluation.scoring import Figures, score_batch
from lsq_core.evaluation.text_pass import TextPass, WindowGroup, make_groups
from lsq_core.evaluation.walk_file import WalkFile
from lsq_core.evaluation.walked import WalkedModel, as_walked
from lsq_core.jsontext import json_text
from lsq_core.model.loading import check_token_ids
from lsq_core.progress import Progress, no_progress

#: Tokens of a batch by device: they fit the caches of a CPU, and fill a GPU.
_MAX_BATCH_TOKENS = {"cpu": 2**11, "cuda": 2**15}
#: Tokens of a group by device. Decoding a block's weights once for so many is a small share of
#: running it on them; more would make the first results and the checkpoints later.
_MAX_GROUP_TOKENS = {"cpu": 2**13, "cuda": 2**18}
#: Bytes that a group's hidden states may take on a CPU, and the share of a GPU's free memory.
_MAX_STATES_BYTES, _MAX_STATES_SHARE = 2**30, 0.25


def evaluate_models(
    models: Sequence[nn.Module],
    texts: Sequence[EvaluationText],
    *,
    bos: int | None,
    reference: nn.Module | None = None,
    progress: Progress = no_progress,
    checkpoints: Sequence[Sequence[Path | None]] | None = None,
) -> Iterator[list[EvaluationPair]]:
    """Measure the perplexity of several models, and of a reference, in one pass over the texts.

    The hidden states of a group of windows go through the models block by block
    (:mod:`lsq_core.evaluation.branches`): a block's weights are decoded once for all of them, and
    what models have in common is computed once. The LM head runs on slices of the scored tokens,
    whose logits do not outlive them. Models whose blocks cannot be run one by one run as wholes. A
    window that is the beginning of another one is scored with it.

    Parameters
    ----------
    bos
        The beginning-of-sequence token, or None where the tokenizer has none.
    reference
        The full-precision model to compare the predictions with.
    progress
        Is called with how many passes of a window through a block (or the head) of a model are
        done, of how many, and with the windows and the block.
    checkpoints
        For each text one file per model, or None. The windows scored so far are saved there after
        each group, and windows of an existing file are not scored again; it must be of the same
        models, token stream and protocol. Beside the first model's file there is one of a group's
        hidden states while these take long, from which a killed evaluation goes on.

    Yields
    ------
    A pair for each model and one text: for the first text as soon as it is scored, then for the
    next one. ``seconds`` are what the model alone would need: work that it shares with others
    counts for each of them.

    Raises
    ------
    InputError
        When a text has a token that the models' embedding has no row for.
    LsqError
        When a model's predictions are not finite; names the first module whose output isn't.
    """
    for text in texts:
        check_token_ids(models[0], [int(text.ids.max()), *([] if bos is None else [bos])])
    files = checkpoints or [[None] * len(models)] * len(texts)
    text_passes = [TextPass(text, bos, paths) for text, paths in zip(texts, files, strict=True)]
    compared = reference is not None
    yield from evaluate_walked(
        lambda: as_walked(models, reference), text_passes, compared=compared, progress=progress
    )


def evaluate_walked(
    make_models: Callable[[], tuple[Sequence[WalkedModel], str]],
    text_passes: Sequence[TextPass],
    *,
    compared: bool,
    progress: Progress,
    group_tokens: Mapping[str, int] = _MAX_GROUP_TOKENS,
) -> Iterator[list[EvaluationPair]]:
    """Measure models that are walked; see :func:`evaluate_models`.

    Parameters
    ----------
    make_models
        Returns what :func:`lsq_core.evaluation.walked.as_walked` does; it is called if any window
        has to be scored.
    compared
        Whether the first model is the reference.
    group_tokens
        The most tokens of a group by device.
    """
    unfinished = list(text_passes)
    for _ in _score_pending(make_models, text_passes, compared, progress, group_tokens):
        while unfinished and unfinished[0].is_complete:
            yield unfinished.pop(0).finish(compared)


def _score_pending(
    make_models: Callable[[], tuple[Sequence[WalkedModel], str]],
    text_passes: Sequence[TextPass],
    compared: bool,
    progress: Progress,
    group_tokens: Mapping[str, int],
) -> Iterator[None]:
    """Score the windows that no checkpoint contains; yields before the first and after each group.

    Each group is checkpointed before the next one is scored.
    """
    total = sum(len(text_pass.windows) for text_pass in text_passes)
    pending = sum(len(own.passes[number]) for own in text_passes for number in own.pending)
    walked, reason = make_models() if pending else ([], "")
    steps = len(walked) * (walked[0].layers + 1) if pending else 1
    report = _WalkProgress(progress, total * steps, (total - pending) * steps)
    for file in (file for text_pass in text_passes for file in text_pass.files):
        if file.damage:
            report(0, f"{file.damage} Its windows are scored again.")
    report(0, f"{total - pending} of {total} windows are scored")
    if reason:
        report(0, f"the models run as wholes, since {reason}")
    yield
    for text_pass in text_passes if pending else ():
        for group in _groups(text_pass, walked, group_tokens):
            _score_group(walked, compared, group, report)
            yield


@dataclass(eq=False)
class _WalkProgress:
    """Reports passes of one window through one block, or the head, of one model."""

    progress: Progress
    total: int
    done: int

    def __call__(self, steps: int, message: str) -> None:
        self.done += steps
        self.progress(self.done, self.total, message)


def _groups(
    text_pass: TextPass, models: Sequence[WalkedModel], group_tokens: Mapping[str, int]
) -> list[WindowGroup]:
    """Groups of a text's pending passes whose hidden states fit the device."""
    model = models[0].model
    device, dtype = models[0].device, next(model.parameters()).dtype
    width = model.get_input_embeddings().weight.shape[1]
    width = max(width, getattr(model.config.get_text_config(), "hidden_size", width))
    room = _MAX_STATES_BYTES
    if device.type == "cuda":
        room = int(_MAX_STATES_SHARE * torch.cuda.mem_get_info(device)[0])
    fit = room // (len(models) * width * dtype.itemsize)
    most = min(fit, group_tokens[device.type])
    return make_groups(text_pass, most, _MAX_BATCH_TOKENS[device.type])


@torch.inference_mode()
def _score_group(
    models: Sequence[WalkedModel], compared: bool, group: WindowGroup, report: _WalkProgress
) -> None:
    """Walk a group of windows, record the figures of each model, and checkpoint them."""
    where = ""

    def advanced(batch: int, count: int) -> None:
        report(count * group.count_windows(batch), f"{group.title}, {where}")

    walk = Walk(models, group.ids(models[0].device), advanced)
    file = _walk_file(walk, compared, group)
    unused = file.restore(walk)
    if unused:
        report(0, f"{unused} Its windows are walked from the start.")
    report(walk.layer * len(models) * len(group.windows), group.title)
    while walk.layer < walk.layers:
        where = f"block {walk.layer + 1} of {walk.layers}"
        walk.advance()
        file.save(walk)
    where = "LM head" if walk.layers else "whole model"
    figures = []
    with walk.heads():
        for number, batch in enumerate(group.batches):
            _, scored = group.text_pass.shape(batch[0])
            figures.append(score_batch(walk, number, scored, compared))
    _record(walk, compared, group, figures)
    group.text_pass.save()
    file.remove()


def _walk_file(walk: Walk, compared: bool, group: WindowGroup) -> WalkFile:
    """The file of a group's hidden states, where every model has a checkpoint."""
    paths = [file.path for file in group.text_pass.files]
    if None in paths:
        return WalkFile(None, "")
    made_of = [[path.name for path in paths], compared, walk.layers, group.batches]
    identity = hashlib.sha256(json_text(made_of).encode()).hexdigest()
    return WalkFile(paths[0].with_name(f"walk-{paths[0].stem}.safetensors"), identity)


def _record(
    walk: Walk, compared: bool, group: WindowGroup, figures: Sequence[Sequence[Figures]]
) -> None:
    """Record the figures of each batch and model; a group's time is spread over its tokens."""
    seconds = walk.seconds / group.scored
    for batch, found in zip(group.batches, figures, strict=True):
        for row, number in enumerate(batch):
            for model, (own, other) in enumerate(group.text_pass.model_totals):
                for totals, member in [(own, model + compared), (other, 0)][: 1 + compared]:
                    rows = {name: values[row] for name, values in found[member].items()}
                    rows["seconds"] = np.full(len(rows["nll"]), seconds[member])
                    group.text_pass.record(number, totals, rows)
                    totals.record_working_bytes(walk.working_bytes[member])
