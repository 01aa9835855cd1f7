"""Models that attend to later tokens are refused, whatever their class is called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lsq_core.cli.program import main
from lsq_core.errors import InputError
from lsq_core.model.causal import check_causal
from lsq_core.model.loading import load_model
from lsq_core.model.source import DEMO_FOLDER, ModelSource
from lsq_core.model.streaming import open_streamed
from tests.conftest import ARCHITECTURES


def save_encoder(folder: Path, family: str, **changes: object) -> Path:
    """Save a small random model of a BERT-like family, as a user would have it."""
    sizes = {"vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 128}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_FOLDER).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("open_model", [load_model, open_streamed])
@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra"])
def test_open_encoder_raises(family, open_model, tmp_path):
    source = ModelSource(str(save_encoder(tmp_path / "m", family)))
    with pytest.raises(InputError, match="not a causal language model"):
        open_model(source, "cpu")


@pytest.mark.parametrize("open_model", [load_model, open_streamed])
def test_open_bert_as_decoder_succeeds(open_model, tmp_path):
    as_decoder = save_encoder(tmp_path / "m", "Bert", is_decoder=True)
    assert open_model(ModelSource(str(as_decoder)), "cpu").info.layers == 2


def test_cli_eval_encoder_exit_2(tmp_path, small_text, capsys):
    folder = save_encoder(tmp_path / "m", "Bert")
    command = ["eval", "--db", str(tmp_path / "db"), "--model", str(folder), "--device", "cpu"]
    assert main([*command, "--corpus", str(small_text), "--max-tokens", "600"]) == 2
    assert "not a causal language model" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_open_decoder_succeeds(architecture, dtype, random_model):
    source = ModelSource(str(random_model(architecture)))
    assert load_model(source, "cpu", dtype).dtype == dtype
    assert open_streamed(source, "cpu", dtype).dtype == dtype


def run_check(forward, dtype=torch.float32, context=2048):
    sizes = {"vocabulary": 100, "context": context, "device": torch.device("cpu")}
    check_causal("m", forward, dtype=dtype, **sizes)


def make_states(ids: torch.Tensor) -> torch.Tensor:
    """Return states (1, tokens, 4) that differ for each token."""
    return torch.sin(ids[..., None] * torch.tensor([0.1, 0.3, 0.7, 1.1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_causal_ignores_rounding_noise(dtype):
    noise = torch.Generator().manual_seed(0)
    step = torch.finfo(dtype).eps / 2

    def forward(ids):
        states = make_states(ids)
        return states + step * torch.randn(states.shape, generator=noise)

    run_check(forward, dtype)
    with pytest.raises(InputError, match="not a causal"):
        run_check(lambda ids: forward(ids) + 0.3 * make_states(ids).mean(1, keepdim=True), dtype)


def test_check_causal_context_1_runs_nothing():
    calls = []
    run_check(calls.append, context=1)
    assert not calls


def test_check_causal_forward_error_raises_input_error():
    def forward(ids):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(InputError, match="cannot be run on 8 tokens: shapes cannot be multiplied"):
        run_check(forward)
