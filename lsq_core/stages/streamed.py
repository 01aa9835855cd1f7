"""Runs of models larger than memory, quantized block by block while they are evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.evaluation.result import EvaluationPair
from lsq_core.planning.plan import Plan
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.settings import GridSettings
from lsq_core.stages.evaluate import checkpoint_file, kept_states, make_texts, with_provenance
from lsq_core.stages.model import OpenModel
from lsq_core.stages.plan import calibration_of_plan, plan_identity
from lsq_core.stages.run import check_plan, check_planned_bytes, make_run_id, make_run_row


@dataclass(frozen=True, eq=False)
class StreamedRun:
    """A run whose quantized model is never entirely in memory.

    ``row`` is its row in the store, as in :class:`lsq_core.stages.run.QuantizedRun`;
    ``quantize_seconds`` is 0, since quantizing is part of the evaluation's time.
    """

    run: str
    plan: Plan
    row: dict
    original: OpenModel
    plan_name: str = ""


def stream_plan(
    model: OpenModel,
    plan: Plan,
    quantizer: str,
    plan_name: str = "",
    run: str | None = None,
    settings: ProfileSettings | None = None,
) -> StreamedRun:
    """Prepare a run that is quantized only when measured; otherwise like ``quantize_plan``.

    Raises
    ------
    InputError
        If the plan is for another model, or the quantizer cannot make it.
    """
    plan = check_plan(model, plan, quantizer, settings)
    row = make_run_row(model, plan, plan.planned_bytes, 0.0)
    run = run or make_run_id(model, plan, quantizer)
    return StreamedRun(run, plan, row, model, plan_name)


def evaluate_streamed_runs(
    model: OpenModel, runs: Sequence[StreamedRun], requests: Sequence[EvaluationRequest]
) -> Iterator[list[EvaluationPair]]:
    """Quantize and evaluate runs and full precision with one block of the model in memory.

    Yields as :func:`lsq_core.evaluation.perplexity.evaluate_models`.

    Raises
    ------
    InputError, LsqError
        If the model cannot be streamed or run block by block, a quantizer needs the full model,
        a block is larger than memory, or a model's measured bytes are not those planned.
    """
    from lsq_core.evaluation.streamed import evaluate_streamed
    from lsq_core.quantization.registry import get_quantizer

    identities = [[one.run, plan_identity(one.plan), one.plan.quantizer] for one in runs]
    found = evaluate_streamed(
        [_task(model, one.plan) for one in runs],
        [get_quantizer(one.plan.quantizer) for one in runs],
        make_texts(model, requests),
        bos=model.tokenizer.bos_token_id,
        progress=lambda done, total, message: model.report("evaluate", done, total, message),
        checkpoints=[[checkpoint_file(model, r, i) for i in identities] for r in requests],
        kept=kept_states(model, requests),
    )
    return with_provenance(model, requests, _checked_pairs(runs, found))


def _task(model: OpenModel, plan: Plan) -> object:
    from lsq_core.quantization.task import QuantizationTask

    grid = GridSettings(plan.axis, plan.metadata)
    return QuantizationTask(model.streamed, plan.choice, grid, calibration_of_plan(plan), plan.rows)


def _checked_pairs(runs: Sequence[StreamedRun], found: Iterator) -> Iterator[list[EvaluationPair]]:
    for evaluations in found:
        for one, evaluated in zip(runs, evaluations, strict=True):
            check_planned_bytes(one.plan, evaluated.measured_bytes)
        yield [evaluated.pair for evaluated in evaluations]
