"""Load, evaluate and rebuild saved models and the models of runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lsq_core.errors import InputError, translate_resource_errors
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.model.source import ModelSource
from lsq_core.planning.plan import Plan
from lsq_core.progress import ProgressCallback, ignore_progress
from lsq_core.quantized.manifest import (
    EVALUATION_KEYS,
    RUN_KEYS,
    is_quantized_folder,
    read_manifest,
)
from lsq_core.stages.evaluate import evaluate_on_texts, figures
from lsq_core.stages.model import OpenModel, load_tokens
from lsq_core.stages.run import quantize_plan
from lsq_core.store.store import Store

if TYPE_CHECKING:
    from torch import nn

    from lsq_core.evaluation.result import Evaluation
    from lsq_core.quantized.artifact import QuantizedModel


def load_saved(
    folder: Path,
    device: str = "auto",
    dtype: str = "auto",
    report: ProgressCallback = ignore_progress,
    trust_remote_code: bool = False,
) -> QuantizedModel:
    """Load a saved quantized model; raises :class:`LsqError` if memory runs out."""
    from lsq_core.quantized.artifact import load_quantized

    report("load", 0, 1, f"loading {folder}")
    with translate_resource_errors(device):
        return load_quantized(folder, device, dtype, trust_remote_code)


def evaluate_saved(
    folder: Path,
    request: EvaluationRequest,
    store: Store,
    device: str = "auto",
    dtype: str = "auto",
    report: ProgressCallback = ignore_progress,
    trust_remote_code: bool = False,
) -> dict:
    """Load and evaluate a saved quantized model, and store the result with its run.

    A run that is not in this store (the folder came from elsewhere) is added to it.
    """
    from lsq_core.quantized.modules import measured_bytes

    manifest = read_manifest(folder, EVALUATION_KEYS)
    quantized = load_saved(folder, device, dtype, report, trust_remote_code)
    where = {"device": quantized.device, "dtype": quantized.dtype}
    evaluation = evaluate_alone(quantized.model, quantized.tokenizer, request, where, report)
    measured = measured_bytes(quantized.model)
    store.add_evaluation(manifest, measured, str(folder), evaluation)
    return {
        "model": str(folder),
        "run": manifest["run"],
        "method": manifest["method"],
        "bits_per_param": manifest["bits_per_param"],
        "measured_bytes": measured,
    } | figures(evaluation, manifest["fingerprint"], manifest["source"], store)


def evaluate_alone(
    model: nn.Module,
    tokenizer: object,
    request: EvaluationRequest,
    where: dict[str, str],
    report: ProgressCallback = ignore_progress,
) -> Evaluation:
    """Evaluate a model without a full-precision reference, so without KL divergence."""
    from lsq_core.model.architecture import context_length

    report("evaluate", 0, 1, f"reading {request.corpus}")
    [[(evaluation, _)]] = evaluate_on_texts(
        [model],
        tokenizer,
        context_length(model),
        [request],
        [load_tokens(request, tokenizer)],
        where=where,
        report=report,
    )
    return evaluation


def rebuild_run(
    run: str,
    source: ModelSource | None,
    store: Store,
    device: str = "auto",
    dtype: str = "auto",
    report: ProgressCallback = ignore_progress,
    trust_remote_code: bool = False,
) -> tuple[OpenModel, nn.Module]:
    """Return the full-precision and quantized models of a run, the latter loaded or rebuilt.

    ``source`` is the full-precision model, by default the recorded source of the run; for the
    default, the model's own code runs only if ``trust_remote_code``.

    Raises
    ------
    InputError
        If there is no such run, it is an export, or the source is now a different model.
    """
    kept = store.run(run)
    if kept["exported_from"]:
        raise InputError(
            f"Run {run} was measured as {kept['format']}; give the run that it was exported from, "
            f"{kept['exported_from']}, or evaluate its folder with eval."
        )
    dtype = kept["dtype"] if dtype == "auto" else dtype
    source = source or ModelSource(kept["source"], kept["revision"], trust_remote_code)
    session = open_original(source, kept["fingerprint"], store, device, dtype, report)
    folder = saved_folder(kept)
    if folder is not None:
        trusted = source.trust_remote_code
        return session, load_saved(folder, device, dtype, report, trusted).model
    plan = Plan.from_json(kept["content"], session.info.matrices, session.info.other_bytes)
    return session, quantize_plan(session, plan, kept["quantizer"], run=run).model


def open_original(
    source: ModelSource,
    fingerprint: str,
    store: Store,
    device: str = "auto",
    dtype: str = "auto",
    report: ProgressCallback = ignore_progress,
) -> OpenModel:
    """Open the model with this fingerprint, from which something was made.

    Raises
    ------
    InputError
        If the source is now a different model.
    """
    session = OpenModel(source, store, device, dtype, report)
    if session.info.fingerprint != fingerprint:
        raise InputError(
            f"{source.name} is not the model that was quantized: its weights or its config have "
            "changed; give the original with --model."
        )
    return session


def saved_folder(run: dict) -> Path | None:
    """Return the folder of a run's saved model if it still exists, else None.

    ``run`` is from :meth:`Store.run`.
    """
    folder = Path(run["saved_to"]) if run["saved_to"] else None
    if folder is None or not is_quantized_folder(folder):
        return None
    return folder if read_manifest(folder, RUN_KEYS)["run"] == run["id"] else None
