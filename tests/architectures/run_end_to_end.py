"""One small model from inspection to the evaluation of its reloaded, quantized copy."""

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
from lsq_core.quantized.artifact import load_quantized
from lsq_core.quantized.convert import quantize_model
from lsq_core.session import Session
from lsq_core.stages.saved import evaluate_saved
from lsq_core.store.store import Store
from tests.architectures.small import BuildError, small_model

DEMO = Path(__file__).resolve().parents[2] / "data" / "demo_model"


@dataclass(frozen=True)
class Outcome:
    """How far a class went: ``works``, ``refused`` with the reason, ``not built``, or ``fails``."""

    model_type: str
    name: str
    state: str
    reason: str = ""
    #: Weights in the blocks that plans don't touch.
    left_out: tuple[str, ...] = ()
    seconds: float = 0.0
    #: Where the model was, which messages name.
    folder: str = ""


def run_end_to_end(model_type: str, name: str, folder: Path) -> Outcome:
    """Take a class the whole way in a folder of its own, and say how that went."""
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
    """A small random model with the demo model's tokenizer, as a person would have it."""
    model = small_model(model_type)
    try:
        with torch.inference_mode():
            model(torch.arange(1, 9)[None], use_cache=False)
        model.save_pretrained(folder)
    except Exception as error:
        raise BuildError(_first_line(error)) from error
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)


def _run_stages(folder: Path) -> tuple[str, ...]:
    """Inspect, profile, plan, quantize, save, reload, evaluate; returns what is left out."""
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
    requantized = quantize_model(session.loaded.model, plan.choice, get_quantizer("rtn"))
    ids = torch.arange(1, 33)[None]
    with torch.inference_mode():
        full_logits, expected_logits, reloaded_logits = (
            model(ids, use_cache=False).logits
            for model in (session.loaded.model, requantized, reloaded.model)
        )
    # The last digit depends on where in memory a tensor begins, which a file decides otherwise.
    torch.testing.assert_close(
        reloaded_logits, expected_logits, rtol=0, atol=1e-6 * float(expected_logits.abs().max())
    )
    assert not torch.equal(expected_logits, full_logits), "quantization changes nothing"
    evaluated = evaluate_saved(saved, request, store, "cpu")
    assert evaluated["perplexity"] == result["perplexity"]
    return session.info.left_out


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]
