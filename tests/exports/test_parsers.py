"""Other tools read the plans written for them, with code of their own (`make exports-test`).

Every module gets the bits and the group that were planned, and no other module gets any.
"""

from __future__ import annotations

import copy
import importlib
import json
from typing import TYPE_CHECKING

import pytest

from lsq_core.exports.base import Translation
from lsq_core.exports.registry import export_plan
from tests.exports.cases import Case, mixed_plan

if TYPE_CHECKING:
    from torch import nn

    Settings = dict[str, tuple[int, int | None]]


def tool(module: str, package: str):
    """A tool's module; without it the test is skipped by its name."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{package} is not installed here ({error}); run 'make exports-test'")


def exported(case: Case, target: str, *, experts_alike: bool = False) -> Translation:
    """Every configuration of the ladder, as planned."""
    plan = mixed_plan(case.info, experts_alike=experts_alike)
    return export_plan(plan, case.info, target)


def planned(translation: Translation) -> Settings:
    """Bits and group size of each module, as in the plan itself."""
    choice = translation.plan.choice
    found = {}
    for assignment in translation.assignments:
        (config,) = {choice[matrix] for matrix in assignment.module.matrices}
        found[assignment.module.name] = config.bits, config.group_size
    return found


def load(case: Case, *, experts_apart: bool = False) -> nn.Module:
    """The model in memory; its experts as linear modules where a tool takes them apart."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case.folder)
    if experts_apart and any(m.expert is not None for m in case.info.matrices):
        tool("defuser", "Defuser").convert_model(model)
    return model


def linear_names(model: nn.Module) -> list[str]:
    """The linear modules of a model."""
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
        if entry["fixed_by_user"] and entry["bits"] < 16  # gates of one row stay in 16 bits
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
    """The names that a plan written in Python defines."""
    defined: dict = {}
    exec(text, defined)
    return defined
