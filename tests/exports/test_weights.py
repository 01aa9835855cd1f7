"""Exported models, loaded by the tools they are written for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lsq_core.session import Session
from tests.conftest import ROOT

DEMO = ROOT / "data" / "demo_model"
#: Every bit width and group size of the ladder, on the demo model.
PINS = ("*.layers.0.*=b8g32", "*.layers.1.*=b2g32", "*.layers.2.*=b3g128", "*.layers.3.*=b4g128")
IDS = list(range(5, 60))


def export(name: str, folder: Path, **request: object) -> tuple[Session, object, object]:
    session = Session(str(DEMO))
    made = session.quantize(session.plan("uniform", **request))
    return session, made, session.export(made, folder, name)


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits.float().numpy()


def test_mlx_lm_gives_our_logits_and_generates(tmp_path):
    mx, mlx_lm = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm")
    mx.set_default_device(mx.cpu)
    _, made, _ = export("mlx", tmp_path / "out", base="b4g64", pins=PINS)
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    model.set_dtype(mx.float32)  # leaves only the rounding of scales to fp16
    theirs, ours = np.array(model(mx.array([IDS]))), logits(made.model)
    assert np.abs(theirs - ours).max() < 2e-3 * np.abs(ours).max()
    text = mlx_lm.generate(model, tokenizer, prompt="Return the", max_tokens=8)
    assert tokenizer.encode(text)


def test_transformers_loads_compressed_tensors(tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    _, _, decoded = export("compressed-tensors", tmp_path / "out", base="b4g64", pins=PINS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    np.testing.assert_allclose(logits(model), logits(decoded.model), atol=1e-4)


def test_compressed_tensors_decodes_whole_zero_points(tmp_path):
    """The package's decoder agrees with the one used where the package isn't installed."""
    pytest.importorskip("compressed_tensors")
    from safetensors.torch import load_file

    from lsq_core.exports.weights import compressed_tensors as ours

    export("compressed-tensors-asym", tmp_path / "out", base="b4g64", pins=PINS)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    exporter = ours.CompressedTensorsAsymmetric("refuse", "BF16")
    for layer, (bits, size) in enumerate([(8, 32), (2, 32), (3, 128), (4, 128), (4, 64)]):
        name = f"model.layers.{layer}.mlp.up_proj"
        parts = {part: tensors[f"{name}.{part}"] for part in exporter.parts}
        theirs, own = exporter.decode(parts, bits, size), exporter.decode_here(parts, bits, size)
        assert torch.equal(theirs.float(), own)


def test_k_quants_are_written_where_their_writer_is(tmp_path):
    pytest.importorskip("auto_round")
    import gguf

    from tests.conftest import save_random_model

    folder = save_random_model(
        tmp_path / "model", "llama-gqa", hidden_size=256, head_dim=64, intermediate_size=512
    )
    session = Session(str(folder))
    pins = ("*.layers.0.*=b2g32", "*.layers.1.self_attn.*=b3g32")
    made = session.quantize(session.plan("uniform", base="b4g64", pins=pins))
    session.export(made, tmp_path / "out", "gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    for name, kind, module, most in (
        ("blk.0.ffn_up", "Q2_K", "model.layers.0.mlp.up_proj", 0.15),
        ("blk.1.attn_v", "Q3_K", "model.layers.1.self_attn.v_proj", 0.04),
        ("blk.1.ffn_up", "Q4_K", "model.layers.1.mlp.up_proj", 0.01),
    ):
        tensor = tensors[f"{name}.weight"]
        assert tensor.tensor_type.name == kind
        weight = session.loaded.model.get_submodule(module).weight.detach().numpy()
        decoded = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert ((decoded - weight) ** 2).mean() < most * (weight**2).mean()


def test_llama_cpp_gives_our_logits(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    _, made, _ = export("gguf", tmp_path / "out", base="b4g32")
    file = str(tmp_path / "out" / "model.gguf")
    llama = llama_cpp.Llama(file, n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    llama.eval(IDS)
    theirs, ours = np.array(llama.scores[: len(IDS)]), logits(made.model)[0]
    # llama.cpp rounds activations to 8 bits for its products.
    assert np.abs(theirs - ours).mean() < 0.02 * np.abs(ours).mean()
    assert (theirs.argmax(-1) == ours.argmax(-1)).mean() > 0.9
    text = "def f(x):\n    return x + 12"
    assert (
        llama.tokenize(text.encode(), add_bos=False) == made.original.tokenizer(text)["input_ids"]
    )
