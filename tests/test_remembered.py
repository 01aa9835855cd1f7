"""Quantized matrices that are kept for the plans to come."""

from __future__ import annotations

import torch

from lsq_core.bits import LADDER
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from lsq_core.quantization.cache import Remembered
from lsq_core.quantization.packed import quantize_matrix
from lsq_core.quantization.registry import get_quantizer
from lsq_core.quantized.convert import quantize_model
from lsq_core.quantized.modules import packed_modules


def packed(seed: int):
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(seed))
    return quantize_matrix(weight, LADDER[0], get_quantizer("rtn"))


def test_the_least_recently_used_go_first():
    matrices = {key: packed(seed) for seed, key in enumerate("abc")}
    remembered = Remembered(2 * matrices["a"].nbytes)
    made = []

    def get(key):
        return remembered.get(key, lambda: made.append(key) or matrices[key])

    for key in "abacab":  # c takes the place of b, and b then that of c
        assert get(key) is matrices[key]
    assert made == ["a", "b", "c", "b"]
    assert remembered.bytes == remembered.limit


def test_what_is_larger_than_the_limit_is_not_kept():
    matrix = packed(0)
    remembered = Remembered(matrix.nbytes - 1)
    assert remembered.get("a", lambda: matrix) is matrix
    assert remembered.bytes == 0
    assert remembered.get("a", lambda: packed(0)) is not matrix


def test_a_model_made_from_what_is_remembered_is_the_same_to_the_bit(random_model):
    loaded = load_model(ModelSource(str(random_model("mixtral-moe"))), "cpu")
    matrices = loaded.info.matrices
    first = dict.fromkeys(matrices, LADDER[1])
    second = first | dict.fromkeys(matrices[::3], LADDER[4])
    remembered = Remembered(2**30)
    for quantizer, axis, metadata in (("rtn", 1, "8bit"), ("hqq", 1, "8bit"), ("rtn", 0, "fp16")):
        for choice in (first, second):
            how = {"axis": axis, "metadata": metadata}
            by = get_quantizer(quantizer)
            alone = quantize_model(loaded.model, choice, by, **how)
            shared = quantize_model(loaded.model, choice, by, **how, remembered=remembered)
            pairs = zip(packed_modules(alone).items(), packed_modules(shared).items(), strict=True)
            for (name, one), (same, other) in pairs:
                assert name == same
                for key, tensor in one.packed.tensors.items():
                    assert torch.equal(tensor, other.packed.tensors[key])
