"""The cache of quantized matrices, shared between plans."""

from __future__ import annotations

import torch

from lsq_core.bits import LADDER
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from lsq_core.quantization.cache import PackedMatrixCache
from lsq_core.quantization.packed import quantize_matrix
from lsq_core.quantization.registry import get_quantizer
from lsq_core.quantization.task import QuantizationTask
from lsq_core.quantized.convert import quantize_model
from lsq_core.quantized.modules import packed_modules
from lsq_core.settings import GridSettings


def packed(seed: int):
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(seed))
    return quantize_matrix(weight, LADDER[0], get_quantizer("rtn"))


def test_cache_evicts_least_recently_used():
    matrices = {key: packed(seed) for seed, key in enumerate("abc")}
    matrix_cache = PackedMatrixCache(2 * matrices["a"].nbytes)
    computed_keys = []

    def get(key):
        return matrix_cache.get(key, lambda: computed_keys.append(key) or matrices[key])

    for key in "abacab":  # c replaces b, which then replaces c
        assert get(key) is matrices[key]
    assert computed_keys == ["a", "b", "c", "b"]
    assert matrix_cache.bytes == matrix_cache.limit


def test_cache_item_above_limit_not_stored():
    matrix = packed(0)
    matrix_cache = PackedMatrixCache(matrix.nbytes - 1)
    assert matrix_cache.get("a", lambda: matrix) is matrix
    assert matrix_cache.bytes == 0
    assert matrix_cache.get("a", lambda: packed(0)) is not matrix


def test_quantize_model_with_cache_is_identical(random_model):
    loaded = load_model(ModelSource(str(random_model("mixtral-moe"))), "cpu")
    matrices = loaded.info.matrices
    first = dict.fromkeys(matrices, LADDER[1])
    second = first | dict.fromkeys(matrices[::3], LADDER[4])
    matrix_cache = PackedMatrixCache(2**30)
    for quantizer, axis, metadata in (("rtn", 1, "8bit"), ("hqq", 1, "8bit"), ("rtn", 0, "fp16")):
        for choice in (first, second):
            how = {"axis": axis, "metadata": metadata}
            by = get_quantizer(quantizer)
            uncached = quantize_model(
                QuantizationTask(loaded, choice, grid=GridSettings(**how)), by
            )
            cached = quantize_model(
                QuantizationTask(loaded, choice, grid=GridSettings(**how), cache=matrix_cache), by
            )
            pairs = zip(
                packed_modules(uncached).items(), packed_modules(cached).items(), strict=True
            )
            for (name, one), (same, other) in pairs:
                assert name == same
                for key, tensor in one.packed.tensors.items():
                    assert torch.equal(tensor, other.packed.tensors[key])
