"""Finding and inspecting models, and one-line errors for invalid ones."""

from __future__ import annotations

import json
import os
import re
import shutil

import httpx2 as httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lsq_core.errors import InputError, LsqError
from lsq_core.model.architecture import context_length
from lsq_core.model.loading import inspect_model, load_model, pick_device, pick_dtype
from lsq_core.model.source import (
    DEMO_FOLDER,
    ModelSource,
    find_model,
    fingerprint,
    read_demo_description,
)
from tests.conftest import save_random_model
from tests.helpers import update_config


def test_inspect_demo_model_sizes():
    info = inspect_model(ModelSource("demo"))
    assert (info.layers, info.parameters, len(info.matrices)) == (24, 5_642_368, 168)
    assert info.linear_parameters == 5_111_808
    assert info.coverage == pytest.approx(5_111_808 / 5_642_368)
    assert info.file_bytes == (DEMO_FOLDER / "model.safetensors").stat().st_size
    assert info.tied_embeddings
    assert info.other_bytes == 2 * (5_642_368 - 5_111_808)
    assert info.left_out == ()


def test_described_demo_matches_inspection(monkeypatch):
    described, info = read_demo_description(ModelSource("demo")), inspect_model(ModelSource("demo"))
    assert described == info
    assert described.config == info.config
    monkeypatch.setattr("lsq_core.model.source.fingerprint", lambda folder: "of other weights")
    assert read_demo_description(ModelSource("demo")) is None, "changed files are looked at anew"


def test_inspect_matrices_in_computation_order(random_model):
    for architecture in ("llama-gqa", "opt"):
        info = inspect_model(ModelSource(str(random_model(architecture))))
        types = [m.type.rpartition(".")[2] for m in info.matrices if m.layer == 0]
        assert types[:3] == ["q_proj", "k_proj", "v_proj"]


def test_inspect_experts_are_separate_matrices(random_model):
    info = inspect_model(ModelSource(str(random_model("mixtral-moe"))))
    experts = [m for m in info.matrices if m.expert is not None]
    assert {m.type for m in experts} == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert experts[3].name == "model.layers.0.mlp.experts.gate_up_proj.3"
    assert (experts[3].out_features, experts[3].in_features) == (256, 128)


def test_inspect_conv1d_shapes_are_out_by_in(random_model):
    info = inspect_model(ModelSource(str(random_model("gpt2-conv1d"))))
    shapes = {m.type: (m.out_features, m.in_features) for m in info.matrices}
    assert shapes["attn.c_attn"] == (384, 128)
    assert shapes["mlp.c_proj"] == (128, 512)


def test_inspect_lists_indivisible_matrices_as_left_out(tmp_path):
    sizes = {"hidden_size": 44, "num_attention_heads": 4, "head_dim": 12, "intermediate_size": 172}
    folder = save_random_model(tmp_path / "odd", "llama-gqa", **sizes)
    info = inspect_model(ModelSource(str(folder)))
    # 172×44 and 44×172 are not multiples of 32; 48×44 and 24×44 are
    assert {m.type for m in info.matrices} == {f"self_attn.{n}_proj" for n in ("q", "k", "v", "o")}
    left = {line.split(" in 2 of 2 layers, ")[0] for line in info.left_out}
    assert left == {f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    assert info.coverage < 1


def test_fingerprint_depends_on_content(tmp_path):
    folder = save_random_model(tmp_path / "a", "llama-gqa")
    shutil.copytree(folder, tmp_path / "b")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    config = json.loads((tmp_path / "b/config.json").read_text())
    config["transformers_version"] = "0"
    (tmp_path / "b/config.json").write_text(json.dumps(config))
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    path = tmp_path / "b/model.safetensors"
    state = load_file(path)
    name = next(n for n in state if "q_proj" in n)
    state[name][0, 0] += 1
    save_file(state, path, metadata={"format": "pt"})
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


# --- invalid models ---------------------------------------------------------------------------


def assert_refused(source: ModelSource | str, pattern: str, kind=InputError):
    source = ModelSource(source) if isinstance(source, str) else source
    with pytest.raises(kind, match=pattern) as caught:
        load_model(source, "cpu")
    assert "\n" not in str(caught.value), "one sentence"


def test_load_missing_folder_raises(tmp_path):
    assert_refused(str(tmp_path / "nothing"), "There is no folder .*nothing")


def test_load_folder_without_config_raises(tmp_path):
    assert_refused(str(tmp_path), "no config.json")


def test_load_invalid_config_json_raises(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert_refused(str(tmp_path), "cannot be read as JSON")


def test_load_without_weights_raises(model_copy):
    (model_copy / "model.safetensors").unlink()
    assert_refused(str(model_copy), "no .safetensors file")


def test_load_truncated_weights_raises(model_copy):
    path = model_copy / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    assert_refused(str(model_copy), r"model\.safetensors is truncated or damaged")
    os.truncate(path, 4)
    assert_refused(str(model_copy), r"model\.safetensors is not a complete safetensors file")
    path.write_bytes(b"x" * 1000)
    assert_refused(str(model_copy), "not a complete safetensors file")


def test_load_missing_shard_raises(model_copy):
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (model_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(str(model_copy), "lacks model-00002-of-00002.safetensors")
    (model_copy / "model.safetensors.index.json").write_text("{}")
    assert_refused(str(model_copy), "index.json cannot be read")


def test_load_missing_tensor_raises(model_copy):
    """Random weights instead would give the figures of another model."""
    tensors = load_file(model_copy / "model.safetensors")
    norms = [name for name in tensors if name.endswith("input_layernorm.weight")]
    kept = {name: tensor for name, tensor in tensors.items() if name not in norms}
    save_file(kept, model_copy / "model.safetensors", metadata={"format": "pt"})
    assert_refused(str(model_copy), rf"lack {re.escape(norms[0])} and {len(norms) - 1} more")


def test_fingerprint_ignores_consolidated_copy(model_copy):
    before = fingerprint(model_copy)
    shutil.copy(model_copy / "model.safetensors", model_copy / "consolidated.safetensors")
    assert fingerprint(model_copy) == before
    info = inspect_model(ModelSource(str(model_copy)))
    assert info.file_bytes == (model_copy / "model.safetensors").stat().st_size


def test_load_pickled_weights_requires_allow_pickle(model_copy):
    path = model_copy / "model.safetensors"
    torch.save(load_file(path), model_copy / "pytorch_model.bin")
    path.unlink()
    assert_refused(str(model_copy), "only pickled weights .*pytorch_model.bin.* allow pickle")
    assert load_model(ModelSource(str(model_copy), allow_pickle=True), "cpu").info.layers == 2


def test_load_quantized_checkpoint_raises(model_copy):
    update_config(model_copy, quantization_config={"quant_method": "gptq"})
    assert_refused(str(model_copy), r"already quantized \(gptq")


def test_load_encoder_raises(model_copy):
    config = {"model_type": "vit", "architectures": ["ViTModel"]}
    (model_copy / "config.json").write_text(json.dumps(config))
    assert_refused(str(model_copy), "not a decoder-only language model")


def test_load_decoder_without_linear_modules_raises(model_copy):
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=0, vocab_size=64, hidden_size=32).save_pretrained(model_copy)
    assert_refused(str(model_copy), "no decoder blocks with linear modules")


def test_load_without_tokenizer_raises(model_copy):
    for path in model_copy.glob("tokenizer*"):
        path.unlink()
    assert_refused(str(model_copy), "no tokenizer")


def test_load_weight_shape_mismatch_raises(model_copy):
    update_config(model_copy, intermediate_size=384)
    assert_refused(str(model_copy), "shape 128 × 256, but 128 × 384 by its config.json")


def test_load_remote_code_requires_trust(model_copy):
    update_config(model_copy, model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (model_copy / "mine.py").write_text("raise SystemExit('it was run')")
    assert_refused(str(model_copy), "--trust-remote-code")


def test_pick_device_and_dtype_unknown_raise():
    with pytest.raises(InputError, match="Device 'warp' is not available"):
        pick_device("warp")
    with pytest.raises(InputError, match="not a dtype"):
        pick_dtype("int3", torch.device("cpu"), None)


def test_load_too_little_memory_raises(monkeypatch, random_model):
    monkeypatch.setattr("lsq_core.model.loading.free_bytes", lambda device: 1000)
    assert_refused(str(random_model("llama-gqa")), r"needs .* and cpu has 1000 B free", LsqError)


def test_find_model_offline_raises():
    """Tests run offline; the hub's own error is translated."""
    with pytest.raises(LsqError, match=r"some-org/some-model.* Hugging Face"):
        find_model(ModelSource("some-org/some-model"))


def test_find_model_invalid_id_raises():
    with pytest.raises(InputError, match="Hugging Face id"):
        find_model(ModelSource("not an id!"))


def hub_error(kind: type[Exception]) -> Exception:
    request = httpx.Request("GET", "https://huggingface.co/x/y")
    return kind("no", response=httpx.Response(404, request=request))


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        (errors.RepositoryNotFoundError, "does not exist"),
        (errors.GatedRepoError, "gated.* HF_TOKEN"),
        (errors.RevisionNotFoundError, "no such revision"),
    ],
)
def test_find_model_hub_error_translated(monkeypatch, kind, pattern):
    def raise_hub_error(*args, **kwargs):
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", raise_hub_error)
    with pytest.raises(InputError, match=pattern):
        find_model(ModelSource("x/y", revision="z"))


def test_vocabulary_as_large_as_the_context_is_not_its_positions():
    config = LlamaConfig(
        vocab_size=64, max_position_embeddings=64, pad_token_id=0, hidden_size=16,
        intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    assert context_length(LlamaForCausalLM(config)) == 64
