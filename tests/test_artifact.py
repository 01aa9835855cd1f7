"""Saved models are identical after reloading, never left incomplete, refused when damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from lsq_core.bits import LADDER, QuantConfig
from lsq_core.errors import InputError, LsqError
from lsq_core.model.loading import load_model
from lsq_core.model.source import MANIFEST_FILE, ModelSource
from lsq_core.quantization.registry import get_quantizer
from lsq_core.quantization.task import QuantizationTask
from lsq_core.quantized.artifact import load_quantized, save_quantized
from lsq_core.quantized.convert import quantize_model
from lsq_core.settings import GridSettings
from tests.conftest import ROOT, packed_bytes
from tests.helpers import mount_small_disk


@pytest.fixture(scope="module")
def demo():
    return load_model(ModelSource("demo"), "cpu")


@pytest.fixture(scope="module")
def ladder_choice(demo):
    """A plan that cycles through the stops of the ladder."""
    return {m: LADDER[i % 12] for i, m in enumerate(demo.info.matrices)}


def manifest(choice, metadata="8bit", axis=1):
    modules = {m.name: {"bits": c.bits, "group_size": c.group_size} for m, c in choice.items()}
    return {"modules": modules, "metadata": metadata, "axis": axis}


@pytest.mark.parametrize("metadata", ["8bit", "fp16"])
@pytest.mark.parametrize("axis", [0, 1])
def test_reloaded_logits_are_identical(demo, ladder_choice, tmp_path, metadata, axis):
    quantized = quantize_model(
        QuantizationTask(demo, ladder_choice, grid=GridSettings(axis=axis, metadata=metadata)),
        get_quantizer("rtn"),
    )
    folder = tmp_path / "saved"
    size = save_quantized(
        quantized, demo.tokenizer, manifest(ladder_choice, metadata, axis), folder, demo.folder
    )
    assert size == sum(p.stat().st_size for p in folder.rglob("*"))
    reloaded = load_quantized(folder, "cpu")
    ids = torch.arange(1, 200)[None]
    with torch.inference_mode():
        assert torch.equal(reloaded.model(ids).logits, quantized(ids).logits)
    with safe_open(folder / "packed.safetensors", "pt") as file:
        stored = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    linear = sum(
        t.nbytes
        for n, t in stored.items()
        if n.rpartition(".")[2].startswith(("codes", "scale", "zero"))
    )
    assert linear == sum(packed_bytes(m.numel, c, metadata) for m, c in ladder_choice.items())
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16, "as in the checkpoint"
    assert "lm_head.weight" not in stored, "tied weights once"


@pytest.fixture
def saved(demo, ladder_choice, tmp_path):
    quantized = quantize_model(QuantizationTask(demo, ladder_choice), get_quantizer("rtn"))
    folder = tmp_path / "saved"
    save_quantized(quantized, demo.tokenizer, manifest(ladder_choice), folder, demo.folder)
    return folder


def test_save_quantized_nonempty_folder_raises(demo, ladder_choice, saved):
    before = (saved / MANIFEST_FILE).read_bytes()
    with pytest.raises(InputError, match="not empty"):
        save_quantized(demo.model, demo.tokenizer, manifest(ladder_choice), saved, demo.folder)
    assert (saved / MANIFEST_FILE).read_bytes() == before


def test_from_pretrained_saved_folder_raises(saved):
    """Otherwise the packed modules would get random weights, with hardly a warning."""
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_load_model_saved_folder_raises(saved):
    with pytest.raises(InputError, match="is a quantized model"):
        load_model(ModelSource(str(saved)), "cpu")


def test_load_quantized_truncated_weights_raises(saved):
    path = saved / "packed.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(InputError, match="truncated or damaged"):
        load_quantized(saved, "cpu")


def test_load_quantized_plan_weight_mismatch_raises(saved):
    content = json.loads((saved / MANIFEST_FILE).read_text())
    del content["sha256"]  # earlier versions did not save it
    del content["modules"]["model.layers.3.mlp.up_proj"]
    (saved / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"plan .*model\.layers\.3\.mlp\.up_proj"):
        load_quantized(saved, "cpu")
    content["modules"]["model.layers.99.mlp.up_proj"] = {"bits": 2, "group_size": 64}
    (saved / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"plan for model\.layers\.99"):
        load_quantized(saved, "cpu")


def test_load_quantized_invalid_folder_raises(saved, tmp_path):
    with pytest.raises(InputError, match=r"not a model .* saved"):
        load_quantized(tmp_path, "cpu")
    (saved / MANIFEST_FILE).write_text('{"format": 99}')
    with pytest.raises(InputError, match="newer LSQ Explorer"):
        load_quantized(saved, "cpu")
    (saved / MANIFEST_FILE).write_text("{")
    with pytest.raises(InputError, match="damaged"):
        load_quantized(saved, "cpu")


def test_save_quantized_small_disk_raises_and_cleans_up(demo, tmp_path):
    """Uses a real file system of 1 MiB, which needs permission to mount."""
    with mount_small_disk(tmp_path / "small", "1m") as small_disk:
        choice = dict.fromkeys(demo.info.matrices, QuantConfig(2, 128))
        quantized = quantize_model(QuantizationTask(demo, choice), get_quantizer("rtn"))
        with pytest.raises(LsqError, match=r"free .* needed"):
            save_quantized(
                quantized, demo.tokenizer, manifest(choice), small_disk / "x", demo.folder
            )
        assert list(small_disk.iterdir()) == []


def test_save_quantized_disk_full_during_write_cleans_up(demo, saved, tmp_path, monkeypatch):
    import errno

    from lsq_core.quantized import artifact

    def fail(state, path, **more):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact, "save_file", fail)
    target = tmp_path / "new" / "model"
    with pytest.raises(LsqError, match="room"):
        save_quantized(demo.model, demo.tokenizer, {"modules": {}}, target, demo.folder)
    assert list(target.parent.iterdir()) == []


def test_load_quantized_from_separate_script(saved):
    code = (
        "import torch; from lsq_core.quantized.artifact import load_quantized; "
        f"q = load_quantized({str(saved)!r}, device='cpu'); "
        "print(q.model(**q.tokenizer('Return the', return_tensors='pt')).logits.shape[-1])"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert completed.stdout.strip() == "4096"
    shutil.rmtree(saved)
