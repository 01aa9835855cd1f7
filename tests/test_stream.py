"""Weights read from their files as they are needed are those of the loaded model, bit for bit."""

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
from lsq_core.profiling.metrics import DEFAULT_METRICS, WEIGHT_METRICS
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
    """Every parameter and buffer that has content, by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if not tensor.is_meta}


def same(found: dict, expected: dict, names: set[str]) -> bool:
    return found.keys() == names and all(
        t.dtype == expected[n].dtype and torch.equal(t, expected[n]) for n, t in found.items()
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_held_is_what_loading_gives(architecture, random_model):
    source = ModelSource(str(random_model(architecture)))
    whole, streamed = load_model(source, "cpu"), open_streamed(source, "cpu")
    assert streamed.info == whole.info
    expected, always = tensors(whole.model), set(tensors(streamed.model))
    assert not always & {name for name, _ in whole.model.named_parameters()}
    prefix, blocks = find_blocks(whole.model)
    for layer in range(len(blocks)):
        inside = {n for n in expected if n.startswith(f"{prefix}.{layer}.")}
        with streamed.holding(f"{prefix}.{layer}"):
            assert same(tensors(streamed.model), expected, always | inside)
    for name in {parameter_name(matrix) for matrix in whole.info.matrices}:
        with streamed.holding(name):
            assert same(tensors(streamed.model), expected, always | {name})
    with streamed.holding_entry():
        entry = set(tensors(streamed.model)) - always
        assert whole.model.get_input_embeddings().weight.numel() in {
            expected[n].numel() for n in entry
        }
        assert same(tensors(streamed.model), expected, always | entry)
    assert set(tensors(streamed.model)) == always, "what was held is let go"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_streamed_profile_is_that_of_the_loaded_model(architecture, random_model, settings):
    source = ModelSource(str(random_model(architecture)))
    whole = measure_profile(load_model(source, "cpu"), settings, "key")
    streamed = measure_profile(open_streamed(source, "cpu"), settings, "key")
    assert whole.values.equals(streamed.values)
    assert (whole.provenance["streamed"], streamed.provenance["streamed"]) == (False, True)
    alone = measure_profile(open_streamed(source, "cpu"), settings, "key", metrics=WEIGHT_METRICS)
    for metric in WEIGHT_METRICS:
        rows = [p.values[p.values["metric"] == metric] for p in (whole, alone)]
        by_name = [r.set_index(["module", "config"])["value"].sort_index() for r in rows]
        assert by_name[0].equals(by_name[1])


def test_shards_and_other_dtypes(random_model, tmp_path):
    """A sharded bfloat16 checkpoint, computed in float16."""
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
    whole = load_model(source, "cpu", "float16")
    expected = tensors(whole.model)
    streamed = open_streamed(source, "cpu", "float16")
    assert streamed.info == whole.info
    with streamed.holding("model.layers.1"):
        held = tensors(streamed.model)
    assert {t.dtype for n, t in held.items() if ".layers." in n} == {torch.float16}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in held.items())


# --- where it can't be ----------------------------------------------------------------------


def pickled(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_a_norm(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.input_layernorm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_model_that_cannot_be_streamed_is_loaded_and_that_is_told(
    random_model, settings, tmp_path
):
    folder, told = tmp_path / "model", "The weights are pickled"
    shutil.copytree(random_model("llama-gqa"), folder)
    pickled(folder)
    source, said = ModelSource(str(folder), allow_pickle=True), []
    with pytest.raises(NotStreamable, match=told):
        open_streamed(source, "cpu")
    bench = Session(source, Store(), "cpu", report=lambda *report: said.append(report[3]))
    profile = bench.profile(settings)
    assert any(told in line and "whole model" in line for line in said)
    assert set(profile.metrics) == set(DEFAULT_METRICS)
    assert not profile.provenance["streamed"]


def test_a_weight_that_is_lacking_is_not_made_up(random_model, settings, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(random_model("llama-gqa"), folder)
    without_a_norm(folder)
    lacking = "has no model.layers.1.input_layernorm.weight"
    with pytest.raises(NotStreamable, match=lacking):
        open_streamed(ModelSource(str(folder)), "cpu")
    with pytest.raises(InputError, match=r"have no model\.layers\.1\.input_layernorm\.weight;"):
        Session(ModelSource(str(folder)), Store(), "cpu").profile(settings)


def test_a_profile_needs_no_whole_model(random_model, settings, monkeypatch):
    monkeypatch.setattr("lsq_core.model.loading.load_model", None)  # would fail if it were called
    said = []
    bench = Session(
        ModelSource(str(random_model("llama-gqa"))),
        Store(),
        "cpu",
        report=lambda *report: said.append(report[3]),
    )
    profile = bench.profile(settings)
    assert np.isfinite(profile.scores("kurtosis")).all()
    assert profile.provenance["streamed"]
    assert any("one decoder block" in line and "cpu in float32" in line for line in said)


def test_too_little_memory_for_a_block_is_told_at_once(random_model, monkeypatch):
    monkeypatch.setattr("lsq_core.model.loading._free_bytes", lambda device: 1000)
    with pytest.raises(LsqError, match=r"needs .* float32 .*cpu .*1000 B"):
        open_streamed(ModelSource(str(random_model("llama-gqa"))), "cpu")
