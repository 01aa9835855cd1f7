"""Saving and loading a model with custom Python code, and other files of a saved model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from lsq_core.cli import program
from lsq_core.errors import InputError
from lsq_core.evaluation.generation import compare_generation
from lsq_core.model.loading import inspect_model, load_model
from lsq_core.model.source import ModelSource
from lsq_core.model.streaming import open_streamed
from lsq_core.quantized.artifact import load_quantized

CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(autouse=True)
def _isolated_modules_cache(tmp_path, monkeypatch):
    """Use a temporary folder as transformers' cache of trusted code, and an empty stdin."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115


@pytest.fixture
def own(random_model, tmp_path) -> Path:
    folder = tmp_path / "own"
    shutil.copytree(random_model("llama-gqa"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    return folder


def run(*options: object) -> list[str]:
    fixed = ["--device", "cpu", "--method", "uniform", "--base", "4.25", "--quantizer", "rtn"]
    return ["run", *fixed, "--max-tokens", "100", "--json", *map(str, options)]


def test_custom_code_without_trust_raises(own, capsys):
    source = ModelSource(str(own))
    for open_model in (
        inspect_model,
        lambda s: load_model(s, "cpu"),
        lambda s: open_streamed(s, "cpu"),
    ):
        with pytest.raises(InputError, match="--trust-remote-code"):
            open_model(source)
    assert program.main(["inspect", "--model", str(own)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "", "no question is asked there"
    assert "--trust-remote-code" in captured.err


def test_custom_code_model_save_and_eval(own, tmp_path, capsys, small_text):
    saved, db = tmp_path / "saved", ("--db", tmp_path / "db", "--corpus", small_text)
    trusted = ["--model", own, "--trust-remote-code"]
    assert program.main(run("--save", saved, *trusted, *db)) == 0
    result = json.loads(capsys.readouterr().out)
    assert {p.name for p in saved.glob("*.py")} == {"configuration_own.py", "modeling_own.py"}
    shutil.rmtree(own)
    eval_command = [
        "eval",
        "--model",
        str(saved),
        "--device",
        "cpu",
        "--max-tokens",
        "100",
        "--json",
    ]
    eval_command += map(str, db)
    assert program.main([*eval_command, "--trust-remote-code"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] == pytest.approx(
        result["perplexity"], rel=1e-6
    )
    assert program.main(eval_command) == 2, (
        "a saved model's code runs no sooner than the original's"
    )
    assert "--trust-remote-code" in capsys.readouterr().err


def test_saved_model_keeps_eos_tokens(own, random_model, tmp_path, capsys):
    """Models with several end tokens list them only in generation_config.json."""
    folder = tmp_path / "chatty"
    shutil.copytree(random_model("llama-gqa"), folder)
    loaded = load_model(ModelSource(str(folder)), "cpu")
    model_pair = loaded.model, loaded.model
    [first] = compare_generation(*model_pair, loaded.tokenizer, "Return the", 1).full
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, first.id]}))
    saved = tmp_path / "saved"
    options = ["--model", folder, "--save", saved, "--db", tmp_path / "db", "--pin", "*=b8g32"]
    assert program.main(run(*options)) == 0
    original = load_model(ModelSource(str(folder)), "cpu").model
    quantized = load_quantized(saved, "cpu")
    assert quantized.model.generation_config.eos_token_id == [0, first.id]
    comparison = compare_generation(
        original, quantized.model, quantized.tokenizer, "Return the", 20
    )
    assert len(comparison.full) == 1
    assert len(comparison.quantized) == 1
