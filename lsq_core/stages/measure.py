"""Measure runs against full precision and store them, whether quantized at once or streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lsq_core.errors import InputError
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.planning.plan import Plan
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.progress import timed
from lsq_core.stages.evaluate import evaluate_models, figures
from lsq_core.stages.model import OpenModel
from lsq_core.stages.plan import plan_identity
from lsq_core.stages.run import QuantizedRun, quantize_plan
from lsq_core.stages.streamed import StreamedRun, evaluate_streamed_runs, stream_plan

if TYPE_CHECKING:
    from lsq_core.evaluation.result import Evaluation, EvaluationPair

#: A run that is ready to be measured.
PreparedRun = QuantizedRun | StreamedRun


@dataclass(frozen=True, eq=False)
class MeasuredRun:
    """A run with its evaluation on a text and that of full precision, ready to be stored.

    ``row`` is the run's row in the store; ``seconds`` are those of the model's stages so far.
    """

    run: str
    plan: Plan
    row: dict
    own: Evaluation
    full: Evaluation
    plan_name: str
    seconds: dict[str, float]


def run_plan(
    model: OpenModel,
    plan: Plan,
    quantizer: str,
    request: EvaluationRequest,
    save: Path | None = None,
    plan_name: str = "",
    settings: ProfileSettings | None = None,
) -> dict:
    """Quantize by a plan, evaluate against full precision, and store the results.

    A model larger than memory is quantized while it is evaluated, unless it is to be saved.
    ``settings`` name the text for a calibrated quantizer. Returns the plan's JSON with
    ``perplexity``, ``perplexity_full``, ``measured_bytes``, ``kl``, ``top1`` and times added.

    Raises
    ------
    InputError, LsqError
        If an input is invalid, the device has too little memory, or the disk is full.
    """
    if save is None and not model.fits_in_memory(plan.planned_bytes):
        made = stream_plan(model, plan, quantizer, plan_name, settings=settings)
    else:
        made = quantize_plan(model, plan, quantizer, save, plan_name, settings=settings)
    [outcome] = measure(model, [made], [request])
    return outcome


def _check_same_model(model: OpenModel, made: Sequence[PreparedRun]) -> None:
    """Raise :class:`InputError` unless the runs are of this model, on this device, in this dtype.

    Otherwise their figures would be compared with full precision of another model.
    """
    for one in made:
        if one.row["fingerprint"] != model.info.fingerprint:
            raise InputError(
                f"Run {one.run} was quantized from {one.original.source.name}, which is not the "
                f"model {model.source.name}; evaluate it in the session that quantized it."
            )
        own, here = one.original.device_and_dtype, model.device_and_dtype
        if own != here:
            raise InputError(
                f"Run {one.run} is on {own['device']} in {own['dtype']} and this session on "
                f"{here['device']} in {here['dtype']}; evaluate it in the session that "
                "quantized it."
            )


def measure(
    model: OpenModel, made: Sequence[PreparedRun], requests: Sequence[EvaluationRequest]
) -> Iterator[dict]:
    """Evaluate quantized models and full precision in one pass, and store the runs.

    Either all runs must be quantized or all streamed. Yields what :func:`run_plan` returns: for
    each run on the first text as soon as that is finished, then for each on the next text.

    Raises
    ------
    InputError
        If a run was quantized from another model, or on another device or in another dtype.
    """
    for measured in measure_unsaved(model, made, requests):
        for one in measured:
            yield save_measured(model, one)


def measure_unsaved(
    model: OpenModel, made: Sequence[PreparedRun], requests: Sequence[EvaluationRequest]
) -> Iterator[list[MeasuredRun]]:
    """Evaluate like :func:`measure` without storing; yields all runs, one text at a time."""
    _check_same_model(model, made)
    for pairs, seconds in _with_stage_seconds(model, _evaluate(model, made, requests)):
        yield [
            MeasuredRun(one.run, one.plan, one.row, own, full, one.plan_name, seconds)
            for one, (own, full) in zip(made, pairs, strict=True)
        ]


def _evaluate(
    model: OpenModel, made: Sequence[PreparedRun], requests: Sequence[EvaluationRequest]
) -> Iterator[list[EvaluationPair]]:
    if isinstance(made[0], StreamedRun):
        return evaluate_streamed_runs(model, made, requests)
    models = [one.model for one in made]
    identities = [[one.run, plan_identity(one.plan), one.row["quantizer"]] for one in made]
    return evaluate_models(model, models, requests, model.loaded.model, identities)


def _with_stage_seconds(
    model: OpenModel, found: Iterator[list[EvaluationPair]]
) -> Iterator[tuple[list[EvaluationPair], dict[str, float]]]:
    """Yield evaluations with the seconds by stage so far, full precision counted separately."""
    while True:
        start_time = model.clock.seconds.get("evaluate", 0.0)
        with model.clock.stage("evaluate"):
            pairs = next(found, None)
        if pairs is None:
            return
        taken = model.clock.seconds["evaluate"] - start_time
        # Work before a text is finished may belong to the next one, so this may be less.
        whole = pairs[0][1]
        full = min(taken, whole.seconds - whole.reused_seconds) if whole else 0.0
        model.clock.add("evaluate", -full)
        model.clock.add("full precision", full)
        yield pairs, dict(model.clock.seconds)


@timed("store")
def save_measured(model: OpenModel, measured: MeasuredRun) -> dict:
    """Store a run's evaluation and full precision's; return what :func:`measure` yields."""
    row, full = measured.row, measured.full
    own = replace(measured.own, times=measured.seconds | {"whole": model.clock.total})
    with model.store.held():
        if "plan" not in row:
            # An export has the plan of its original run, which is stored first.
            run = row.get("exported_from") or measured.run
            row["plan"] = model.store.find_run_plan(run) or model.store.save_plan(
                measured.plan, model.info.fingerprint, measured.plan.profile, measured.plan_name
            )
        model.store.save_full_precision(model.info.fingerprint, full)
        model.store.save_run(measured.run, row, [own])
    model.report("store", 1, 1, f"stored as run {measured.run}")
    return (
        measured.plan.to_json()
        | {"profile": measured.plan.profile}
        | figures(own, model.info.fingerprint, model.source.name, model.store)
        | _outcome(measured.run, row, own, full)
    )


def _outcome(run_id: str, row: dict, own: Evaluation, full: Evaluation) -> dict:
    from lsq_core.evaluation.bootstrap import bootstrap_difference

    difference = bootstrap_difference(own.nll, full.nll, own.counts)
    return {
        "run": run_id,
        "quantizer": row["quantizer"],
        "measured_bytes": row["measured_bytes"],
        "measured_model_bytes": row["model_bytes"],
        "perplexity_full": full.perplexity,
        "increase": asdict(difference),
        "kl": own.kl,
        "top1": own.top1,
        "divergence": asdict(own.divergence) if own.divergence else None,
        "quantize_seconds": row["quantize_seconds"],
        "seconds": own.times,
        "saved_to": row["saved_to"],
    }
