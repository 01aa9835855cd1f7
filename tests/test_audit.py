"""The audit reports what is stored, and every deviation from the plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lsq_core.bits import LADDER, QuantConfig
from lsq_core.cli.program import main
from lsq_core.errors import InputError
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.model.source import ModelSource
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization import layout
from lsq_core.results.audit import audit_folder, audit_run
from lsq_core.session import Session
from lsq_core.store.store import Store
from tests.conftest import packed_bytes

MODULE = "model.layers.1.self_attn.q_proj"


def make_run(model: Path, text: Path, save: Path | None, metadata: str = "8bit") -> dict:
    session = Session(ModelSource(str(model)), Store(), "cpu")
    pins = ("*.1.*=b4g64",)
    request = PlanRequest("uniform", base="3.51", pins=pins)
    plan = session.plan(request, ProfileSettings("rtn", metadata=metadata))
    return session.run(plan, "rtn", EvaluationRequest(str(text), max_tokens=200), save)


@pytest.fixture
def saved_run(random_model, small_text, tmp_path) -> tuple[Path, dict]:
    folder = tmp_path / "saved"
    return folder, make_run(random_model("llama-gqa"), small_text, folder)


def tamper(folder: Path, config: QuantConfig | None) -> None:
    """Store one module in another configuration, or as plain weights, without recording it."""
    import torch

    from lsq_core.quantization.packed import quantize_matrix
    from lsq_core.quantization.registry import get_quantizer

    path = folder / "packed.safetensors"
    state = load_file(path)
    remaining = {n: t for n, t in state.items() if not n.startswith(f"{MODULE}.")}
    if config is None:
        remaining[f"{MODULE}.weight"] = torch.zeros(128, 128, dtype=torch.bfloat16)
    else:
        weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
        packed = quantize_matrix(weight, config, get_quantizer("rtn"))
        remaining |= {f"{MODULE}.{n}": t for n, t in packed.tensors.items()}
    save_file(remaining, path, metadata={"format": "pt"})


def test_audit_saved_model_matches_plan(saved_run):
    folder, run = saved_run
    report = audit_folder(folder, Store())
    assert report.verdict.startswith("All 14")
    assert f"{run['planned_bytes']:,} bytes" in report.verdict
    assert report.stored_bytes == run["measured_bytes"] == run["planned_bytes"]
    assert {line.stored for line in report.lines} == {"b3g32", "b4g64"}
    assert all(line.stored_bytes == line.planned_bytes for line in report.lines)
    assert audit_run(run["run"], Store()).verdict == report.verdict


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_audit_detects_wrong_bits(saved_run, bits):
    folder, run = saved_run
    config = QuantConfig(bits, 64)
    tamper(folder, config)
    for report in (audit_folder(folder, Store()), audit_run(run["run"], Store())):
        (line,) = report.mismatches
        assert (line.module, line.planned, line.stored) == (MODULE, "b4g64", config.name)
        assert line.stored_bytes == packed_bytes(128 * 128, config)
        assert report.verdict.startswith("1 of 14")
        assert f"{MODULE} holds b{bits}" in report.verdict


def test_audit_distinguishes_b2g128_from_b4g64(saved_run):
    """The two have equally many bytes of codes per group."""
    folder, _ = saved_run
    tamper(folder, QuantConfig(2, 128))
    assert [line.stored for line in audit_folder(folder, Store()).mismatches] == ["b2g128"]


def test_audit_detects_plain_and_missing_weights(saved_run):
    folder, _ = saved_run
    tamper(folder, None)
    (line,) = audit_folder(folder, Store()).mismatches
    assert (line.stored, line.stored_bytes) == ("BF16 weights", 2 * 128 * 128)
    path = folder / "packed.safetensors"
    rest = {n: t for n, t in load_file(path).items() if not n.startswith(f"{MODULE}.")}
    save_file(rest, path, metadata={"format": "pt"})
    (line,) = audit_folder(folder, Store()).mismatches
    assert (line.stored, line.stored_bytes) == ("nothing", 0)


def test_audit_changed_manifest_uses_stored_plan(saved_run):
    folder, _ = saved_run
    path = folder / "lsq.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]  # earlier versions did not save it
    manifest["modules"][MODULE] |= {"bits": 3, "config": "b3g64"}
    path.write_text(json.dumps(manifest))
    assert not audit_folder(folder, Store()).mismatches, "the plan that was kept still holds"


def test_audit_unknown_run_uses_manifest_plan(saved_run, tmp_path):
    folder, _ = saved_run
    elsewhere = Store(tmp_path / "elsewhere.duckdb")
    report = audit_folder(folder, elsewhere)
    assert report.verdict.startswith("All 14 matrices")
    assert report.source.endswith("against lsq.json")
    tamper(folder, QuantConfig(8, 128))
    assert [line.module for line in audit_folder(folder, elsewhere).mismatches] == [MODULE]


def test_audit_detects_wrong_metadata_format(saved_run):
    folder, _ = saved_run
    import torch

    path = folder / "packed.safetensors"
    state = load_file(path)
    for part in ("scale", "zero"):
        state.pop(f"{MODULE}.{part}_ranges")
        values = state[f"{MODULE}.{part}_values"]
        state[f"{MODULE}.{part}_values"] = values.to(torch.float16)
    save_file(state, path, metadata={"format": "pt"})
    assert [line.stored for line in audit_folder(folder, Store()).mismatches] == [
        "b4g64 with other metadata"
    ]


@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2-conv1d", "mixtral-moe"])
@pytest.mark.parametrize("metadata", ["8bit", "fp16"])
def test_audit_run_unsaved_requantizes(random_model, small_text, architecture, metadata):
    run = make_run(random_model(architecture), small_text, None, metadata)
    report = audit_run(run["run"], Store(), device="cpu")
    assert not report.mismatches
    assert report.stored_bytes == run["planned_bytes"]
    assert len(report.lines) == len(run["modules"])
    assert "rebuilt" in report.source


@pytest.mark.parametrize("metadata", ["8bit", "fp16"])
def test_layout_packed_bytes_match_formula(metadata):
    sizes = {"U8": 1, "F16": 2, "I16": 2}
    for config in LADDER:
        tensors = layout.packed((96, 128), config, metadata)
        count = 0
        for shape, dtype in tensors.values():
            count += sizes[dtype] * (shape[0] * shape[1] if len(shape) == 2 else shape[0])
        assert count == packed_bytes(96 * 128, config, metadata)


def test_cli_audit(saved_run, capsys, tmp_path):
    folder, run = saved_run
    assert main(["audit", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["agrees"], result["matrices"]) == (True, 14)
    assert main(["audit", run["run"]]) == 0
    assert capsys.readouterr().out.startswith("All 14 ")
    tamper(folder, QuantConfig(8, 64))
    assert main(["audit", str(folder)]) == 0
    assert f"{MODULE}: planned b4g64" in capsys.readouterr().out
    assert main(["audit", str(tmp_path)]) == 2
    assert main(["audit", "nosuchrun"]) == 2
    assert "'nosuchrun'" in capsys.readouterr().err


def test_audit_damaged_manifest_raises(saved_run):
    folder, _ = saved_run
    (folder / "lsq.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        audit_folder(folder, Store())
