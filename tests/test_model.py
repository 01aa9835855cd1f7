"""Finding and describing models, and one sentence for each thing that can be wrong with them."""

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

from lsq_core.errors import InputError, LsqError
from lsq_core.model.loading import inspect_model, load_model, pick_device, pick_dtype
from lsq_core.model.source import DEMO_FOLDER, ModelSource, described_demo, find_model, fingerprint
from tests.conftest import save_random_model


def test_the_demo_model_in_numbers():
    info = inspect_model(ModelSource("demo"))
    assert (info.layers, info.parameters, len(info.matrices)) == (24, 5_642_368, 168)
    assert info.linear_parameters == 5_111_808
    assert info.covered == pytest.approx(5_111_808 / 5_642_368)
    assert info.file_bytes == (DEMO_FOLDER / "model.safetensors").stat().st_size
    assert info.tied_embeddings
    assert info.other_bytes == 2 * (5_642_368 - 5_111_808)
    assert info.left_out == ()


def test_the_demo_model_is_described_as_it_is(monkeypatch):
    described, info = described_demo(ModelSource("demo")), inspect_model(ModelSource("demo"))
    assert described == info
    assert described.config == info.config
    monkeypatch.setattr("lsq_core.model.source.fingerprint", lambda folder: "of other weights")
    assert described_demo(ModelSource("demo")) is None, "changed files are looked at anew"


def test_modules_come_in_the_order_of_the_computation(random_model):
    for architecture in ("llama-gqa", "opt"):
        info = inspect_model(ModelSource(str(random_model(architecture))))
        types = [m.type.rpartition(".")[2] for m in info.matrices if m.layer == 0]
        assert types[:3] == ["q_proj", "k_proj", "v_proj"]


def test_each_expert_is_a_matrix_and_its_index_no_part_of_the_type(random_model):
    info = inspect_model(ModelSource(str(random_model("mixtral-moe"))))
    experts = [m for m in info.matrices if m.expert is not None]
    assert {m.type for m in experts} == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert experts[3].name == "model.layers.0.mlp.experts.gate_up_proj.3"
    assert (experts[3].out_features, experts[3].in_features) == (256, 128)


def test_transposed_weights_have_out_by_in_shapes(random_model):
    info = inspect_model(ModelSource(str(random_model("gpt2-conv1d"))))
    shapes = {m.type: (m.out_features, m.in_features) for m in info.matrices}
    assert shapes["attn.c_attn"] == (384, 128)
    assert shapes["mlp.c_proj"] == (128, 512)


def test_matrices_that_no_group_fills_are_left_out_by_name(tmp_path):
    sizes = {"hidden_size": 44, "num_attention_heads": 4, "head_dim": 12, "intermediate_size": 172}
    folder = save_random_model(tmp_path / "odd", "llama-gqa", **sizes)
    info = inspect_model(ModelSource(str(folder)))
    # 172×44 and 44×172 are no multiples of 32; 48×44 and 24×44 are
    assert {m.type for m in info.matrices} == {f"self_attn.{n}_proj" for n in ("q", "k", "v", "o")}
    left = {line.split(" in 2 of 2 layers, ")[0] for line in info.left_out}
    assert left == {f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    assert info.covered < 1


def test_a_fingerprint_is_of_the_content(tmp_path):
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


# --- what can be wrong ------------------------------------------------------------------------


def refused(source: ModelSource | str, pattern: str, kind=InputError):
    source = ModelSource(source) if isinstance(source, str) else source
    with pytest.raises(kind, match=pattern) as caught:
        load_model(source, "cpu")
    assert "\n" not in str(caught.value), "one sentence"


def test_a_folder_that_is_not_there(tmp_path):
    refused(str(tmp_path / "nothing"), "There is no folder .*nothing")


def test_a_folder_that_is_no_model(tmp_path):
    refused(str(tmp_path), "no config.json")


def test_a_config_that_is_no_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    refused(str(tmp_path), "cannot be read as JSON")


@pytest.fixture
def copy(random_model, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(random_model("llama-gqa"), folder)
    return folder


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    refused(str(copy), "no .safetensors file")


def test_truncated_weights(copy):
    path = copy / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    refused(str(copy), r"model\.safetensors is truncated or damaged")
    os.truncate(path, 4)
    refused(str(copy), r"model\.safetensors is not a whole safetensors file")
    path.write_bytes(b"x" * 1000)
    refused(str(copy), "not a whole safetensors file")


def test_a_missing_shard(copy):
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(str(copy), "lacks model-00002-of-00002.safetensors")
    (copy / "model.safetensors.index.json").write_text("{}")
    refused(str(copy), "index.json cannot be read")


def test_a_weight_that_the_checkpoint_lacks(copy):
    """Random ones in its place would give figures of another model."""
    tensors = load_file(copy / "model.safetensors")
    norms = [name for name in tensors if name.endswith("input_layernorm.weight")]
    kept = {name: tensor for name, tensor in tensors.items() if name not in norms}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    refused(str(copy), rf"have no {re.escape(norms[0])} and {len(norms) - 1} more")


def test_a_second_copy_of_the_weights_is_not_counted(copy):
    before = fingerprint(copy)
    shutil.copy(copy / "model.safetensors", copy / "consolidated.safetensors")
    assert fingerprint(copy) == before
    info = inspect_model(ModelSource(str(copy)))
    assert info.file_bytes == (copy / "model.safetensors").stat().st_size


def test_pickled_weights_only_when_allowed(copy):
    path = copy / "model.safetensors"
    torch.save(load_file(path), copy / "pytorch_model.bin")
    path.unlink()
    refused(str(copy), "only pickled weights .*pytorch_model.bin.* allow pickle")
    assert load_model(ModelSource(str(copy), allow_pickle=True), "cpu").info.layers == 2


def test_a_model_that_is_quantized_already(copy):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (copy / "config.json").write_text(json.dumps(config))
    refused(str(copy), r"already quantized \(gptq")


def test_an_encoder_is_no_decoder(copy):
    config = {"model_type": "vit", "architectures": ["ViTModel"]}
    (copy / "config.json").write_text(json.dumps(config))
    refused(str(copy), "not a decoder-only language model")


def test_a_decoder_without_linear_blocks(copy):
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=0, vocab_size=64, hidden_size=32).save_pretrained(copy)
    refused(str(copy), "no decoder blocks with linear modules")


def test_a_folder_without_a_tokenizer(copy):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    refused(str(copy), "no tokenizer")


def test_weights_of_another_shape(copy):
    config = json.loads((copy / "config.json").read_text())
    config["intermediate_size"] = 384
    (copy / "config.json").write_text(json.dumps(config))
    refused(str(copy), "shape 128 × 256, but 128 × 384 by its config.json")


def test_remote_code_is_not_run_unasked(copy):
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "mine.py").write_text("raise SystemExit('it was run')")
    refused(str(copy), "--trust-remote-code")


def test_no_such_device():
    with pytest.raises(InputError, match="no device 'warp'"):
        pick_device("warp")
    with pytest.raises(InputError, match="not a dtype"):
        pick_dtype("int3", torch.device("cpu"), None)


def test_too_little_memory(monkeypatch, random_model):
    monkeypatch.setattr("lsq_core.model.loading._free_bytes", lambda device: 1000)
    refused(str(random_model("llama-gqa")), r"needs .* and cpu has 1000 B free", LsqError)


def test_no_network():
    """Offline is how the test environment runs; the hub's own error is translated."""
    with pytest.raises(LsqError, match=r"some-org/some-model.* Hugging Face"):
        find_model(ModelSource("some-org/some-model"))


def test_what_is_no_id_either():
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
def test_what_the_hub_says_becomes_a_sentence(monkeypatch, kind, pattern):
    def answer(*args, **kwargs):
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    with pytest.raises(InputError, match=pattern):
        find_model(ModelSource("x/y", revision="z"))
