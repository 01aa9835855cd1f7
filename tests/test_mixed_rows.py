"""Mixed rows: names, exact byte counts, and models saved and loaded with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsq_core.bits import (
    MIXED_ROW_CONFIGS,
    RATIOS,
    MixedRows,
    QuantConfig,
    config_from_json,
    matrix_bytes,
    mixed_rows,
    nominal_bytes,
    parse_config,
)
from lsq_core.errors import InputError
from lsq_core.model.architecture import get_weight
from lsq_core.model.info import Matrix
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from lsq_core.planning.plan import Plan
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.quantization import layout
from lsq_core.quantization.cache import PackedMatrixCache
from lsq_core.quantization.packed import quantize_matrix
from lsq_core.quantization.registry import (
    get_quantizer,
    incompatibility_reason,
    stored_matrix_class,
)
from lsq_core.quantization.rows import PackedRows, quantize_config
from lsq_core.quantization.task import QuantizationTask
from lsq_core.quantized.artifact import load_quantized, make_meta_tensors, save_quantized
from lsq_core.quantized.convert import quantize_model
from lsq_core.quantized.modules import measured_bytes, packed_modules
from lsq_core.results.audit import audit_folder, model_stored_layout
from lsq_core.stages.plan import request_incompatibility
from lsq_core.store.store import Store
from tests.conftest import packed_bytes


def make_matrix(out: int, columns: int) -> Matrix:
    return Matrix("m.0.x", 0, "x", out, columns)


@pytest.mark.parametrize("config", MIXED_ROW_CONFIGS, ids=lambda c: c.name)
def test_mixed_rows_name_and_entry_round_trip(config):
    assert parse_config(config.name) == config
    assert config_from_json(config.json_fields) == config


def test_config_of_entries():
    entry = {"bits": 2, "high_bits": 3, "ratio": 0.10, "group_size": 128}
    assert config_from_json(entry) == MixedRows(2, 3, 0.10, 128)
    assert config_from_json({"bits": 4, "group_size": 64}) == QuantConfig(4, 64)
    with pytest.raises(InputError, match=r"\b0\.3 .*\b0\.02"):
        config_from_json(entry | {"ratio": 0.3})
    with pytest.raises(InputError, match=r"high-bits .*4, 16.* 3"):
        mixed_rows(3, 3, 128)
    with pytest.raises(InputError, match=r"low-bits .*2, 3.* 4"):
        mixed_rows(4, 16, 128)
    with pytest.raises(InputError, match=r"group-size .*128, 64, 32.* 16"):
        PlanRequest("high-impact", group_size=16)


def test_mixed_rows_bytes_4096_matrix():
    """With 2 % of 4096 rows at 3 bits, 82 are listed in 164 bytes; a bitmap would take 512."""
    config, matrix = MixedRows(2, 3, 0.02, 128), make_matrix(4096, 4096)
    assert config.parts(matrix) == ((82 * 4096, config.high), (4014 * 4096, config.low))
    assert config.index_bytes(matrix) == 164
    assert replace(config, ratio=0.2).index_bytes(matrix) == 512
    high, low = (
        nominal_bytes(rows * 4096, c) for rows, c in ((82, config.high), (4014, config.low))
    )
    assert matrix_bytes(nominal_bytes, matrix, config) == high + low + 164
    assert MixedRows(2, 3, 0.02, 128).index_bytes(make_matrix(40_000, 128)) == 4 * 800


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(MIXED_ROW_CONFIGS),
    st.integers(1, 70),
    st.integers(1, 3),
    st.sampled_from(["8bit", "fp16"]),
    st.integers(0, 1),
    st.integers(0, 9),
)
def test_packed_rows_bytes_and_values_match_plan(config, out, wide, metadata, axis, seed):
    """Bytes and tensors match, and each row decodes as if its part were quantized separately."""
    matrix = make_matrix(out, 128 * wide)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, 128 * wide, generator=generator)
    rows = torch.randperm(out, generator=generator)[: config.high_rows(out)]
    quantizer = get_quantizer("rtn")
    packed = quantize_config(weight, config, quantizer, rows=rows, axis=axis, metadata=metadata)
    assert packed.nbytes == matrix_bytes(lambda n, c: packed_bytes(n, c, metadata), matrix, config)
    names = {torch.uint8: "U8", torch.float16: "F16", torch.int16: "I16"}
    actual = {n: (tuple(t.shape), names[t.dtype]) for n, t in packed.tensors.items()}
    assert actual == layout.packed(packed.shape, config, metadata)
    assert packed.is_high.nonzero().flatten().tolist() == sorted(rows.tolist())
    decoded = packed.dequantize()
    for part, own in ((packed.is_high, config.high), (~packed.is_high, config.low)):
        if not part.any():
            continue
        if own.bits == 16:
            # half an fp16 step; the smallest weights are subnormal at the stored scale
            torch.testing.assert_close(decoded[part], weight[part], rtol=2**-11, atol=2**-20)
            continue
        packed_part = quantize_matrix(weight[part], own, quantizer, axis=axis, metadata=metadata)
        assert torch.equal(decoded[part], packed_part.dequantize())
    again = PackedRows.from_tensors(packed.tensors, packed.shape, config, axis)
    assert torch.equal(again.dequantize(), decoded)
    empty = make_meta_tensors(layout.packed(packed.shape, config, metadata))
    kinds = {n: (t.shape, t.dtype) for n, t in packed.tensors.items()}
    assert {n: (t.shape, t.dtype) for n, t in empty.items()} == kinds
    assert stored_matrix_class("rtn", config) is PackedRows


def test_quantize_config_invalid_rows_raise():
    config, quantizer = MixedRows(2, 3, 0.1, 128), get_quantizer("rtn")
    with pytest.raises(InputError, match=r"q \(64×96\)"):
        quantize_config(torch.randn(64, 96), config, quantizer, rows=torch.arange(6), name="q")
    for rows in (None, torch.arange(5), torch.zeros(6, dtype=torch.int64)):
        with pytest.raises(InputError, match=r"\b6 .*b2h3r10g128"):
            quantize_config(torch.randn(64, 128), config, quantizer, rows=rows, name="q")


@pytest.mark.parametrize("architecture", ["llama-gqa", "mixtral-moe", "gpt2-conv1d"])
def test_saved_mixed_rows_model_same_logits(architecture, random_model, tmp_path):
    loaded = load_model(ModelSource(str(random_model(architecture))), "cpu")
    matrices, random = loaded.info.matrices, np.random.default_rng(0)
    options = [c for c in MIXED_ROW_CONFIGS if c.group_size == 32]
    configs = tuple(options[i % len(options)] for i in range(len(matrices)))
    rows = {
        m.name: tuple(sorted(random.permutation(m.out_features)[: c.high_rows(m.out_features)]))
        for m, c in zip(matrices, configs, strict=True)
    }
    plan = Plan(PlanRequest("high-impact"), matrices, configs, rows=rows)
    assert Plan.from_json(plan.to_json(), matrices, 0).rows == rows
    made = quantize_model(
        QuantizationTask(loaded, plan.choice, rows=plan.rows), get_quantizer("rtn")
    )
    assert measured_bytes(made) == plan.planned_bytes
    stored = model_stored_layout(made, plan.modules)
    assert all(stored[m.name] == layout.packed(m.shape, c, "8bit") for m, c in plan.choice.items())
    manifest = plan.to_json() | {"run": "r", "fingerprint": loaded.info.fingerprint}
    save_quantized(made, loaded.tokenizer, manifest, tmp_path / "saved", loaded.folder)
    again = load_quantized(tmp_path / "saved", "cpu").model
    ids = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, made(ids).logits)
        full = loaded.model(ids).logits
    assert not torch.equal(full, made(ids).logits)
    audit_report = audit_folder(tmp_path / "saved", Store())
    assert not audit_report.mismatches
    assert audit_report.stored_bytes == plan.planned_bytes


def test_nf4_refuses_mixed_rows():
    choice = {make_matrix(128, 128): MixedRows(2, 3, 0.1, 128)}
    for name in ("hqq", "rtn", "hybrid", "hybrid-50"):
        assert incompatibility_reason(name, choice) == ""
    assert "hqq, rtn or hybrid" in incompatibility_reason("nf4", choice)
    request = PlanRequest("high-impact", budget="2.3bpp")
    actual = request_incompatibility(Problem(tuple(choice)), request, "nf4", 1)
    assert actual == incompatibility_reason("nf4", choice)
    assert request_incompatibility(Problem(tuple(choice)), request, "hybrid", 1) == ""


def test_packed_matrix_cache_keyed_by_rows(random_model):
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")
    matrix, config = loaded.info.matrices[0], MixedRows(2, 3, 0.2, 32)
    first, count = PackedMatrixCache(2**30), config.high_rows(matrix.out_features)

    def made(rows: range) -> PackedRows:
        return packed_modules(
            quantize_model(
                QuantizationTask(loaded, {matrix: config}, rows={matrix.name: rows}, cache=first),
                get_quantizer("rtn"),
            )
        )[matrix.name].packed

    one, other, again = made(range(count)), made(range(1, count + 1)), made(range(count))
    assert again.index.data_ptr() == one.index.data_ptr()
    assert first.bytes == one.nbytes + other.nbytes
    assert other.is_high.nonzero().flatten().tolist() == list(range(1, count + 1))


def test_fp16_rows_are_exact(random_model):
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")
    matrix = loaded.info.matrices[0]
    weight = get_weight(loaded.model, matrix).half().float()
    config = MixedRows(2, 16, 0.2, 128)
    rows = torch.arange(config.high_rows(matrix.out_features))
    packed = quantize_config(weight, config, get_quantizer("hqq"), rows=rows)
    assert torch.equal(packed.dequantize()[rows], weight[rows])


def test_mixed_rows_bytes_increase_with_ratio():
    matrix = make_matrix(96, 256)
    sizes = [matrix_bytes(nominal_bytes, matrix, c) for c in mixed_rows(2, 3, 64)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(RATIOS)
