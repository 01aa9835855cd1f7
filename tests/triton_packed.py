"""Compare the GPU kernels for packed matrices with PyTorch; run with ``TRITON_INTERPRET=1``.

With the argument ``compile``, compile them for a GPU instead, which needs no GPU.
"""

from __future__ import annotations

import sys
from itertools import product
from unittest.mock import PropertyMock, patch

import torch

from lsq_core.bits import QuantConfig
from lsq_core.quantization import packed_triton
from lsq_core.quantization.packed import PackedMatrix, quantize_matrix
from lsq_core.quantization.registry import get_quantizer
from lsq_core.quantized.modules import PackedLinear

BITS = (1, 2, 3, 4, 5, 6, 8)
#: (out, in) and group size: more rows than one program computes; groups that cross rows, enough of
#: them for more than one range of 8-bit metadata.
SHAPES = (((40, 128), 64), ((30, 144), 32))


def make_matrix(
    shape: tuple[int, int], group_size: int, bits: int, axis: int, metadata: str, spread: float
) -> PackedMatrix:
    torch.manual_seed(0)
    weight = spread * torch.randn(shape)
    config = QuantConfig(bits, group_size)
    return quantize_matrix(weight, config, get_quantizer("rtn"), axis=axis, metadata=metadata)


def check(matrix: PackedMatrix, dtype: torch.dtype) -> None:
    """Check decoded weights, and products for one and five tokens."""
    expected = matrix.dequantize(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    decoded = packed_triton.decode(matrix, dtype)
    torch.testing.assert_close(decoded, expected, rtol=tolerance, atol=0)
    for tokens in (1, 5):
        inputs = torch.randn(tokens, matrix.shape[1]).to(dtype)
        found = packed_triton.multiply(matrix, inputs)
        assert found.dtype == dtype
        exact = inputs.double() @ matrix.dequantize().double().T
        error = float((found.double() - exact).norm() / exact.norm())
        assert error < tolerance, error


def check_module() -> None:
    """Check that a module uses the kernel for few tokens and PyTorch for more."""
    matrix = make_matrix((40, 128), 64, 3, 1, "8bit", 0.02)
    module = PackedLinear(matrix, torch.ones(40))
    few, many = torch.randn(2, 3, 128), torch.randn(2, 30, 128)
    expected = module(few), module(many)
    assert module.kernel == "pytorch"
    on_gpu = PropertyMock(return_value=True)
    with (
        patch.object(PackedMatrix, "uses_triton", on_gpu),
        patch.object(packed_triton, "multiply", wraps=packed_triton.multiply) as multiply,
    ):
        assert module.kernel == "triton"
        for inputs, outputs in zip((few, many), expected, strict=True):
            torch.testing.assert_close(module(inputs), outputs, rtol=1e-5, atol=1e-6)
        assert multiply.call_count == 1
        module(few.clone().requires_grad_()).sum().backward()
        assert multiply.call_count == 1, "gradients go through PyTorch's product"


def run_interpreted() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    kinds = product(SHAPES, BITS, (0, 1), ("8bit", "fp16"))
    matrices = [make_matrix(*shape, *kind, spread=0.02) for shape, *kind in kinds]
    # magnitudes outside the range of fp16, stored with an exponent
    matrices += [make_matrix(*SHAPES[1], 3, 1, "8bit", spread) for spread in (1e-20, 1e20)]
    for number, matrix in enumerate(matrices):
        ordinary = int(matrix.scale.exponent.abs()) < 40
        check(matrix, dtypes[number % 3] if ordinary else torch.float32)
    check_module()
    print(len(matrices), "matrices")


def compile_kernels() -> None:
    """Compile both kernels to machine code for 3 and 4 bits along both axes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lsq_core.quantization import packed_kernels

    tensors = {"codes": "*u8", "scale_values": "*u8", "scale_ranges": "*fp16"}
    tensors |= {"scale_exponent": "*i16", "zero_values": "*u8", "zero_ranges": "*fp16"}
    sizes = ("code_bytes", "groups")
    own = {
        packed_kernels.decode: ({"weights": "*bf16"}, ("count",), {"BLOCK": 1024}),
        packed_kernels.multiply: (
            {"outputs": "*bf16", "inputs": "*bf16"},
            ("rows", "columns"),
            {"ROWS": 32, "COLUMNS": 128},
        ),
    }
    flags = {"SCALE_RANGES": True, "ZERO_RANGES": True, "EXPONENT": True}
    for bits, axis, (kernel, parts) in product((3, 4), (0, 1), own.items()):
        pointers, numbers, blocks = parts
        constants = {"BITS": bits, "SIZE": 64, "META": 128, "AXIS": axis, **flags, **blocks}
        signature = pointers | tensors | dict.fromkeys((*numbers, *sizes), "i32")
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
    print("compiled")


if __name__ == "__main__":
    compile_kernels() if sys.argv[1:] == ["compile"] else run_interpreted()
