"""Each device has one name and one lock; and the dtype in which a model computes on it."""

from __future__ import annotations

import json
import platform
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lsq_core import devices
from lsq_core.errors import LsqError
from lsq_core.jobs import worker
from lsq_core.model.loading import (
    inspect_model,
    load_model,
    model_config,
    pick_device,
    pick_dtype,
    slow_dtype_note,
    stored_dtype,
)
from lsq_core.model.source import ModelSource

GPU = torch.device("cuda:0")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that simulates a machine with the given device nodes and torch version."""

    def make(*nodes: str, visible: str | None = None, torch_version: str = "2.13.0+cu128") -> None:
        folder = tmp_path / "-".join(["dev", *nodes])
        folder.mkdir(exist_ok=True)
        for node in (*nodes, "null", "nvidiactl", "nvidia-uvm"):
            (folder / node).touch()
        monkeypatch.setattr(devices, "_DEV_FOLDER", folder)
        monkeypatch.setattr(devices, "version", lambda package: torch_version)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return make


@pytest.mark.parametrize(
    ("nodes", "visible", "count"),
    [
        ([], None, 0),
        (["nvidia0"], None, 1),
        (["nvidia3"], None, 1),
        (["nvidia2", "nvidia10"], None, 2),
        (["nvidia0", "nvidia1"], "1", 1),
        (["nvidia0", "nvidia1"], "", 0),
        (["nvidia0", "nvidia1"], "-1", 0),
        (["nvidia0", "nvidia1"], "0,-1,1", 1),
        (["nvidia0", "nvidia1"], "0,7", 1),
        (["nvidia0"], "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 1),
        ([], "0", 0),
    ],
)
def test_card_count_by_nodes_and_visible_devices(machine, nodes, visible, count):
    machine(*nodes, visible=visible)
    assert devices.count_gpus() == count
    assert devices.device_names() == ["cpu", *(f"cuda:{n}" for n in range(count))]
    assert devices.canonical_device("auto") == ("cuda:0" if count else "cpu")


def test_device_names_cpu_torch(machine):
    machine("nvidia0", torch_version="2.13.0+cpu")
    assert devices.device_names() == ["cpu"]


def test_canonical_device_names(machine):
    machine("nvidia3")
    names = {name: devices.canonical_device(name) for name in ("auto", "cuda", "cuda:0", "cuda:00")}
    assert set(names.values()) == {"cuda:0"}
    assert devices.canonical_device("cuda:1") == "cuda:1"
    assert {devices.canonical_device(name) for name in ("cpu", "cpu:0")} == {"cpu"}
    assert devices.canonical_device("warp") == "warp"
    assert str(pick_device("cpu:0")) == "cpu", "what figures name is what the lock names"


def test_device_lock_shared_by_aliases(machine, tmp_path):
    machine("nvidia3")
    home = tmp_path / "jobs" / "one"
    home.mkdir(parents=True)
    for name in ("auto", "cuda", "cuda:0"):
        with worker._device_lock(
            home.parent, ["run", "--device", name], worker._ProgressFile(home)
        ):
            pass
    assert [path.name for path in home.parent.glob("*.lock")] == ["device-cuda-0.lock"]


# --- dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "computed"),
    [
        (torch.float32, torch.float32),  # the range of float16 is too small
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float64, torch.float32),
        (None, torch.float32),
    ],
)
def test_pick_dtype_auto_on_gpu(stored, computed):
    config = SimpleNamespace(dtype=stored)
    assert pick_dtype("auto", GPU, config) == computed
    assert pick_dtype("auto", torch.device("cpu"), config) == torch.float32
    assert pick_dtype("bfloat16", GPU, config) == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_dtype_read_from_weights(random_model, tmp_path, dtype):
    folder = tmp_path / "model"
    shutil.copytree(random_model("llama-gqa"), folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "model.safetensors")
    state = {n: t if "norm" in n else t.to(dtype) for n, t in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert stored_dtype(folder) == dtype
    config_found = model_config(ModelSource(str(folder)), folder)
    assert pick_dtype("auto", GPU, config_found) == dtype
    assert inspect_model(ModelSource(str(folder))).config["dtype"] == str(dtype)[6:]


# --- memory ------------------------------------------------------------------------------------


def test_load_model_no_host_copy(random_model, monkeypatch):
    """Weights are loaded directly onto the device: free host memory is not checked for a copy."""
    to_calls = []
    original_to = torch.nn.Module.to
    monkeypatch.setattr(
        torch.nn.Module,
        "to",
        lambda self, *a, **k: to_calls.append(a) or original_to(self, *a, **k),
    )
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")
    assert to_calls == []
    assert {p.device.type for p in loaded.model.parameters()} == {"cpu"}


def test_load_pickled_weights_checks_host_memory(random_model, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(random_model("llama-gqa"), folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    room = {"cuda": 2**40, "cpu": 1000}
    monkeypatch.setattr("lsq_core.model.loading.pick_device", lambda name: GPU)
    monkeypatch.setattr("lsq_core.model.loading.free_bytes", lambda device: room[device.type])
    with pytest.raises(LsqError, match="cpu has 1000 B free"):
        load_model(ModelSource(str(folder), allow_pickle=True), "cuda")


@pytest.mark.parametrize(
    ("capability", "device", "dtype", "noted"),
    [
        ("AVX2", "cpu", "bfloat16", True),
        ("AVX2", "cpu", "float16", True),
        ("AVX2", "cpu", "float32", False),
        ("AVX2", "cuda:0", "bfloat16", False),
        ("AVX512", "cpu", "bfloat16", False),
    ],
)
def test_emulated_dtype_is_noted(monkeypatch, capability, device, dtype, noted):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert bool(slow_dtype_note(device, dtype)) == noted
