"""Two models' continuations of a prompt, and the probabilities that both models give them."""

from __future__ import annotations

import json

import pytest
import torch

from lsq_core.bits import QuantConfig
from lsq_core.cli.program import main
from lsq_core.errors import InputError
from lsq_core.evaluation.generation import _prompt_ids, compare_generation, first_difference
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import get_quantizer
from lsq_core.quantization.task import QuantizationTask
from lsq_core.quantized.convert import quantize_model
from lsq_core.session import Session
from lsq_core.store.store import Store

PROMPT = "Return the number of"


@pytest.fixture(params=["llama-gqa", "gpt2-conv1d", "mixtral-moe"])
def pair(request, random_model):
    """A model, its 2-bit quantization, and the loaded original with the tokenizer."""
    loaded = load_model(ModelSource(str(random_model(request.param))), "cpu")
    choice = dict.fromkeys(loaded.info.matrices, QuantConfig(2, 64))
    return (
        loaded.model,
        quantize_model(QuantizationTask(loaded, choice), get_quantizer("rtn")),
        loaded,
    )


def prompt_ids(tokenizer) -> list[int]:
    ids = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def test_compare_generation_matches_generate(pair):
    full, quantized, loaded = pair
    comparison = compare_generation(full, quantized, loaded.tokenizer, PROMPT, 12)
    start = torch.tensor([prompt_ids(loaded.tokenizer)])
    for model, tokens in ((full, comparison.full), (quantized, comparison.quantized)):
        generated = model.generate(start, max_new_tokens=12, do_sample=False)[0, start.shape[1] :]
        assert [t.id for t in tokens] == generated.tolist()
    assert "".join(t.text for t in comparison.full) == loaded.tokenizer.decode(
        [t.id for t in comparison.full]
    )


def test_compare_generation_probabilities_match_forward(pair):
    full, quantized, loaded = pair
    comparison = compare_generation(full, quantized, loaded.tokenizer, PROMPT, 8)
    prompt = prompt_ids(loaded.tokenizer)
    for tokens in (comparison.full, comparison.quantized):
        ids = torch.tensor([prompt + [t.id for t in tokens]])
        for name, model in (("full", full), ("quantized", quantized)):
            with torch.inference_mode():
                probabilities = model(ids).logits[0, len(prompt) - 1 : -1].softmax(-1)
            expected = [float(probabilities[i, t.id]) for i, t in enumerate(tokens)]
            assert [getattr(t, name) for t in tokens] == pytest.approx(expected, rel=1e-4)
            tops = [loaded.tokenizer.decode([int(i)]) for i in probabilities.argmax(-1)]
            assert [getattr(t, f"{name}_top") for t in tokens] == tops
    assert [t.text for t in comparison.full] == [t.full_top for t in comparison.full], "greedy"


def test_compare_generation_divergence_point_and_kl(pair):
    full, quantized, loaded = pair
    comparison = compare_generation(full, quantized, loaded.tokenizer, PROMPT, 20)
    ids = [[t.id for t in tokens] for tokens in (comparison.full, comparison.quantized)]
    at = comparison.parts_at
    assert at is not None, "two bits of random weights write the same"
    assert ids[0][:at] == ids[1][:at]
    assert ids[0][at] != ids[1][at]
    agreeing = [t.full_top == t.quantized_top for t in comparison.full]
    assert comparison.agreement == pytest.approx(sum(agreeing) / len(agreeing), abs=0.051)
    ids = [*_prompt_ids(loaded.tokenizer, PROMPT), *ids[0]]
    own, other = (m(torch.tensor([ids])).logits[0].log_softmax(-1) for m in (full, quantized))
    own, other = (probabilities[-len(comparison.full) - 1 : -1] for probabilities in (own, other))
    divergence = torch.nn.functional.kl_div(other, own, reduction="none", log_target=True)
    assert comparison.kl == pytest.approx(float(divergence.sum(-1).mean()), rel=1e-4)
    assert comparison.kl > 0


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_compare_generation_same_model_never_diverges(random_model, temperature):
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")
    comparison = compare_generation(
        loaded.model,
        loaded.model,
        loaded.tokenizer,
        PROMPT,
        15,
        temperature=temperature,
        seed=3,
    )
    assert comparison.parts_at is None
    assert (comparison.agreement, comparison.kl) == (1.0, 0.0)
    assert [t.full for t in comparison.full] == [t.quantized for t in comparison.full]


def test_compare_generation_sampling_follows_seed(random_model):
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")

    def generate_ids(seed: int) -> list[int]:
        comparison = compare_generation(
            loaded.model, loaded.model, loaded.tokenizer, PROMPT, 15, temperature=1.0, seed=seed
        )
        return [t.id for t in comparison.full]

    assert generate_ids(0) == generate_ids(0)
    assert generate_ids(0) != generate_ids(1)


def test_first_difference():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2, "one had ended"
    assert first_difference([], []) is None


def test_compare_generation_invalid_options_raise(random_model):
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")
    models_and_tokenizer = loaded.model, loaded.model, loaded.tokenizer
    with pytest.raises(InputError, match="256"):
        compare_generation(*models_and_tokenizer, PROMPT, 300, context=loaded.info.context)
    with pytest.raises(InputError, match="at least 1"):
        compare_generation(*models_and_tokenizer, PROMPT, 0)
    with pytest.raises(InputError, match="64-bit"):
        compare_generation(*models_and_tokenizer, PROMPT, 5, seed=10**30)
    with pytest.raises(InputError, match="temperature"):
        compare_generation(*models_and_tokenizer, PROMPT, 5, temperature=-1.0)


def test_cli_generate_run_and_saved_model_agree(random_model, small_text, tmp_path, capsys):
    session = Session(ModelSource(str(random_model("llama-gqa"))), Store(), "cpu")
    plan = session.plan(PlanRequest("uniform", base="2.51"), ProfileSettings("rtn"))
    evaluation = EvaluationRequest(str(small_text), max_tokens=200)
    unsaved = session.run(plan, "rtn", evaluation)["run"]
    saved = session.run(plan, "rtn", evaluation, tmp_path / "saved")["run"]
    texts = []
    for of in (["--run", unsaved], ["--run", saved], ["--saved", str(tmp_path / "saved")]):
        command = ["generate", *of, "--prompt", PROMPT, "--max-new-tokens", "9", "--json"]
        assert main([*command, "--device", "cpu"]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert [t["run"] for t in texts] == [unsaved, saved, saved]
    for text in texts[1:]:
        for name in ("full", "quantized"):
            assert [t["id"] for t in text[name]] == [t["id"] for t in texts[0][name]]
    assert main(["generate", "--run", unsaved, "--prompt", PROMPT, "--max-new-tokens", "9"]) == 0
    output = capsys.readouterr().out
    assert "--- full precision\n" + PROMPT in output
    assert "%" in output


def test_cli_generate_other_model_exit_2(random_model, small_text, capsys):
    session = Session(ModelSource(str(random_model("llama-gqa"))), Store(), "cpu")
    plan = session.plan(PlanRequest("uniform", base="2.51"), ProfileSettings("rtn"))
    run = session.run(plan, "rtn", EvaluationRequest(str(small_text), max_tokens=200))["run"]
    other = str(random_model("qwen2-bias"))
    assert main(["generate", "--run", run, "--prompt", PROMPT, "--model", other]) == 2
    assert "not the model" in capsys.readouterr().err
