"""Running a plan on a model that is larger than memory, block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lsq_core.errors import translate_resource_errors
from lsq_core.evaluation.protocol import EvaluationRequest, EvaluationText, Protocol
from lsq_core.planning.plan import Plan
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.settings import GridSettings
from lsq_core.stages.evaluate import checkpoint_file, known_of_evaluation
from lsq_core.stages.model import OpenModel
from lsq_core.stages.plan import calibration_of_plan, plan_identity
from lsq_core.stages.run import (
    check_plan,
    check_planned_bytes,
    make_run_id,
    make_run_row,
    save_run,
)


@dataclass(frozen=True, eq=False)
class _StreamedRun:
    """A run whose quantized model was never whole in memory."""

    run: str
    plan: Plan
    row: dict
    plan_name: str


def run_plan_streamed(
    model: OpenModel,
    plan: Plan,
    quantizer: str,
    request: EvaluationRequest,
    plan_name: str = "",
    settings: ProfileSettings | None = None,
) -> dict:
    """Quantize by a plan and evaluate with one block in memory; as :func:`run_plan` else.

    The run's ``quantize_seconds`` are 0: quantizing is part of the evaluation's time.

    Raises
    ------
    InputError, LsqError
        When an input is wrong, the model cannot be streamed or run block by block, or one block is
        larger than memory.
    """
    from lsq_core.evaluation.streamed import evaluate_streamed
    from lsq_core.quantization.registry import get_quantizer
    from lsq_core.quantization.task import QuantizationTask

    plan = check_plan(model, plan, quantizer, settings)
    run = make_run_id(model, plan, quantizer)
    streamed, stream = model.streamed, model.stream(request)
    grid = GridSettings(plan.axis, plan.metadata)
    task = QuantizationTask(streamed, plan.choice, grid, calibration_of_plan(plan), plan.rows)
    identity = [run, plan_identity(plan), plan.quantizer]
    found = evaluate_streamed(
        [task],
        [get_quantizer(plan.quantizer)],
        [EvaluationText(stream.ids, Protocol.named(request.protocol, model.info.context))],
        bos=model.tokenizer.bos_token_id,
        progress=lambda done, total, message: model.report("evaluate", done, total, message),
        checkpoints=[[checkpoint_file(model, request, identity)]],
    )
    with translate_resource_errors(streamed.device), model.clock.stage("evaluate"):
        [[evaluated]] = found
    check_planned_bytes(plan, evaluated.measured_bytes)
    known = known_of_evaluation(stream, request, model.device_and_dtype, model.tokenizer)
    own, full = (replace(evaluation, **known) for evaluation in evaluated.pair)
    row = make_run_row(model, plan, evaluated.measured_bytes, 0.0)
    made = _StreamedRun(run, plan, row, plan_name)
    return save_run(model, made, own, full, dict(model.clock.seconds))
