"""Exports of quantized models to MLX, GGUF and compressed-tensors, read by independent decoders.

Tests with the tools themselves are in ``tests/exports``.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from lsq_core import disk
from lsq_core.bits import EXTENDED, QuantConfig
from lsq_core.cli.program import main
from lsq_core.errors import InputError, LsqError
from lsq_core.exports.weights.base import (
    Export,
    ExportMatrix,
    OriginalFiles,
    StoredType,
    check_bytes,
    choose_types,
)
from lsq_core.exports.weights.compressed_tensors import round_to_whole_zeros
from lsq_core.exports.weights.gguf import exact_rows
from lsq_core.exports.weights.gguf_metadata import PROVENANCE_KEY, file_type, rope_factors
from lsq_core.exports.weights.manifest import EXPORT_FILE, is_exported_folder, read_export
from lsq_core.exports.weights.registry import FORMATS, ExportTarget, get_exporter
from lsq_core.jobs.arguments import reproduce_command
from lsq_core.quantization.packed import PackedMatrix, quantize_matrix
from lsq_core.quantization.rtn import Rtn
from lsq_core.quantized.modules import PackedLinear
from lsq_core.session import Session
from lsq_core.stages.export import export_saved, load_exported
from lsq_core.stages.saved import rebuild_run
from lsq_core.store.store import Store
from tests.conftest import save_random_model

PACKED_FOLDERS = ("mlx", "compressed-tensors", "compressed-tensors-asym")
OTHERS = tuple(name for name in FORMATS if name != "lsq")


# --- independent decoders -----------------------------------------------------------------


def bit_stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Unpack ``count`` numbers of ``bits`` bits from each row of 32-bit words, low bits first."""
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    digits = stream[:, : count * bits].reshape(len(words), count, bits).astype(np.int64)
    return (digits << np.arange(bits)).sum(-1)


def decode_mlx(tensors: dict[str, np.ndarray], bits: int) -> np.ndarray:
    scales = tensors["scales"].astype(np.float32)
    width = tensors["weight"].shape[1] * 32 // bits
    codes = bit_stream(np.ascontiguousarray(tensors["weight"]), bits, width)
    repeats = width // scales.shape[1]
    biases = tensors["biases"].astype(np.float32)
    return codes * scales.repeat(repeats, 1) + biases.repeat(repeats, 1)


def decode_compressed_tensors(tensors: dict[str, np.ndarray], bits: int) -> np.ndarray:
    rows, width = tensors["weight_shape"]
    scales = tensors["weight_scale"].astype(np.float32)
    codes = bit_stream(np.ascontiguousarray(tensors["weight_packed"]), bits, width)
    zeros = np.full(scales.shape, 2 ** (bits - 1))
    if "weight_zero_point" in tensors:
        zeros = bit_stream(np.ascontiguousarray(tensors["weight_zero_point"].T), bits, rows).T
    repeats = width // scales.shape[1]
    return (codes - zeros.repeat(repeats, 1)) * scales.repeat(repeats, 1)


# --- single matrices --------------------------------------------------------------------------


@st.composite
def packed_matrices(draw: st.DrawFn, bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)) -> PackedMatrix:
    """Matrices of any configuration; row lengths are multiples of 32, groups may cross rows."""
    group_size = draw(st.sampled_from((128, 64, 32)))
    width = 32 * draw(st.integers(1, 6))
    rows = draw(st.integers(1, 3)) * (group_size // 32)
    torch.manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(rows, width) * 2.0 ** draw(st.integers(-8, 2))
    config = QuantConfig(draw(st.sampled_from(bits)), group_size)
    return quantize_matrix(weight, config, Rtn(), metadata=draw(st.sampled_from(("fp16", "8bit"))))


def encode(name: str, packed: PackedMatrix, dtype: str, original: torch.Tensor | None = None):
    """Return the exporter's tensors of one matrix as NumPy arrays, and its stored type."""
    exporter = get_exporter(name, "split", dtype)
    matrix = ExportMatrix("m", *packed.shape, packed.config)
    [(_, stored)] = choose_types(exporter, [matrix], "hqq", 1).items()
    quantized = torch.nn.ModuleDict({"m": PackedLinear(packed)})
    linear = torch.nn.Linear(packed.shape[1], packed.shape[0], bias=False)
    linear.weight.data = packed.dequantize() if original is None else original
    files = OriginalFiles({}, Path(), dtype)
    full = torch.nn.ModuleDict({"m": linear})
    export = Export(quantized, full, None, files, {"m": stored}, {})
    tensors = exporter.encode(export, "m", stored)
    assert sum(t.nbytes for t in tensors.values()) == stored.bytes
    return {
        key: t.float().numpy() if t.is_floating_point() else t.numpy() for key, t in tensors.items()
    }, stored


@settings(max_examples=25, deadline=None)
@given(packed_matrices())
def test_mlx_float32_scales_hold_the_same_weights(packed):
    tensors, stored = encode("mlx", packed, "F32")
    expected = packed.dequantize().numpy()
    decoded = decode_mlx(tensors, stored.bits)
    steps = packed.scale.decode().abs().max() * 2**packed.config.bits
    assert np.abs(decoded - expected).max() <= 1e-6 * float(steps) + 1e-7 * np.abs(expected).max()


@settings(max_examples=15, deadline=None)
@given(packed_matrices())
def test_mlx_fp16_scales_differ_by_their_rounding_alone(packed):
    tensors, stored = encode("mlx", packed, "BF16")
    expected = packed.dequantize().numpy().reshape(-1, packed.config.group_size)
    decoded = decode_mlx(tensors, stored.bits).reshape(expected.shape)
    scale, zero = packed.scale.decode().abs().numpy(), packed.zero.decode().abs().numpy()
    bound = 2.0**-11 * scale * (2**stored.bits + zero) + 2.0**-24 * 2**stored.bits
    assert (np.abs(decoded - expected) <= 1.01 * bound[:, None]).all()


@settings(max_examples=20, deadline=None)
@given(packed_matrices(bits=(4, 5)))
def test_q4_1_and_q5_1_hold_the_codes_of_any_group_size(packed):
    rows, bits = exact_rows(packed, "m"), packed.config.bits
    decoded = gguf.dequantize(rows, gguf.GGMLQuantizationType[f"Q{bits}_1"])
    expected = packed.dequantize().numpy().reshape(-1, packed.config.group_size)
    scale, zero = packed.scale.decode().abs().numpy(), packed.zero.decode().abs().numpy()
    bound = 2.0**-11 * scale * (2**bits + zero) + 2.0**-20
    assert (np.abs(decoded.reshape(expected.shape) - expected) <= 1.01 * bound[:, None]).all()


@settings(max_examples=20, deadline=None)
@given(packed_matrices(), st.sampled_from(PACKED_FOLDERS[1:]))
def test_compressed_tensors_own_decoder_agrees_with_another(packed, name):
    tensors, stored = encode(name, packed, "F32")
    expected = decode_compressed_tensors(tensors, stored.bits)
    exporter = get_exporter(name, dtype="F32")
    as_torch = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
    decoded = exporter.decode(as_torch, stored.bits, stored.group_size)
    np.testing.assert_allclose(decoded.numpy(), expected, rtol=1e-6)
    weight, step = packed.dequantize().numpy(), tensors["weight_scale"].max()
    # Within one step, plus clipping at the ends of the code range.
    assert np.sqrt(((expected - weight) ** 2).mean()) <= 1.5 * step


def test_round_to_whole_zeros_takes_the_better_side():
    groups = torch.tensor([[0.0, 1, 2, 3], [0.4, 1.4, 2.4, 3.4]])
    codes, zeros = round_to_whole_zeros(groups, torch.ones(2), torch.tensor([0.3, -0.4]), 2)
    assert zeros.tolist() == [0, 0]
    assert codes.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_scales_beyond_fp16_raise():
    config = QuantConfig(4, 32)
    packed = quantize_matrix(torch.randn(2, 64) * 2.0**40, config, Rtn(), metadata="fp16")
    with pytest.raises(LsqError, match="beyond the range"):
        exact_rows(packed, "m")
    with pytest.raises(LsqError, match="beyond the range"):
        encode("mlx", packed, "F16")


def test_check_bytes_reports_a_difference():
    with pytest.raises(LsqError, match="defect"):
        check_bytes({"m": StoredType("Q4_1", 20, True)}, {"m": 21})


# --- whole models -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory) -> Path:
    """A model with grouped queries and tied embeddings; row lengths are multiples of 128."""
    return save_random_model(tmp_path_factory.mktemp("llama") / "model", "llama-gqa")


@pytest.fixture
def text(tmp_path) -> str:
    """The path of an evaluation text, as a user would give it."""
    path = tmp_path / "text.txt"
    path.write_text(
        "".join(f"Return the sum of item {i} and what follows it.\n" for i in range(99))
    )
    return str(path)


def quantized(model: Path, **request: object):
    session = Session(str(model))
    plan = session.plan("uniform", **request)
    return session, session.quantize(plan)


@pytest.mark.parametrize("name", OTHERS)
def test_export_decodes_to_the_plan_or_near_it(name, random_llama, tmp_path):
    session, made = quantized(random_llama, base="b4g32", pins=("*.v_proj=b8g64",))
    exported = session.export(made, tmp_path / "out", name)
    manifest = read_export(tmp_path / "out")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        own, other = made.model(ids).logits, exported.model(ids).logits
        full = session.loaded.model(ids).logits
    away = (other - own).norm() / (own - full).norm()
    # Rounding again may change the weights about as much as the first quantization did.
    assert away < {"mlx": 0.02, "gguf": 0.2}.get(name, 1.7)
    assert manifest["exported_bytes"] == exported.row["measured_bytes"]
    assert manifest["exported_bytes"] == sum(t["bytes"] for t in manifest["types"].values())
    assert manifest["exported_from"] == made.run != exported.run
    weights = [p for p in (tmp_path / "out").iterdir() if p.suffix in (".gguf", ".safetensors")]
    assert exported.row["model_bytes"] == sum(p.stat().st_size for p in weights)
    assert len(weights) == 1


@pytest.mark.parametrize(
    ("architecture", "base", "kind"),
    [
        ("llama-gqa", "b4g32", "Q4_1"),
        ("qwen2-bias", "b4g32", "Q4_1"),
        ("llama-gqa", "b5g32", "Q5_1"),
    ],
)
def test_gguf_exact_types_give_the_same_logits(architecture, base, kind, tmp_path):
    """Checks row order, biases, tied embeddings and metadata as transformers reads them."""
    model = save_random_model(tmp_path / "model", architecture)
    session, made = quantized(model, base=base, ladder=EXTENDED)
    exported = session.export(made, tmp_path / "out", "gguf")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        own, other = made.model(ids).logits, exported.model(ids).logits
    assert (own - other).abs().max() < 0.01 * own.abs().max()
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    provenance = json.loads(reader.fields[PROVENANCE_KEY].contents())
    assert provenance["exported_from"] == made.run
    assert set(provenance["modules"]) == {m.name for m in made.plan.matrices}
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.1.ffn_down.weight"] == kind
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == session.info.config["vocab_size"]


@pytest.mark.parametrize(
    ("largest", "name"),
    [
        ("F32", "ALL_F32"),
        *((t, f"MOSTLY_{t}") for t in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_1", "Q8_0")),
        *((t, f"MOSTLY_{t}") for t in ("Q2_K", "Q6_K")),
        *((t, f"MOSTLY_{t}_M") for t in ("Q3_K", "Q4_K", "Q5_K")),
    ],
)
def test_every_gguf_type_has_a_file_type(largest, name):
    assert gguf.LlamaFileType(file_type(largest)).name == name


def test_gguf_tokenizer_is_the_models(random_llama, tmp_path):
    from transformers import AutoTokenizer

    session, made = quantized(random_llama, base="b4g32")
    session.export(made, tmp_path / "out", "gguf")
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    text = "def f(x):\n    return x + 1  # the sum, 12 of them"
    assert read(text)["input_ids"] == session.tokenizer(text)["input_ids"]


def test_gguf_llama3_rotary_factors(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = save_random_model(tmp_path / "model", "llama-gqa", rope_parameters=rope)
    original = AutoModelForCausalLM.from_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    inverse = 5e5 ** -(np.arange(0, 32, 2) / 32)
    found = inverse / rope_factors(config)
    np.testing.assert_allclose(found, original.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    session, made = quantized(model, base="b4g32")
    exported = session.export(made, tmp_path / "out", "gguf")
    ids = torch.arange(3, 100)[None]
    with torch.no_grad():
        own, other = made.model(ids).logits, exported.model(ids).logits
    assert (own - other).abs().max() < 0.01 * own.abs().max()


def test_mlx_folder_names_every_module(random_llama, tmp_path):
    session, made = quantized(random_llama, base="b3g64", pins=("*.layers.0.mlp.*=b8g32",))
    session.export(made, tmp_path / "out", "mlx")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["quantization"] == content["quantization_config"]
    entry = content["quantization"]["model.layers.0.mlp.up_proj"]
    assert entry == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert content["rope_theta"] == session.info.config["rope_parameters"]["rope_theta"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    expected = made.model.get_submodule("model.layers.1.self_attn.q_proj").weight
    parts = {p: tensors[f"model.layers.1.self_attn.q_proj.{p}"] for p in ("weight", "scales")}
    parts["biases"] = tensors["model.layers.1.self_attn.q_proj.biases"]
    np.testing.assert_allclose(decode_mlx(parts, 3), expected.detach().numpy(), atol=2e-4)


@pytest.mark.parametrize("name", PACKED_FOLDERS)
@pytest.mark.parametrize("crossing", ["refuse", "split", "full"])
def test_groups_that_cross_rows(name, crossing, tmp_path):
    """With 160 columns, groups of 64 cross rows and groups of 32 divide them evenly."""
    model = save_random_model(
        tmp_path / "model", "llama-gqa", hidden_size=160, head_dim=32, num_attention_heads=4
    )
    session, made = quantized(model, base="b4g64")
    out = tmp_path / "out"
    if crossing == "refuse":
        with pytest.raises(InputError, match=r"q_proj \(128×160\)"):
            session.export(made, out, name)
        assert not out.exists()
        return
    exported = session.export(made, out, name, crossing)
    types = read_export(out)["types"]
    q, down = (types[f"model.layers.0.{n}"] for n in ("self_attn.q_proj", "mlp.down_proj"))
    assert down["group_size"] == 64
    assert q["group_size"] == (32 if crossing == "split" else 0)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        own, other = made.model(ids).logits, exported.model(ids).logits
        full = session.loaded.model(ids).logits
    away = (other - own).norm() / (own - full).norm()
    assert away < (0.02 if (name, crossing) == ("mlx", "split") else 1.5)
    if crossing == "full":
        q_proj = "model.layers.0.self_attn.q_proj"
        expected = session.loaded.model.get_submodule(q_proj).weight
        assert torch.equal(exported.model.get_submodule(q_proj).weight, expected)


def left_in(folder: Path) -> list[str]:
    """Return the names in a folder, except the tests' database."""
    return sorted(path.name for path in folder.iterdir() if "duckdb" not in path.name)


# --- unsupported exports ------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_axis_0_is_refused(name, random_llama, tmp_path):
    session = Session(str(random_llama))
    settings = session.default_settings
    plan = session.plan("uniform", type(settings)(axis=0), base="b4g32")
    made = session.quantize(plan)
    with pytest.raises(InputError, match="axis"):
        session.export(made, tmp_path / "out", name)
    assert not left_in(tmp_path)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("architecture", ["mixtral-moe", "gpt2-conv1d"])
def test_what_is_no_linear_module_is_refused(name, architecture, tmp_path):
    model = save_random_model(tmp_path / "model", architecture)
    session, made = quantized(model, base="b4g32")
    with pytest.raises(InputError):
        session.export(made, tmp_path / "out", name)
    assert left_in(tmp_path) == ["model"]


def test_other_quantizers_and_mixed_rows_are_refused():
    exporter = get_exporter("mlx")
    matrix = ExportMatrix("m", 64, 64, QuantConfig(4, 32))
    for quantizer in ("nf4", "gptq", "hybrid-500"):
        with pytest.raises(InputError, match=quantizer):
            choose_types(exporter, [matrix], quantizer, 1)
    from lsq_core.bits import parse_config

    mixed = ExportMatrix("m", 64, 64, parse_config("b2h3r10g32"))
    with pytest.raises(InputError, match="b2h3r10g32"):
        choose_types(exporter, [mixed], "hqq", 1)


def test_unknown_tokenizer_is_refused_for_gguf(random_llama, tmp_path):
    import shutil

    folder = shutil.copytree(random_llama, tmp_path / "model")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf8"))
    split = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    last["trim_offsets"] = True
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, last]}
    path.write_text(json.dumps(content), "utf8")
    session, made = quantized(folder, base="b4g32")
    with pytest.raises(InputError, match="tokenizer"):
        session.export(made, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_changed_export_is_refused(random_llama, tmp_path):
    session, made = quantized(random_llama, base="b4g32")
    session.export(made, tmp_path / "out", "mlx")
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json"):
        read_export(tmp_path / "out")
    (tmp_path / "out" / EXPORT_FILE).write_text("{}")
    with pytest.raises(InputError, match="damaged"):
        read_export(tmp_path / "out")


# --- runs and the command line --------------------------------------------------------------------


def test_run_stores_both_runs_with_their_bytes(random_llama, text, tmp_path):
    session = Session(str(random_llama))
    plan = session.plan("uniform", base="b4g32")
    from lsq_core.evaluation.protocol import EvaluationRequest

    request = EvaluationRequest(text, "strided", 300)
    outcome = session.run(plan, "hqq", request, tmp_path / "out", export=ExportTarget("mlx"))
    rows = session.store.results().set_index("run")
    own, other = rows.loc[outcome["run"]], rows.loc[outcome["export"]["run"]]
    assert (own["format"], other["format"]) == ("lsq", "mlx")
    assert other["quantizer"] == "hqq as mlx"
    assert other["exported_from"] == outcome["run"]
    assert own["plan"] == other["plan"]
    assert other["measured_bytes"] == outcome["export"]["measured_bytes"] != own["measured_bytes"]
    assert other["perplexity_full"] == own["perplexity_full"]
    assert other["kl"] == pytest.approx(own["kl"], rel=0.05)
    assert other["saved_to"] == str(tmp_path / "out")
    with pytest.raises(InputError, match=outcome["run"]):
        rebuild_run(other.name, None, session.store)
    command = reproduce_command(session.store.record(other["evaluation"]))
    assert command.endswith(f"--save {tmp_path / 'out'} --format mlx --crossing refuse")
    found = session.store.find_evaluations(session.info.fingerprint, "uniform", "hqq")
    assert found["run"].tolist() == [outcome["run"]]


def test_convert_and_eval_on_the_command_line(random_llama, text, tmp_path, capsys):
    _, made = quantized(random_llama, base="b4g32")
    saved, out = made.save(tmp_path / "saved"), tmp_path / "out"
    arguments = ["convert", str(saved), "--out", str(out), "--format", "gguf", "--json"]
    arguments += ["--corpus", text, "--max-tokens", "300"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert is_exported_folder(out)
    assert result["exported_from"] == made.run
    evaluation = ["--corpus", text, "--max-tokens", "300", "--json"]
    assert main(["eval", "--model", str(out), *evaluation]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["run"] == result["run"]
    assert again["perplexity"] == result["perplexity"]
    [row] = Store().results().to_dict("records")
    assert (row["run"], row["format"]) == (result["run"], "gguf")
    # The folder exists now, so convert refuses to write to it.
    assert main(arguments) == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--format", "onnx", "--save", "x"], "onnx"),
        (["--format", "mlx"], "--save"),
        (["--format", "mlx", "--save", "x", "--crossing", "y"], "'y'"),
        (["--format", "mlx", "--save", ".", "--base", "b4g32"], "not empty"),
        (["--format", "mlx", "--save", "x", "--base", "b4g32", "--axis", "0"], "axis 0"),
    ],
)
def test_wrong_inputs_write_nothing(arguments, named, random_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    before = left_in(tmp_path)
    base = [] if "--base" in arguments else ["--base", "b4g32"]
    command = ["run", "--model", str(random_llama), "--method", "uniform", "--max-tokens", "300"]
    assert main([*command, *base, *arguments]) == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert left_in(tmp_path) == before


def test_exported_folder_can_be_pruned_unless_it_holds_more(random_llama, tmp_path):
    session, made = quantized(random_llama, base="b4g32")
    folder = disk.models_folder(session.store) / "out"
    session.export(made, folder, "mlx")
    (folder / "mine.txt").touch()
    [item] = [i for i in disk.list_disk_items(session.store) if i.path == folder]
    assert (item.kind, item.prunable) == ("exported model", False)
    (folder / "mine.txt").unlink()
    disk.prune(session.store, item.name)
    assert not folder.exists()


def test_convert_needs_the_original_model(random_llama, tmp_path):
    import shutil

    copy = shutil.copytree(random_llama, tmp_path / "model")
    _, made = quantized(copy, base="b4g32")
    saved = made.save(tmp_path / "saved")
    shutil.rmtree(copy)
    target = ExportTarget("gguf")
    with pytest.raises(InputError):
        export_saved(saved, tmp_path / "out", target, Store())
    assert not (tmp_path / "out").exists()


def test_load_exported_foreign_folder_raises(tmp_path):
    with pytest.raises(LsqError):
        load_exported(tmp_path, {"exported_as": "mlx"})
