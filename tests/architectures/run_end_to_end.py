"""Run one small model from inspection to the evaluation of its reloaded, quantized copy."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from lsq_core.errors import LsqError
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.model.source import ModelSource
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import get_quantizer
from lsq_core.quantization.task import QuantizationTask
from lsq_core.quantized.artifact import load_quantized
from lsq_core.quantized.convert import quantize_model
from lsq_core.session import Session
from lsq_core.stages.saved import evaluate_saved
from lsq_core.store.store import Store
from tests.architectures.small import BuildError, small_model

DEMO = Path(__file__).resolve().parents[2] / "data" / "demo_model"


@dataclass(frozen=True)
class Outcome:
    """The outcome for one class.

    ``state`` is ``works``, ``refused``, ``not built`` or ``fails``; unless it is ``works``,
    ``reason`` says why.
    """

    model_type: str
    name: str
    state: str
    reason: str = ""
    #: Descriptions of weights in the blocks that plans leave out.
    left_out: tuple[str, ...] = ()
    seconds: float = 0.0
    #: The model's folder, which may appear in ``reason``.
    folder: str = ""


def run_end_to_end(model_type: str, name: str, folder: Path) -> Outcome:
    """Run every stage on a small model of a class in its own folder and return the outcome."""
    started = time.perf_counter()

    def outcome(state: str, reason: str = "", left_out: tuple[str, ...] = ()) -> Outcome:
        return Outcome(
            model_type,
            name,
            state,
            reason,
            left_out,
            time.perf_counter() - started,
            str(folder / "model"),
        )

    try:
        save_small_model(model_type, folder / "model")
    except BuildError as error:
        return outcome("not built", str(error))
    try:
        return outcome("works", left_out=_run_stages(folder))
    except LsqError as error:
        return outcome("refused", str(error))
    except Exception as error:
        return outcome("fails", _first_line(error))


def save_small_model(model_type: str, folder: Path) -> None:
    """Save a small random model with the demo model's tokenizer, as a user would have it."""
    model = small_model(model_type)
    try:
        with torch.inference_mode():
            model(torch.arange(1, 9)[None], use_cache=False)
        model.save_pretrained(folder)
    except Exception as error:
        raise BuildError(_first_line(error)) from error
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)


def _run_stages(folder: Path) -> tuple[str, ...]:
    """Inspect, profile, plan, quantize, save, reload and evaluate; return what plans leave out."""
    text = folder / "text.txt"
    text.write_text("\n".join(f"Return the {i}-th item, or raise IndexError." for i in range(90)))
    store = Store(folder / "lsq.duckdb")
    session = Session(ModelSource(str(folder / "model")), store, "cpu")
    settings = ProfileSettings(quantizer="rtn", calibration=str(text), samples=4, block_tokens=32)
    session.profile(settings)
    plan = session.plan(PlanRequest("mxq", budget="4.3bpp"), settings)
    assert len({entry["config"] for entry in plan.to_json()["modules"].values()}) > 1, "mixed"
    request = EvaluationRequest(str(text), max_tokens=300)
    saved = folder / "saved"
    result = session.run(plan, "rtn", request, save=saved)
    assert result["measured_bytes"] == plan.planned_bytes

    reloaded = load_quantized(saved, "cpu")
    requantized = quantize_model(
        QuantizationTask(session.loaded, plan.choice), get_quantizer("rtn")
    )
    ids = torch.arange(1, 33)[None]
    with torch.inference_mode():
        full_logits, expected_logits, reloaded_logits = (
            model(ids, use_cache=False).logits
            for model in (session.loaded.model, requantized, reloaded.model)
        )
    # The last digit depends on memory alignment, which differs for tensors loaded from a file.
    torch.testing.assert_close(
        reloaded_logits, expected_logits, rtol=0, atol=1e-6 * float(expected_logits.abs().max())
    )
    assert not torch.equal(expected_logits, full_logits), "quantization changes nothing"
    evaluated = evaluate_saved(saved, request, store, "cpu")
    assert evaluated["perplexity"] == result["perplexity"]
    return session.info.left_out


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]
