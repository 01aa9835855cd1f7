"""Perplexity by named protocols, divergence from full precision, and speed (method §6).

A protocol's windows cover a token stream that starts with the tokenizer's beginning-of-sequence
token, if it has one; in every later window, that token replaces the first. So a window never
exceeds the model's context, and each token except the stream's first is predicted at most once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lsq_core.evaluation.branches import Walk
from lsq_core.evaluation.protocol import EvaluationText
from lsq_core.evaluation.reference_states import ReferenceStates
from lsq_core.evaluation.result import EvaluationPair
from lsq_core.evaluation.scoring import Figures, read_figures, score_batch
from lsq_core.evaluation.text_pass import TextPass, WindowGroup, make_groups
from lsq_core.evaluation.walk_file import WalkFile
from lsq_core.evaluation.walked import WalkedModel, as_walked
from lsq_core.jsontext import json_text
from lsq_core.model.loading import check_token_ids, free_bytes
from lsq_core.progress import Progress, no_progress

#: Tokens of a batch by device: few enough for a CPU's caches, and enough to keep a GPU busy.
_MAX_BATCH_TOKENS = {"cpu": 2**11, "cuda": 2**15}
#: Tokens of a group by device. Decoding a block's weights once for that many takes little time
#: compared with running it on them; larger groups would delay the first results and checkpoints.
_MAX_GROUP_TOKENS = {"cpu": 2**13, "cuda": 2**18}
#: Limits on a group's hidden states: bytes on a CPU, and share of any device's free memory.
_MAX_STATES_BYTES, _MAX_STATES_SHARE = 2**30, 0.25


def evaluate_models(
    models: Sequence[nn.Module],
    texts: Sequence[EvaluationText],
    *,
    bos: int | None,
    reference: nn.Module | None = None,
    progress: Progress = no_progress,
    checkpoints: Sequence[Sequence[Path | None]] | None = None,
    kept: Sequence[ReferenceStates] | None = None,
) -> Iterator[list[EvaluationPair]]:
    """Measure the perplexity of several models, and of a reference, in one pass over the texts.

    The hidden states of a group of windows go through the models block by block
    (:mod:`lsq_core.evaluation.branches`): a block's weights are decoded once for the group, and
    work common to several models is done once. The LM head runs on slices of the scored tokens,
    and only one slice's logits are in memory at a time. Models whose blocks cannot be run one by
    one run as a whole. A window that is a prefix of another is scored with it.

    Parameters
    ----------
    bos
        The beginning-of-sequence token, or None if the tokenizer has none.
    reference
        The full-precision model to compare the predictions with.
    progress
        Called with the numbers of completed and total steps (one window through one block, or the
        head, of one model), and a message naming the windows and block.
    checkpoints
        For each text one file per model, or None. The windows scored so far are saved there after
        each group, and windows in an existing file are not scored again; it must belong to the same
        models, token stream and protocol. For groups that take long, a second file beside the first
        model's stores their hidden states, from which a killed evaluation resumes.
    kept
        For each text, the store of the full-precision model's final hidden states, or None. The
        model is the reference, which is not run if its states are stored, or, without a reference,
        the only model.

    Yields
    ------
    The pairs of all models for one text, text by text, as soon as each is scored. ``seconds`` is
    the time that the model alone would need: work shared with others counts in full for each.

    Raises
    ------
    InputError
        If a text has a token without a row in the models' embedding.
    LsqError
        If a model's predictions are not finite; names the first module whose output isn't.
    """
    text_passes = make_text_passes(models[0], len(models), texts, bos, checkpoints, kept)
    compared = reference is not None
    yield from evaluate_walked(
        lambda: as_walked(models, reference), text_passes, compared=compared, progress=progress
    )


def make_text_passes(
    model: nn.Module,
    count: int,
    texts: Sequence[EvaluationText],
    bos: int | None,
    checkpoints: Sequence[Sequence[Path | None]] | None,
    kept: Sequence[ReferenceStates] | None,
) -> list[TextPass]:
    """Return a pass over each text for ``count`` copies of ``model``, restored from checkpoints.

    Raises
    ------
    InputError
        If a text has a token without a row in the model's embedding.
    """
    for text in texts:
        check_token_ids(model, [int(text.ids.max()), *([] if bos is None else [bos])])
    files = checkpoints or [[None] * count] * len(texts)
    parts = zip(texts, files, kept or [None] * len(texts), strict=True)
    return [TextPass(text, bos, paths, states) for text, paths, states in parts]


def evaluate_walked(
    make_models: Callable[[], tuple[Sequence[WalkedModel], str]],
    text_passes: Sequence[TextPass],
    *,
    compared: bool,
    progress: Progress,
) -> Iterator[list[EvaluationPair]]:
    """Evaluate walked models; see :func:`evaluate_models`.

    Parameters
    ----------
    make_models
        Returns the same as :func:`lsq_core.evaluation.walked.as_walked`; called only if any window
        has to be scored.
    compared
        Whether the first model is the reference.
    """
    unfinished = list(text_passes)
    for _ in _score_pending(make_models, text_passes, compared, progress):
        while unfinished and unfinished[0].is_complete:
            yield unfinished.pop(0).finish(compared)


def _score_pending(
    make_models: Callable[[], tuple[Sequence[WalkedModel], str]],
    text_passes: Sequence[TextPass],
    compared: bool,
    progress: Progress,
) -> Iterator[None]:
    """Score windows missing from the checkpoints; yield before the first group and after each.

    Each group is checkpointed before the next one is scored.
    """
    total = sum(len(text_pass.windows) for text_pass in text_passes)
    pending = [sum(len(own.passes[number]) for number in own.pending) for own in text_passes]
    walked, reason = make_models() if any(pending) else ([], "")
    first = [_first_walked(own, compared, walked) for own in text_passes]
    steps = [_count_steps(walked, number) for number in first]
    counts = [len(text_pass.windows) for text_pass in text_passes]
    done = [all - left for all, left in zip(counts, pending, strict=True)]
    report = _WalkProgress(progress, int(np.dot(counts, steps)), int(np.dot(done, steps)))
    for file in (file for text_pass in text_passes for file in text_pass.files):
        if file.damage:
            report(0, f"{file.damage} Its windows are scored again.")
    report(0, f"{sum(done)} of {total} windows are scored")
    if reason:
        report(0, f"the models run unsplit, because {reason}")
    yield
    for text_pass, number in zip(text_passes, first, strict=True) if any(pending) else ():
        groups = _groups(text_pass, walked)
        if len(groups) > 1 and _have_costly_blocks(walked):
            report(
                0,
                f"hidden states need {len(groups)} groups of windows, so all weights are read and "
                f"quantized {len(groups)} times",
            )
        for group in groups:
            _score_group(walked, number, compared, group, report)
            yield


def _first_walked(text_pass: TextPass, compared: bool, models: Sequence[WalkedModel]) -> int:
    """Return the first model to walk: 1 if the reference's states are stored, else 0."""
    if text_pass.kept is None or not models or not models[0].layers:
        return 0
    return int(text_pass.kept.covers(text_pass) and compared)


def _count_steps(models: Sequence[WalkedModel], first: int) -> int:
    """Count the steps per window: blocks of the models from ``first`` on, and all models' heads."""
    return (len(models) - first) * models[0].layers + len(models) if models else 1


@dataclass(eq=False)
class _WalkProgress:
    """Reports steps: one window through one block, or the head, of one model."""

    progress: Progress
    total: int
    done: int

    def __call__(self, steps: int, message: str) -> None:
        self.done += steps
        self.progress(self.done, self.total, message)


def _have_costly_blocks(models: Sequence[WalkedModel]) -> bool:
    return any(model.costly_blocks for model in models)


def _groups(text_pass: TextPass, models: Sequence[WalkedModel]) -> list[WindowGroup]:
    """Group a text's pending passes so that each group's hidden states fit the device.

    If blocks are read or quantized again for each group, only memory limits the groups.
    """
    model = models[0].model
    device, dtype = models[0].device, next(model.parameters()).dtype
    width = model.get_input_embeddings().weight.shape[1]
    width = max(width, getattr(model.config.get_text_config(), "hidden_size", width))
    room = int(_MAX_STATES_SHARE * free_bytes(device))
    if device.type == "cpu":
        room = min(room, _MAX_STATES_BYTES)
    most = room // (len(models) * width * dtype.itemsize)
    if not _have_costly_blocks(models):
        most = min(most, _MAX_GROUP_TOKENS[device.type])
    batch_tokens = text_pass.batch_tokens or _MAX_BATCH_TOKENS[device.type]
    return make_groups(text_pass, most, batch_tokens)


@torch.inference_mode()
def _score_group(
    models: Sequence[WalkedModel],
    first: int,
    compared: bool,
    group: WindowGroup,
    report: _WalkProgress,
) -> None:
    """Walk a group of windows, record each model's figures, and checkpoint them.

    Models before the ``first`` one (the reference, if its states are stored) aren't walked.
    """
    where = ""

    def advanced(batch: int, count: int) -> None:
        report(count * group.count_windows(batch), f"{group.title}, {where}")

    walk = Walk(models, group.ids(models[0].device), advanced, first)
    file = _walk_file(walk, compared, group)
    unused = file.restore(walk)
    if unused:
        report(0, f"{unused} Its windows are walked from the start.")
    report(walk.layer * len(walk.members) * len(group.windows), group.title)
    while walk.layer < walk.layers:
        where = f"block {walk.layer + 1} of {walk.layers}"
        walk.advance()
        file.save(walk)
    _reuse_or_keep(walk, group, report)
    where = "LM head" if walk.layers else "whole model"
    with walk.heads():
        figures = [
            score_batch(walk, number, group.text_pass.shape(batch[0])[1], compared)
            for number, batch in enumerate(group.batches)
        ]
        read = [read_figures(walk, number, own) for number, own in enumerate(figures)]
    _record(walk, compared, group, read)
    group.text_pass.save()
    file.remove()


def _reuse_or_keep(walk: Walk, group: WindowGroup, report: _WalkProgress) -> None:
    """Load the reference's stored final states, or store those of this walk."""
    kept = group.text_pass.kept
    if kept is None or not walk.layers:
        return
    if walk.members[0] == 0:
        # The first branch contains the first model: the reference, or the only model.
        failure = kept.save(group, walk.branches[0].hidden, walk.seconds[0])
        if failure:
            report(0, failure)
        return
    hidden, seconds = kept.load(group, walk.batches[0].device)
    group.text_pass.reused_seconds += seconds
    walk.add_states(0, hidden, seconds)


def _walk_file(walk: Walk, compared: bool, group: WindowGroup) -> WalkFile:
    """Return the file for a group's hidden states, with a path if all models have checkpoints."""
    paths = [file.path for file in group.text_pass.files]
    if None in paths:
        return WalkFile(None, "")
    made_of = [[path.name for path in paths], compared, walk.layers, group.batches]
    made_of += [walk.members[0]] if walk.members[0] else []
    identity = hashlib.sha256(json_text(made_of).encode()).hexdigest()
    return WalkFile(paths[0].with_name(f"walk-{paths[0].stem}.safetensors"), identity)


def _record(
    walk: Walk, compared: bool, group: WindowGroup, figures: Sequence[Sequence[Figures]]
) -> None:
    """Record each batch's and model's figures, spreading the group's time over its tokens."""
    seconds = walk.seconds / group.scored
    for batch, found in zip(group.batches, figures, strict=True):
        for row, number in enumerate(batch):
            for model, (own, other) in enumerate(group.text_pass.model_totals):
                for totals, member in [(own, model + compared), (other, 0)][: 1 + compared]:
                    rows = {name: values[row] for name, values in found[member].items()}
                    rows["seconds"] = np.full(len(rows["nll"]), seconds[member])
                    group.text_pass.record(number, totals, rows)
                    totals.record_working_bytes(walk.working_bytes[member])
