"""Load row scores and interactions for mixed-row plans, or measure and save them."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lsq_core.bits import PAPER
from lsq_core.errors import InputError, translate_resource_errors
from lsq_core.model.info import ModelInfo
from lsq_core.planning.methods import get_planner
from lsq_core.planning.methods.high_impact import build_impact
from lsq_core.planning.problem import Impact, Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.progress import timed
from lsq_core.provenance import (
    machine,
    versions,
)
from lsq_core.stages.model import OpenModel
from lsq_core.stages.profile import model_profile_key
from lsq_core.store.profiles import InteractionKey
from lsq_core.store.store import Store

if TYPE_CHECKING:
    from torch import Tensor


def interaction_key(request: PlanRequest) -> InteractionKey:
    """Return the key of the interactions that a request uses."""
    return InteractionKey(request.loss, request.low_bits, request.high_bits, request.group_size)


def load_impact(info: ModelInfo, store: Store, key: str, request: PlanRequest) -> Impact | None:
    """Load a profile's row scores and interactions for a request; None without row scores."""
    scores = store.row_scores(key)
    if not scores:
        return None
    return build_impact(info.matrices, scores, store.interactions(key, interaction_key(request)))


@timed("profile")
def row_impact(model: OpenModel, request: PlanRequest, settings: ProfileSettings) -> Impact:
    """Return row scores and a request's interactions, loaded or else measured and saved.

    Each block is saved as soon as it is measured, so that an interrupted measurement resumes there.

    Raises
    ------
    InputError, LsqError
        As :func:`lsq_core.stages.profile.profile_model`; or if groups don't fill the rows of some
        matrix, or the model is a published one.
    """
    if model.published:
        raise InputError(
            f"{model.published.source} was published without the gradients of its weights, so "
            "high-impact rows cannot be planned for it."
        )
    settings = replace(settings, ladder=PAPER)  # rows don't depend on it; stored once
    options = get_planner(request.method).options(request)
    Problem(model.info.matrices).with_options(options).check_options()
    key = model_profile_key(model, settings)
    scores = model.store.row_scores(key) or _measure_row_scores(model, settings, key)
    if request.ratios == "uniform":
        kept = model.store.interactions(key, interaction_key(request))
        return build_impact(model.info.matrices, scores, kept)
    _measure_interactions(model, request, settings, key, scores)
    return load_impact(model.info, model.store, key, request)


def _load_calibration(
    model: OpenModel, settings: ProfileSettings, loss: str | None = None
) -> tuple[Tensor, dict]:
    """Load calibration tokens (sequences, tokens), fewer if for a loss, and their provenance."""
    import torch

    from lsq_core.profiling.calibration import load_calibration
    from lsq_core.profiling.interactions import limit_tokens

    blocks = load_calibration(model.loaded, settings.text)
    ids = torch.from_numpy(blocks.ids).to(model.loaded.device)
    ids = ids if loss is None else limit_tokens(ids, loss)
    details = {
        "corpus": blocks.corpus,
        "corpus_source": blocks.source,
        "corpus_sha256": blocks.sha256,
        "tokens": ids.numel(),
        "settings": settings.to_json(),
        "fingerprint": model.info.fingerprint,
        "device": model.loaded.device,
        "machine": machine(model.loaded.device),
        "dtype": model.loaded.dtype,
        "versions": versions(),
    }
    return ids, details


def _measure_row_scores(
    model: OpenModel, settings: ProfileSettings, key: str
) -> dict[str, np.ndarray]:
    from lsq_core.profiling.rows import measure_row_scores

    start_time = time.perf_counter()
    loaded, folder = model.loaded, model.checkpoint_folder
    ids, details = _load_calibration(model, settings)
    with translate_resource_errors(loaded.device):
        scores = measure_row_scores(
            loaded,
            ids,
            lambda done, total, message: model.report("rows", done, total, message),
            None if folder is None else folder / f"row-scores-{key}.npz",
        )
    model.store.save_row_scores(
        key, scores, details | {"seconds": time.perf_counter() - start_time}
    )
    return scores


def _measure_interactions(
    model: OpenModel,
    request: PlanRequest,
    settings: ProfileSettings,
    key: str,
    scores: dict[str, np.ndarray],
) -> None:
    kind = interaction_key(request)
    known = model.store.interactions(key, kind)
    if len(known) == len({matrix.layer for matrix in model.info.matrices}):
        return
    from lsq_core.profiling.interactions import measure_interactions

    loaded = model.loaded
    ids, details = _load_calibration(model, settings, kind.loss)
    with translate_resource_errors(loaded.device):
        for block in measure_interactions(
            loaded,
            ids,
            scores,
            get_planner(request.method).options(request),
            kind.loss,
            axis=settings.axis,
            metadata=settings.metadata,
            known=list(known),
            progress=lambda done, total, message: model.report("rows", done, total, message),
        ):
            model.store.save_interactions(
                key, kind, block.layer, block.units, block.matrix, details
            )
