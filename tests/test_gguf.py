"""GGUF files as models: dequantized once, identified by content, rejected with a short error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lsq_core.cli.program import main
from lsq_core.errors import InputError
from lsq_core.model import gguf
from lsq_core.model.architecture import get_weight
from lsq_core.model.identity import identify
from lsq_core.model.loading import load_model
from lsq_core.model.source import DEMO_FOLDER, ModelSource, default_model, find_model
from lsq_core.model.streaming import open_streamed
from lsq_core.quantization.packed import quantize_matrix
from lsq_core.quantization.registry import get_quantizer

needs_smollm2 = pytest.mark.skipif(
    gguf.smollm2_file() is None, reason="SmolLM2 is not installed; run 'make smollm2'"
)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A data folder for this test only; it does not exist yet."""
    monkeypatch.setenv("LSQ_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory) -> Path:
    """The demo model as a GGUF file: matrices in Q8_0, the rest in float32."""
    return write_gguf(DEMO_FOLDER, tmp_path_factory.mktemp("gguf") / "demo.gguf")


def write_gguf(folder: Path, target: Path) -> Path:
    """Write a Llama model to a GGUF file as llama.cpp's converter does."""
    from gguf import GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants
    from gguf.constants import MODEL_ARCH

    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(target, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    _write_tokenizer(writer, folder)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            weight = file.get_tensor(name).float().numpy()
            for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
                if name.endswith(f"{part}.weight"):  # llama.cpp interleaves the halves of a head
                    shape = (count, 2, -1, weight.shape[1])
                    weight = weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)
            kind = GGMLQuantizationType.Q8_0 if weight.ndim == 2 else GGMLQuantizationType.F32
            target_name = names.get_name(name, try_suffixes=(".weight",))
            writer.add_tensor(target_name, quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _write_tokenizer(writer: object, folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def test_dequantized_weights_match_file(demo_gguf, home):
    """Every weight is within half a Q8_0 step of the original, plus fp16 rounding."""
    made = load_model(ModelSource(str(demo_gguf)), "cpu")
    original = load_model(ModelSource("demo"), "cpu")
    assert [m.name for m in made.info.matrices] == [m.name for m in original.info.matrices]
    for matrix in made.info.matrices:
        one, other = get_weight(made.model, matrix), get_weight(original.model, matrix)
        step = other.abs().reshape(-1, 32).amax(1, keepdim=True) / 127
        assert ((one - other).reshape(-1, 32).abs() <= 0.65 * step).all()
    ids = torch.arange(100, 140)[None]
    difference = made.model(ids).logits - original.model(ids).logits
    assert float(difference.std() / original.model(ids).logits.std()) < 0.02
    text = "Return the number of bytes."
    assert made.tokenizer(text)["input_ids"] == original.tokenizer(text)["input_ids"]


def test_gguf_streams_like_folder(demo_gguf, home):
    source = ModelSource(str(demo_gguf))
    ids = torch.arange(50)[None]
    loaded, streamed = load_model(source, "cpu"), open_streamed(source, "cpu")
    states = streamed.first_block_output(ids)
    hidden = loaded.model.model(ids, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(states, hidden, atol=1e-5)


def test_identity_is_of_content(demo_gguf, home, tmp_path):
    """It does not depend on dequantization or the file's name, and changes with the content."""
    moved = Path(shutil.copy(demo_gguf, tmp_path / "other.gguf"))
    before = identify(ModelSource(str(demo_gguf)))
    info = load_model(ModelSource(str(moved)), "cpu").info
    assert info.fingerprint == before.fingerprint == identify(ModelSource(str(moved))).fingerprint
    assert info.tokenizer == before.tokenizer
    assert info.file_bytes == demo_gguf.stat().st_size
    assert info.config["gguf"]["type"] == "Q8_0"
    assert info.config["gguf"]["block_bytes"] == sum(m.numel for m in info.matrices) * 34 // 32
    assert any("Q8_0" in note for note in info.notes)
    raw = bytearray(moved.read_bytes())
    raw[-1] ^= 1
    moved.write_bytes(raw)
    assert identify(ModelSource(str(moved))).fingerprint != before.fingerprint


def test_dequantized_once(demo_gguf, home):
    folder = find_model(ModelSource(str(demo_gguf)))
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert find_model(ModelSource(str(demo_gguf))) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_half_made_folder_is_made_again(demo_gguf, home):
    folder = find_model(ModelSource(str(demo_gguf)))
    shutil.rmtree(folder)
    leftover = folder.parent / ".abc"
    leftover.mkdir()
    assert find_model(ModelSource(str(demo_gguf))) == folder
    assert (folder / "config.json").is_file()


@pytest.mark.parametrize("damage", ["empty", "magic", "truncated", "header", "noise"])
def test_damaged_file_is_one_sentence(damage, demo_gguf, home, tmp_path):
    raw = bytearray(demo_gguf.read_bytes())
    if damage == "empty":
        raw = bytearray()
    elif damage == "magic":
        raw[:4] = b"ABCD"
    elif damage == "truncated":
        raw = raw[: len(raw) // 2]
    elif damage == "header":
        raw[8:24] = b"\xff" * 16  # counts of tensors and metadata entries
    else:
        raw[24:4096] = np.random.default_rng(0).bytes(4072)
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        load_model(ModelSource(str(path)), "cpu")
    assert "\n" not in str(caught.value)
    assert "bad.gguf" in str(caught.value)
    folders = list((home / "gguf").iterdir()) if (home / "gguf").is_dir() else []
    assert not folders


def test_missing_file_exits_2(tmp_path, capsys):
    command = ["inspect", "--model", str(tmp_path / "none.gguf"), "--db", str(tmp_path / "db")]
    assert main(command) == 2
    assert "none.gguf" in capsys.readouterr().err


def test_folder_of_gguf_names_the_file(demo_gguf):
    with pytest.raises(InputError, match=r"demo\.gguf"):
        find_model(ModelSource(str(demo_gguf.parent)))


def test_uninstalled_smollm2_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(gguf, "smollm2_file", lambda: None)
    monkeypatch.delenv("LSQ_MODEL")
    assert default_model() == "demo"
    with pytest.raises(InputError, match="make smollm2"):
        find_model(ModelSource("smollm2"))


# --- SmolLM2 ---------------------------------------------------------------------------------


@needs_smollm2
def test_smollm2_folder_equals_transformers_gguf():
    """The folder made from the file gives the same logits as the file read by transformers."""
    from transformers import AutoModelForCausalLM

    made = load_model(ModelSource("smollm2"), "cpu")
    file = gguf.smollm2_file()
    direct = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    ids = made.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        one, other = made.model(ids).logits[0, -1], direct(ids).logits[0, -1]
    assert torch.allclose(one.log_softmax(-1), other.log_softmax(-1), atol=0.02)
    assert made.tokenizer.decode(one.argmax()) == " Paris"


@needs_smollm2
def test_smollm2_is_nearly_b4g32():
    """Its matrices were stored in blocks of 32 with 16 values each, which b4g32 recovers."""
    from lsq_core.bits import QuantConfig

    made = load_model(ModelSource("smollm2"), "cpu")
    weight = get_weight(made.model, made.info.matrices[40])
    errors = {}
    for group_size in (32, 64):
        stored = quantize_matrix(
            weight, QuantConfig(4, group_size), get_quantizer("rtn"), metadata="fp16"
        )
        errors[group_size] = float((stored.dequantize() - weight).norm() / weight.norm())
    assert errors[32] < 0.01 < 0.05 < errors[64]
