"""Weights streamed from their files equal those of the loaded model, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lsq_core.errors import InputError, LsqError
from lsq_core.model.architecture import find_blocks, parameter_name
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from lsq_core.model.streaming import NotStreamable, open_streamed
from lsq_core.profiling.measure import measure_profile
from lsq_core.profiling.metrics import default_metrics, weight_metrics
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.session import Session
from lsq_core.store.store import Store
from tests.conftest import ARCHITECTURES


@pytest.fixture
def settings(small_text):
    return ProfileSettings(
        calibration=str(small_text), samples=20, block_tokens=48, quantizer="rtn", metadata="fp16"
    )


def tensors(model) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers not on the meta device, by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if not tensor.is_meta}


def same_tensors(actual: dict, expected: dict, names: set[str]) -> bool:
    return actual.keys() == names and all(
        t.dtype == expected[n].dtype and torch.equal(t, expected[n]) for n, t in actual.items()
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_tensors_match_loaded_model(architecture, random_model):
    source = ModelSource(str(random_model(architecture)))
    loaded, streamed = load_model(source, "cpu"), open_streamed(source, "cpu")
    assert streamed.info == loaded.info
    expected, permanent = tensors(loaded.model), set(tensors(streamed.model))
    assert not permanent & {name for name, _ in loaded.model.named_parameters()}
    prefix, blocks = find_blocks(loaded.model)
    for layer in range(len(blocks)):
        block_names = {n for n in expected if n.startswith(f"{prefix}.{layer}.")}
        with streamed.materialize(f"{prefix}.{layer}"):
            assert same_tensors(tensors(streamed.model), expected, permanent | block_names)
    for name in {parameter_name(matrix) for matrix in loaded.info.matrices}:
        with streamed.materialize(name):
            assert same_tensors(tensors(streamed.model), expected, permanent | {name})
    with streamed.materialize_embeddings():
        entry = set(tensors(streamed.model)) - permanent
        assert loaded.model.get_input_embeddings().weight.numel() in {
            expected[n].numel() for n in entry
        }
        assert same_tensors(tensors(streamed.model), expected, permanent | entry)
    assert set(tensors(streamed.model)) == permanent, "what was held is let go"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_profile_matches_loaded_model(architecture, random_model, settings):
    source = ModelSource(str(random_model(architecture)))
    loaded = measure_profile(load_model(source, "cpu"), settings, "key")
    streamed = measure_profile(open_streamed(source, "cpu"), settings, "key")
    assert loaded.values.equals(streamed.values)
    assert (loaded.provenance["streamed"], streamed.provenance["streamed"]) == (False, True)
    weights_only = measure_profile(
        open_streamed(source, "cpu"), settings, "key", metrics=weight_metrics()
    )
    for metric in weight_metrics():
        rows = [p.values[p.values["metric"] == metric] for p in (loaded, weights_only)]
        by_name = [r.set_index(["module", "config"])["value"].sort_index() for r in rows]
        assert by_name[0].equals(by_name[1])


def test_stream_sharded_checkpoint_in_other_dtype(random_model, tmp_path):
    """A sharded bfloat16 checkpoint is loaded as float16."""
    weights = load_file(random_model("mixtral-moe") / "model.safetensors")
    folder = tmp_path / "sharded"
    shutil.copytree(random_model("mixtral-moe"), folder)
    (folder / "model.safetensors").unlink()
    shards = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(weights)}
    for shard in set(shards.values()):
        part = {n: weights[n].bfloat16() for n in weights if shards[n] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}), "utf8")
    source = ModelSource(str(folder))
    loaded = load_model(source, "cpu", "float16")
    expected = tensors(loaded.model)
    streamed = open_streamed(source, "cpu", "float16")
    assert streamed.info == loaded.info
    with streamed.materialize("model.layers.1"):
        block_tensors = tensors(streamed.model)
    assert {t.dtype for n, t in block_tensors.items() if ".layers." in n} == {torch.float16}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in block_tensors.items())


# --- fallbacks and errors -------------------------------------------------------------------


def pickle_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def remove_norm(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.input_layernorm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_profile_pickled_weights_falls_back_to_loading(random_model, settings, tmp_path):
    folder, reason = tmp_path / "model", "The weights are pickled"
    shutil.copytree(random_model("llama-gqa"), folder)
    pickle_weights(folder)
    source, messages = ModelSource(str(folder), allow_pickle=True), []
    with pytest.raises(NotStreamable, match=reason):
        open_streamed(source, "cpu")
    session = Session(source, Store(), "cpu", report=lambda *report: messages.append(report[3]))
    profile = session.profile(settings)
    assert any(reason in line and "whole model" in line for line in messages)
    assert set(profile.metrics) == set(default_metrics())
    assert not profile.provenance["streamed"]


def test_stream_missing_tensor_raises(random_model, settings, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(random_model("llama-gqa"), folder)
    remove_norm(folder)
    expected_error = "has no model.layers.1.input_layernorm.weight"
    with pytest.raises(NotStreamable, match=expected_error):
        open_streamed(ModelSource(str(folder)), "cpu")
    with pytest.raises(InputError, match=r"lack model\.layers\.1\.input_layernorm\.weight;"):
        Session(ModelSource(str(folder)), Store(), "cpu").profile(settings)


def test_profile_streams_without_loading_model(random_model, settings, monkeypatch):
    monkeypatch.setattr("lsq_core.model.loading.load_model", None)  # fails if called
    messages = []
    session = Session(
        ModelSource(str(random_model("llama-gqa"))),
        Store(),
        "cpu",
        report=lambda *report: messages.append(report[3]),
    )
    profile = session.profile(settings)
    assert np.isfinite(profile.scores("kurtosis")).all()
    assert profile.provenance["streamed"]
    assert any("one decoder block" in line and "cpu in float32" in line for line in messages)


def test_open_streamed_too_little_memory_raises(random_model, monkeypatch):
    monkeypatch.setattr("lsq_core.model.loading.free_bytes", lambda device: 1000)
    with pytest.raises(LsqError, match=r"needs .* float32 .*cpu .*1000 B"):
        open_streamed(ModelSource(str(random_model("llama-gqa"))), "cpu")
