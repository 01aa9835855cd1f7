"""Two texts after one prompt: what each model writes, and the odds that both give it."""

from __future__ import annotations

import json

import pytest
import torch

from lsq_core.bits import QuantConfig
from lsq_core.cli import main
from lsq_core.errors import InputError
from lsq_core.evaluation.generation import _prompt_ids, compare_generation, first_difference
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import get_quantizer
from lsq_core.quantized.convert import quantize_model
from lsq_core.session import Session
from lsq_core.store.store import Store

PROMPT = "Return the number of"


@pytest.fixture(params=["llama-gqa", "gpt2-conv1d", "mixtral-moe"])
def pair(request, random_model):
    """A model, the same at two bits, and their tokenizer."""
    loaded = load_model(ModelSource(str(random_model(request.param))), "cpu")
    choice = dict.fromkeys(loaded.info.matrices, QuantConfig(2, 64))
    return loaded.model, quantize_model(loaded.model, choice, get_quantizer("rtn")), loaded


def prompt_ids(tokenizer) -> list[int]:
    ids = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def test_each_writes_what_it_would_alone(pair):
    full, quantized, loaded = pair
    found = compare_generation(full, quantized, loaded.tokenizer, PROMPT, 12)
    start = torch.tensor([prompt_ids(loaded.tokenizer)])
    for model, tokens in ((full, found.full), (quantized, found.quantized)):
        alone = model.generate(start, max_new_tokens=12, do_sample=False)[0, start.shape[1] :]
        assert [t.id for t in tokens] == alone.tolist()
    assert "".join(t.text for t in found.full) == loaded.tokenizer.decode(
        [t.id for t in found.full]
    )


def test_the_odds_are_those_of_a_forward_pass(pair):
    full, quantized, loaded = pair
    found = compare_generation(full, quantized, loaded.tokenizer, PROMPT, 8)
    prompt = prompt_ids(loaded.tokenizer)
    for tokens in (found.full, found.quantized):
        ids = torch.tensor([prompt + [t.id for t in tokens]])
        for name, model in (("full", full), ("quantized", quantized)):
            with torch.inference_mode():
                odds = model(ids).logits[0, len(prompt) - 1 : -1].softmax(-1)
            expected = [float(odds[i, t.id]) for i, t in enumerate(tokens)]
            assert [getattr(t, name) for t in tokens] == pytest.approx(expected, rel=1e-4)
            tops = [loaded.tokenizer.decode([int(i)]) for i in odds.argmax(-1)]
            assert [getattr(t, f"{name}_top") for t in tokens] == tops
    assert [t.text for t in found.full] == [t.full_top for t in found.full], "greedy"


def test_where_they_part(pair):
    full, quantized, loaded = pair
    found = compare_generation(full, quantized, loaded.tokenizer, PROMPT, 20)
    ids = [[t.id for t in tokens] for tokens in (found.full, found.quantized)]
    at = found.parts_at
    assert at is not None, "two bits of random weights write the same"
    assert ids[0][:at] == ids[1][:at]
    assert ids[0][at] != ids[1][at]
    agreeing = [t.full_top == t.quantized_top for t in found.full]
    assert found.agreement == pytest.approx(sum(agreeing) / len(agreeing), abs=0.051)
    ids = [*_prompt_ids(loaded.tokenizer, PROMPT), *ids[0]]
    own, other = (m(torch.tensor([ids])).logits[0].log_softmax(-1) for m in (full, quantized))
    own, other = (odds[-len(found.full) - 1 : -1] for odds in (own, other))
    divergence = torch.nn.functional.kl_div(other, own, reduction="none", log_target=True)
    assert found.kl == pytest.approx(float(divergence.sum(-1).mean()), rel=1e-4)
    assert found.kl > 0


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_model_beside_itself_never_parts(random_model, temperature):
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")
    found = compare_generation(
        loaded.model,
        loaded.model,
        loaded.tokenizer,
        PROMPT,
        15,
        temperature=temperature,
        seed=3,
    )
    assert found.parts_at is None
    assert (found.agreement, found.kl) == (1.0, 0.0)
    assert [t.full for t in found.full] == [t.quantized for t in found.full]


def test_draws_follow_the_seed(random_model):
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")

    def write(seed: int) -> list[int]:
        found = compare_generation(
            loaded.model, loaded.model, loaded.tokenizer, PROMPT, 15, temperature=1.0, seed=seed
        )
        return [t.id for t in found.full]

    assert write(0) == write(0)
    assert write(0) != write(1)


def test_the_first_difference():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2, "one had ended"
    assert first_difference([], []) is None


def test_what_cannot_be_written_is_one_sentence(random_model):
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")
    both = loaded.model, loaded.model, loaded.tokenizer
    with pytest.raises(InputError, match="256"):
        compare_generation(*both, PROMPT, 300, context=loaded.info.context)
    with pytest.raises(InputError, match="at least 1"):
        compare_generation(*both, PROMPT, 0)
    with pytest.raises(InputError, match="temperature"):
        compare_generation(*both, PROMPT, 5, temperature=-1.0)


def test_a_run_and_its_saved_model_write_the_same(random_model, small_text, tmp_path, capsys):
    bench = Session(ModelSource(str(random_model("llama-gqa"))), Store(), "cpu")
    plan = bench.plan(PlanRequest("uniform", base="2.51"), ProfileSettings("rtn"))
    evaluation = EvaluationRequest(str(small_text), max_tokens=200)
    unsaved = bench.run(plan, "rtn", evaluation)["run"]
    saved = bench.run(plan, "rtn", evaluation, tmp_path / "saved")["run"]
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
    shown = capsys.readouterr().out
    assert "--- full precision\n" + PROMPT in shown
    assert "%" in shown


def test_another_model_in_its_place_is_refused(random_model, small_text, capsys):
    bench = Session(ModelSource(str(random_model("llama-gqa"))), Store(), "cpu")
    plan = bench.plan(PlanRequest("uniform", base="2.51"), ProfileSettings("rtn"))
    run = bench.run(plan, "rtn", EvaluationRequest(str(small_text), max_tokens=200))["run"]
    other = str(random_model("qwen2-bias"))
    assert main(["generate", "--run", run, "--prompt", PROMPT, "--model", other]) == 2
    assert "not the model" in capsys.readouterr().err
