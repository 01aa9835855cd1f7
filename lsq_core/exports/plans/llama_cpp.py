"""llama.cpp: a file for ``llama-quantize --tensor-type-file``, with a pattern and type per line.

Patterns are lower-cased ECMAScript regular expressions that are searched for in a tensor's name;
the first match wins, and only if the file's own type is quantized. If 256 does not divide the
number of columns, llama.cpp silently replaces a K-quant with a larger type, so none is used there
(``src/llama-quant.cpp``, ``tools/quantize/quantize.cpp``).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from lsq_core.exports.base import KEPT_BITS, Format, Module, PlanTarget, Translation
from lsq_core.exports.names import gguf_matrix_names
from lsq_core.model.info import Matrix, ModelInfo

_F16 = Format("f16", KEPT_BITS, None, float(KEPT_BITS))
#: Bits, group size and bits per weight, including scales; K-quants have blocks of 256 weights.
_K_QUANTS = (
    Format("q2_k", 2, 16, 2.625),
    Format("q3_k", 3, 16, 3.4375),
    Format("q4_k", 4, 32, 4.5),
    Format("q5_k", 5, 32, 5.5),
    Format("q6_k", 6, 16, 6.5625),
)
_LEGACY = (
    Format("q4_1", 4, 32, 5.0),
    Format("q4_0", 4, 32, 4.5),
    Format("q5_1", 5, 32, 6.0),
    Format("q5_0", 5, 32, 5.5),
    Format("q8_0", 8, 32, 8.5),
)


def modules(info: ModelInfo, matrices: Sequence[Matrix]) -> list[Module]:
    """Return the GGUF tensors of the planned matrices."""
    tensors = gguf_matrix_names(info.config, info.layers, matrices)
    parts: dict[Matrix, int] = {}
    for held in tensors.values():
        for matrix in held:
            parts[matrix] = parts.get(matrix, 0) + 1
    return [Module(name, tuple(held), parts[held[0]]) for name, held in tensors.items()]


def formats(out_features: int, in_features: int) -> tuple[Format, ...]:
    """Return the types with uniform grids whose block size divides a row."""
    found = () if in_features % 256 else _K_QUANTS
    return (*found, *(() if in_features % 32 else _LEGACY), _F16)


def write(translation: Translation) -> str:
    """Return one line per tensor, without comments."""
    lines = [f"^{re.escape(a.module.name)}$={a.format.name}" for a in translation.assignments]
    return "".join(f"{line}\n" for line in lines)


def usage(translation: Translation, file_name: str) -> str:
    """Return commands to convert and quantize a checkpoint; embeddings and head stay 16-bit."""
    model, types = shlex.quote(translation.model_path), shlex.quote(file_name)
    return f"""\
python convert_hf_to_gguf.py {model} --outtype f16 --outfile model-f16.gguf
llama-quantize --tensor-type-file {types} --token-embedding-type f16 \\
  --output-tensor-type f16 model-f16.gguf model.gguf Q8_0"""


def notes(translation: Translation) -> tuple[str, ...]:
    """Return a note on the base type if any matrix gets it."""
    if not translation.info.left_out:
        return ()
    return (
        "Matrices that the plan leaves out become Q8_0, the type of the command, unless "
        "llama-quantize keeps them as it does the gates of experts.",
    )


TARGET = PlanTarget(
    name="llama.cpp",
    title="llama.cpp",
    file_name="tensor-types.txt",
    modules=modules,
    formats=formats,
    write=write,
    usage=usage,
    usage_language="bash",
    notes=notes,
)
