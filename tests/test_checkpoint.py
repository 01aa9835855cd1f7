"""Checkpoints that contradict their config: quantized, unexpected and duplicate tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lsq_core.cli import program
from lsq_core.errors import InputError
from lsq_core.model.loading import inspect_model, load_model
from lsq_core.model.source import ModelSource
from lsq_core.model.streaming import open_streamed
from lsq_core.session import Session
from lsq_core.store.store import Store
from tests.helpers import update_config

DOWN = "model.layers.0.mlp.down_proj.weight"


def replace_tensors(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Add or replace tensors in a model's file; None removes a tensor."""
    path = folder / "model.safetensors"
    state = load_file(path)
    for name, tensor in tensors.items():
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    save_file(state, path, metadata={"format": "pt"})


def assert_refused(folder: Path, *expected_words: str) -> None:
    """Check that inspecting, loading and streaming the model all raise a one-line error."""
    source = ModelSource(str(folder))
    for open_model in (
        inspect_model,
        lambda s: load_model(s, "cpu"),
        lambda s: open_streamed(s, "cpu"),
    ):
        with pytest.raises(InputError) as caught:
            open_model(source)
        message = str(caught.value)
        assert "\n" not in message
        assert all(word in message for word in expected_words), message


# --- quantized checkpoints --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "method"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "FP8"),
        ("quantize_config.json", {"bits": 4, "quant_method": "gptq"}, "gptq"),
        ("quant_config.json", {"w_bit": 4}, "some method"),
    ],
)
def test_foreign_quantizer_config_file_refused(model_copy, file, content, method):
    (model_copy / file).write_text(json.dumps(content))
    assert_refused(model_copy, method, file)


@pytest.mark.parametrize(
    "entries",
    [
        {"compression_config": {"format": "float-quantized"}},
        {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": ["odd"]},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    ],
)
def test_config_with_quantization_entry_refused(model_copy, entries):
    update_config(model_copy, **entries)
    assert_refused(model_copy, "already quantized", "config.json")


def test_fp8_or_int8_weights_refused(model_copy):
    """Cast to floating point, such weights gave a perplexity of 53 million."""
    weight = load_file(model_copy / "model.safetensors")[DOWN]
    replace_tensors(model_copy, **{DOWN: weight.to(torch.float8_e4m3fn)})
    assert_refused(model_copy, DOWN, "F8_E4M3")
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    replace_tensors(model_copy, **{DOWN: codes, DOWN + "_scale": scale})
    assert_refused(model_copy, DOWN, "I8", "weight_scale")


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv", "input_scale", "qzeros"])
def test_scale_tensors_beside_weights_refused(model_copy, suffix):
    """The weights have an ordinary dtype, and loading would silently drop the scales."""
    name = DOWN.replace("weight", suffix)
    replace_tensors(model_copy, **{name: torch.ones(1)})
    assert_refused(model_copy, name, "quantized")


# --- unexpected tensors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.2.mlp.down_proj.weight",  # a third layer, where the config has two
        "model.norm.bias",
        "lm_head.bias",
    ],
)
def test_unexpected_tensors_in_decoder_refused(model_copy, name):
    replace_tensors(model_copy, **{name: torch.ones(128)})
    assert_refused(model_copy, name, "LlamaForCausalLM")


def test_unused_tensors_reported_in_notes(model_copy, tmp_path, capsys):
    replace_tensors(
        model_copy, **{"vision_tower.patch.weight": torch.ones(8, 8), "score.weight": torch.ones(2)}
    )
    source, store = ModelSource(str(model_copy)), Store(tmp_path / "db")
    loaded = load_model(source, "cpu").info
    assert len(loaded.notes) == 1
    assert "2 stored tensors" in loaded.notes[0]
    assert "score.weight" in loaded.notes[0]
    assert inspect_model(source).notes == loaded.notes == open_streamed(source, "cpu").info.notes
    assert Session(source, store).info.notes == loaded.notes
    assert store.model(loaded.fingerprint).notes == loaded.notes, "also where it is known already"
    db = ["--db", str(tmp_path / "db"), "--model", str(model_copy)]
    assert program.main(["inspect", "--json", *db]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == list(loaded.notes)
    assert program.main(["inspect", *db]) == 0
    assert "score.weight" in capsys.readouterr().out


def test_computed_buffers_not_reported(model_copy):
    replace_tensors(
        model_copy,
        **{
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
            "model.rotary_emb.inv_freq": torch.ones(16),
        },
    )
    assert inspect_model(ModelSource(str(model_copy))).notes == ()


def test_multi_token_prediction_blocks_reported_in_notes(model_copy):
    replace_tensors(model_copy, **{"model.layers.2.mlp.down_proj.weight": torch.ones(128, 256)})
    update_config(model_copy, num_nextn_predict_layers=1)
    [note] = inspect_model(ModelSource(str(model_copy))).notes
    assert "model.layers.2.mlp.down_proj.weight" in note


@pytest.mark.parametrize("architecture", ["mixtral-moe", "gpt2-conv1d", "gpt-oss-moe", "opt"])
def test_converted_checkpoints_have_no_notes(random_model, architecture):
    assert inspect_model(ModelSource(str(random_model(architecture)))).notes == ()


def test_fp8_expert_weights_refused(random_model, tmp_path):
    folder = tmp_path / "moe"
    shutil.copytree(random_model("mixtral-moe"), folder)
    state = load_file(folder / "model.safetensors")
    name = next(n for n in state if "experts" in n)
    replace_tensors(folder, **{name: state[name].to(torch.float8_e4m3fn)})
    assert_refused(folder, name, "F8_E4M3")


def test_pickled_int8_weights_refused(model_copy):
    state = load_file(model_copy / "model.safetensors")
    state[DOWN] = state[DOWN].to(torch.int8)
    torch.save(state, model_copy / "pytorch_model.bin")
    (model_copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match="stored as I8"):
        load_model(ModelSource(str(model_copy), allow_pickle=True), "cpu")


# --- duplicates and conflicts ---------------------------------------------------------------------


def shard(folder: Path, stale: torch.Tensor | None) -> None:
    """Split the file in two with an index; ``stale`` goes into the file the index doesn't name."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first = {n: t for n, t in state.items() if "layers.1." not in n}
    second = {n: t for n, t in state.items() if "layers.1." in n}
    names = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    names |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    if stale is not None:
        second[DOWN] = stale
    save_file(first, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(second, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_conflicting_duplicate_in_shard_refused(model_copy):
    weight = load_file(model_copy / "model.safetensors")[DOWN]
    shard(model_copy, weight + 1)
    assert_refused(model_copy, DOWN, "model-00002-of-00002.safetensors")


def test_identical_duplicate_in_shard_accepted(model_copy):
    weight = load_file(model_copy / "model.safetensors")[DOWN]
    shard(model_copy, weight.clone())
    loaded = load_model(ModelSource(str(model_copy)), "cpu")
    assert torch.equal(loaded.model.get_parameter(DOWN), weight)


def test_index_beside_single_file_refused(model_copy, tmp_path):
    single_file = tmp_path / "whole"
    shutil.copy(model_copy / "model.safetensors", single_file)
    shard(model_copy, None)
    shutil.move(single_file, model_copy / "model.safetensors")
    assert_refused(model_copy, "model.safetensors and an index")


def test_index_with_missing_tensor_refused(model_copy):
    shard(model_copy, None)
    path = model_copy / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"]["model.norm.extra"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(content))
    assert_refused(model_copy, "model.norm.extra")


def test_parameter_under_two_names_refused(model_copy):
    weight = load_file(model_copy / "model.safetensors")[DOWN]
    replace_tensors(model_copy, **{DOWN.removeprefix("model."): weight + 1})
    assert_refused(model_copy, DOWN, DOWN.removeprefix("model.") + " ")


def test_tied_head_with_different_values_refused(model_copy):
    embedding = load_file(model_copy / "model.safetensors")["model.embed_tokens.weight"]
    replace_tensors(model_copy, **{"lm_head.weight": embedding.clone()})
    assert inspect_model(ModelSource(str(model_copy))).tied_embeddings
    replace_tensors(model_copy, **{"lm_head.weight": embedding + 1})
    assert_refused(model_copy, "lm_head.weight", "tie_word_embeddings")
    update_config(model_copy, tie_word_embeddings=False)
    loaded = load_model(ModelSource(str(model_copy)), "cpu")
    assert torch.equal(loaded.model.lm_head.weight, embedding + 1)
