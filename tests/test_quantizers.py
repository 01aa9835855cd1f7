"""Quantizers: declared support and layouts against what is stored and the packages' own results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lsq_core.bits import LADDER, QuantConfig
from lsq_core.cli.program import main
from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.model.architecture import get_weight
from lsq_core.model.info import Matrix
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization import registry as quantize
from lsq_core.quantization.packed import quantize_matrix
from lsq_core.quantization.registry import (
    QUANTIZERS,
    get_quantizer,
    incompatibility_reason,
    quantizer_spec,
    unavailable_reason,
)
from lsq_core.quantization.task import QuantizationTask
from lsq_core.quantized.artifact import make_meta_tensors
from lsq_core.quantized.convert import quantize_model
from lsq_core.quantized.modules import packed_modules
from lsq_core.results.audit import audit_folder, audit_run
from lsq_core.session import Session
from lsq_core.settings import CalibrationSettings
from lsq_core.stages.plan import request_incompatibility
from lsq_core.stages.saved import load_saved
from lsq_core.store.store import Store
from tests.conftest import ROOT

NF4 = ("nf4", "nf4-dq")
FOUR_BITS = [config for config in LADDER if config.bits == 4]
MATRIX = Matrix("model.layers.0.mlp.up_proj", 0, "mlp.up_proj", 384, 128)


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.03


def requires_quantizer(name: str) -> pytest.MarkDecorator:
    """Skip if the quantizer's package is missing, with the message users see as the reason."""
    return pytest.mark.skipif(bool(unavailable_reason(name)), reason=unavailable_reason(name))


# --- NF4 against bitsandbytes ---------------------------------------------------------------


@pytest.mark.parametrize("config", FOUR_BITS, ids=lambda c: c.name)
@pytest.mark.parametrize("name", NF4)
def test_nf4_matches_bitsandbytes(name, config):
    """Codes are equal, and weights within 1e-6; with 344 columns, blocks cross rows."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = weights(96, 344)
    codes, state = quantize_4bit(
        weight, blocksize=config.group_size, quant_type="nf4", compress_statistics=name == "nf4-dq"
    )
    theirs = dequantize_4bit(codes, state)
    ours = quantize_matrix(weight, config, get_quantizer(name))
    assert torch.equal(ours.codes, codes.flatten())
    torch.testing.assert_close(ours.dequantize(), theirs, rtol=1e-6, atol=0)
    assert 0.05 < (theirs - weight).norm() / weight.norm() < 0.15


@pytest.mark.parametrize("config", FOUR_BITS, ids=lambda c: c.name)
@pytest.mark.parametrize("shape", [(96, 128), (384, 128), (32, 96), (4, 32)])
@pytest.mark.parametrize("name", NF4)
def test_nf4_tensors_match_layout(name, shape, config):
    if shape[0] * shape[1] % config.group_size:
        pytest.skip("the groups don't fill the matrix")
    matrix = quantize_matrix(weights(*shape), config, get_quantizer(name))
    assert matrix.nbytes == quantize.planned_bytes(name, shape, config, "8bit")
    empty = make_meta_tensors(quantizer_spec(name).layout(shape, config, "8bit"))
    kinds = {n: (t.shape, t.dtype) for n, t in matrix.tensors.items()}
    assert kinds == {n: (t.shape, t.dtype) for n, t in empty.items()}
    restored = type(matrix).from_tensors(matrix.tensors, shape, config, 1)
    assert torch.equal(restored.dequantize(), matrix.dequantize())


def test_double_quantization_bytes():
    """[QLoRA §3]: 0.127 bits per weight instead of 0.5 in blocks of 64, plus the stored mean."""
    shape, config = (1024, 1024), QuantConfig(4, 64)
    plain, double = (quantize.planned_bytes(name, shape, config, "8bit") for name in NF4)
    assert 8 * plain / 2**20 == 4.5
    assert 8 * double / 2**20 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)


@pytest.mark.parametrize("name", NF4)
@pytest.mark.parametrize("value", [0.0, 0.25, -300.0])
def test_nf4_constant_matrix(name, value):
    weight = torch.full((64, 128), value)
    matrix = quantize_matrix(weight, QuantConfig(4, 64), get_quantizer(name))
    torch.testing.assert_close(matrix.dequantize(), weight, rtol=1e-3, atol=1e-6)


def test_nf4_levels_cover_decoded_values():
    groups = weights(3, 64)
    levels = get_quantizer("nf4").levels(groups, QuantConfig(4, 64))
    matrix = quantize_matrix(groups, QuantConfig(4, 64), get_quantizer("nf4"))
    decoded = matrix.dequantize()
    assert levels.shape == (3, 16)
    assert bool((levels.diff(dim=1) > 0).all())
    for row, own in zip(decoded, levels, strict=True):
        assert set(row.tolist()) <= set(own.tolist())


# --- unsupported requests -------------------------------------------------------------------


def test_quantizer_registry_entries_complete():
    for name, spec in QUANTIZERS.items():
        assert spec.configs, name
        assert spec.title
        assert quantize.stored_matrix_class(name, spec.configs[0]).from_tensors is not None
    assert [c.name for c in quantizer_spec("nf4").configs] == ["b4g128", "b4g64", "b4g32"]


def test_incompatibility_reason_names_supported_configs():
    three = {MATRIX: QuantConfig(3, 64)}
    explanation = incompatibility_reason("nf4", three)
    for part in ("NF4", "b3g64", MATRIX.name, "b4g128, b4g64, b4g32"):
        assert part in explanation
    assert incompatibility_reason("nf4", {MATRIX: QuantConfig(4, 64)}) == ""
    assert "axis 1" in incompatibility_reason("nf4", {MATRIX: QuantConfig(4, 64)}, axis=0)
    assert incompatibility_reason("hqq", three, axis=0) == ""
    with pytest.raises(InputError, match=r"'nf5' .*hqq, rtn, nf4"):
        incompatibility_reason("nf5", three)


def test_incompatibility_reason_of_gptq_and_awq(monkeypatch):
    monkeypatch.setattr(quantize, "find_spec", lambda name: object())
    four, narrow = QuantConfig(4, 128), replace(MATRIX, in_features=96)
    assert (
        incompatibility_reason(
            "gptq", {MATRIX: four, replace(MATRIX, name="other"): QuantConfig(2, 32)}
        )
        == ""
    )
    assert "groups of 128" in incompatibility_reason("gptq", {narrow: four})
    assert "multiple of 32" in incompatibility_reason(
        "awq", {replace(MATRIX, out_features=40): four}
    )
    assert "experts" in incompatibility_reason("gptq", {replace(MATRIX, expert=0): four})
    mixed = {MATRIX: four, replace(MATRIX, name="other"): QuantConfig(4, 64)}
    assert re.search("single configuration .*b4g128, b4g64", incompatibility_reason("awq", mixed))
    assert "b8g64" in incompatibility_reason("awq", {MATRIX: QuantConfig(8, 64)})


def test_unavailable_quantizer_names_install_command(monkeypatch):
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    assert unavailable_reason("hqq") == unavailable_reason("rtn") == ""
    assert unavailable_reason("gptq") == incompatibility_reason("gptq", {})
    assert re.search("GPTQ .*make gptqmodel", unavailable_reason("gptq"))
    with pytest.raises(InputError, match=r"AWQ .*gptqmodel"):
        get_quantizer("awq")


def test_incompatibility_reason_of_infeasible_request():
    problem = Problem((MATRIX,))
    assert "3.2bpp is below" in request_incompatibility(
        problem, PlanRequest("mxq", budget="3.2bpp"), "nf4", 1
    )
    assert request_incompatibility(problem, PlanRequest("mxq", budget="4.2bpp"), "nf4", 1) == ""
    assert "b3g128" in request_incompatibility(
        problem, PlanRequest("uniform", base="3.13"), "nf4", 1
    )
    pinned = PlanRequest("uniform", base="3.13", pins=("*=b4g64",))
    assert request_incompatibility(problem, pinned, "nf4", 1) == ""


def test_cli_incompatible_quantizer_exit_2_before_loading(capsys, monkeypatch):
    monkeypatch.setattr(Session, "loaded", property(lambda self: pytest.fail("loaded")))
    command = ["run", "--model", "demo", "--quantizer", "nf4", "--method", "sensiboost"]
    assert main([*command, "--base", "3.13"]) == 2
    assert "b4g128, b4g64, b4g32" in capsys.readouterr().err
    assert main([*command, "--budget", "2.2bpp"]) == 2
    assert "2.2bpp is below" in capsys.readouterr().err


def test_profile_settings_gptq_raises():
    with pytest.raises(InputError, match=r"GPTQ .*hqq, rtn, nf4, nf4-dq"):
        ProfileSettings("gptq")


# --- runs -----------------------------------------------------------------------------------


@pytest.fixture
def settings(small_text) -> ProfileSettings:
    return ProfileSettings(calibration=str(small_text), samples=8, block_tokens=64)


def run_and_save(folder, text, settings, quantizer, tmp_path, pins=(), base="4.25") -> dict:
    session = Session(ModelSource(str(folder)), Store(), "cpu", "float32")
    plan = session.plan(PlanRequest("uniform", base=base, pins=pins), settings)
    evaluation = EvaluationRequest(str(text), max_tokens=200)
    saved = tmp_path / "saved"
    return session.run(plan, quantizer, evaluation, saved, settings=settings)


def check_round_trip(run: dict, quantizer: str, tmp_path, model) -> None:
    """Check a saved run's bytes, audits, recorded quantizer and package, and logits on reload."""
    assert run["quantizer"] == quantizer
    assert run["measured_bytes"] == run["planned_bytes"]
    found = audit_folder(tmp_path / "saved", Store())
    assert not found.mismatches
    assert found.stored_bytes == run["measured_bytes"]
    restored = load_saved(tmp_path / "saved", "cpu", "float32")
    modules = packed_modules(restored.model)
    kinds = {
        type(m.packed): quantize.stored_matrix_class(quantizer, m.config) for m in modules.values()
    }
    assert all(found is expected for found, expected in kinds.items())
    assert restored.manifest["quantizer"] == quantizer
    (versions,) = Store().query("SELECT CAST(versions AS VARCHAR) AS v FROM runs")["v"]
    package = quantizer_spec(quantizer).package
    assert not package or json.loads(versions)[package] not in ("", "absent")
    requantized_audit = audit_run(run["run"], Store(), ModelSource(str(model)), "cpu")
    assert not requantized_audit.mismatches
    ids = torch.arange(1, 60)[None]
    with torch.inference_mode():
        logits = restored.model(ids).logits
        second = load_saved(tmp_path / "saved", "cpu", "float32").model(ids).logits
    assert torch.equal(logits, second)


@pytest.mark.parametrize("name", NF4)
@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2-conv1d", "mixtral-moe"])
def test_nf4_run_save_load(random_model, small_text, settings, tmp_path, name, architecture):
    folder = random_model(architecture)
    pins = ("*.1.*=b4g32",)
    run = run_and_save(folder, small_text, settings, name, tmp_path, pins)
    assert run["perplexity"] == pytest.approx(run["perplexity_full"], rel=0.2)
    check_round_trip(run, name, tmp_path, folder)
    loaded = load_model(ModelSource(str(folder)), "cpu", "float32")
    task = QuantizationTask(loaded, _choice(folder, run))
    quantized = quantize_model(task, get_quantizer(name))
    ids = torch.arange(1, 60)[None]
    with torch.inference_mode():
        reloaded = load_saved(tmp_path / "saved", "cpu", "float32").model(ids).logits
        assert torch.equal(quantized(ids).logits, reloaded)


def _choice(folder, run) -> dict[Matrix, QuantConfig]:
    matrices = {m.name: m for m in load_model(ModelSource(str(folder)), "cpu").info.matrices}
    return {
        matrices[name]: QuantConfig(entry["bits"], entry["group_size"])
        for name, entry in run["modules"].items()
    }


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_gptqmodel_child_error_reported(random_model, small_text, monkeypatch, name):
    """The child process fails, as it does if the package is missing."""
    from lsq_core.quantization.gptqmodel import process as through_gptqmodel

    monkeypatch.setattr(quantize, "find_spec", lambda name: object())
    monkeypatch.setattr(through_gptqmodel, "_CHILD", "lsq_core.no_such_module")
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")
    choice = dict.fromkeys(loaded.info.matrices, QuantConfig(4, 64))
    calibration = CalibrationSettings(str(small_text), samples=8, block_tokens=64)
    task = QuantizationTask(loaded, choice, calibration=calibration)
    with pytest.raises(LsqError, match=r"gptqmodel .*No module named"):
        quantize_model(task, get_quantizer(name))


@pytest.mark.parametrize(("name", "factor"), [("gptq", 2.0**-13), ("gptq", 2e7), ("awq", 1e-5)])
def test_gptqmodel_scale_out_of_fp16_range_raises(random_model, monkeypatch, name, factor):
    """Its formats store no power of two per matrix, so fp16 scales can go out of range."""
    from lsq_core.quantization.gptqmodel import process as through_gptqmodel

    monkeypatch.setattr(quantize, "find_spec", lambda name: object())
    monkeypatch.setattr(through_gptqmodel, "_run_child", lambda *_: pytest.fail("child started"))
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu", "float32")
    matrix = loaded.info.matrices[-1]
    get_weight(loaded.model, matrix).mul_(factor)
    choice = dict.fromkeys(loaded.info.matrices, QuantConfig(4, 64))
    with pytest.raises(LsqError, match=rf"{re.escape(matrix.name)} has groups with a range as"):
        quantize_model(QuantizationTask(loaded, choice), get_quantizer(name))


#: Decodes random words with the package's own code: GPTQ's kernel module and AWQ's function.
_REFERENCE_SCRIPT = """
import sys
import torch
from safetensors.torch import save_file
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.quantization.config import FORMAT
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

out, width, group = 64, 96, 32
words = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randint(-2**31, 2**31, shape, dtype=torch.int64, generator=words).int()
found = {}
for bits in (2, 3, 4, 8):
    linear = TorchLinear(
        bits=bits, group_size=group, sym=True, desc_act=False, in_features=width,
        out_features=out, register_buffers=True, format=FORMAT.GPTQ,
    )
    linear.qweight, linear.scales = draw(width * bits // 32, out), torch.rand(3, out).half()
    # Zeros of symmetric weights, as the format keeps them: less one.
    codes = torch.full((3, out), 2 ** (bits - 1) - 1, dtype=torch.int64)
    stream = ((codes[..., None] >> torch.arange(bits)) & 1).flatten(1).view(3, -1, 32)
    linear.qzeros = (stream << torch.arange(32)).sum(-1).to(torch.int32)
    linear.g_idx = torch.arange(width, dtype=torch.int32) // group
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        found[f"gptq{bits}.{name}"] = getattr(linear, name).clone()
    convert_gptq_v1_to_v2_format_module(linear, bits, torch.int32)
    linear.eval()
    found[f"gptq{bits}.theirs"] = TorchLinear.dequantize_weight(linear).float().T.contiguous()
for bits in (2, 3, 4):
    qweight, qzeros = draw(width, out * bits // 32), draw(3, out * bits // 32)
    scales = torch.rand(3, out).bfloat16()
    theirs = dequantize_gemm(qweight, qzeros, scales.float(), bits, group).T.contiguous()
    parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales, "theirs": theirs}
    found |= {f"awq{bits}.{name}": tensor for name, tensor in parts.items()}
save_file(found, sys.argv[1])
"""


@pytest.mark.slow
@requires_quantizer("gptq")
def test_gptq_and_awq_decoding_matches_gptqmodel(tmp_path):
    """Slow: importing the package in a separate process takes at least ten seconds."""
    path = tmp_path / "words.safetensors"
    subprocess.run(
        [sys.executable, "-c", _REFERENCE_SCRIPT, str(path)], check=True, capture_output=True
    )
    found = load_file(path)
    for case in dict.fromkeys(name.partition(".")[0] for name in found):
        name, bits = case[:-1], int(case[-1])
        parts = {n.partition(".")[2]: t for n, t in found.items() if n.startswith(f"{case}.")}
        theirs = parts.pop("theirs")
        config = QuantConfig(bits, 32)
        kinds = {
            n: t.dtype
            for n, t in make_meta_tensors(quantizer_spec(name).layout((64, 96), config, "")).items()
        }
        assert {n: t.dtype for n, t in parts.items()} == kinds
        kind = quantize.stored_matrix_class(name, config)
        ours = kind.from_tensors(parts, (64, 96), config, 1).dequantize()
        # Their GPTQ multiplies in half precision.
        torch.testing.assert_close(ours, theirs, rtol=2e-3 if name == "gptq" else 1e-6, atol=1e-6)


def test_gptqmodel_child_exits_when_stdin_closes(tmp_path):
    """As when a job is killed: the child's standard input closes while it is busy."""
    package = tmp_path / "gptqmodel"
    package.mkdir()
    (package / "__init__.py").write_text("import time; time.sleep(600)")
    request = tmp_path / "asked.json"
    request.write_text("{}")
    child = subprocess.Popen(
        [sys.executable, "-m", "lsq_core.quantization.gptqmodel.child", str(request)],
        stdin=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    try:
        assert child.poll() is None
        child.stdin.close()
        assert child.wait(60) == 1
    finally:
        child.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pins"),
    [
        pytest.param(
            "gptq", ("*.1.*=b3g32", "*.0.*down_proj=b8g128"), marks=requires_quantizer("gptq")
        ),
        pytest.param("gptq", ("*.1.*=b2g64",), marks=requires_quantizer("gptq")),
        pytest.param("awq", (), marks=requires_quantizer("awq")),
    ],
)
def test_gptqmodel_run_save_load(random_model, small_text, settings, tmp_path, name, pins):
    """Slow: importing the package in a separate process takes at least ten seconds."""
    folder = random_model("llama-gqa")
    run = run_and_save(folder, small_text, settings, name, tmp_path, pins)
    assert run["perplexity"] == pytest.approx(run["perplexity_full"], rel=0.2)
    check_round_trip(run, name, tmp_path, folder)
    assert run["calibration"]["samples"] == 8
