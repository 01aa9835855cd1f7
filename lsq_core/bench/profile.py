"""A full profile in one pass, against the way its authors measured: one run per configuration.

Theirs is a plain implementation of the description in method §2 and §8. For every configuration the
model is loaded, the inputs of each block's modules are captured with hooks, a part's weights are
overwritten with those quantized by ``hqq``, and outputs are compared. Since that spoils the
weights, single modules take another run. Weight errors take a pass over the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import scipy.stats
import torch
from hqq.core.quantize import Quantizer as HqqPackage
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lsq_core.bench import Pair, Row, time_call
from lsq_core.bits import LADDER, QuantConfig
from lsq_core.model.loading import load_tokenizer
from lsq_core.model.source import DEMO_FOLDER, ModelSource
from lsq_core.model.streaming import StreamedModel, open_streamed
from lsq_core.profiling.agreement import rank_correlation
from lsq_core.profiling.calibration import load_calibration
from lsq_core.profiling.measure import measure_profile
from lsq_core.profiling.metrics import default_metrics
from lsq_core.profiling.profile import Profile
from lsq_core.profiling.settings import ProfileSettings

#: Few texts of the demo's calibration corpus, so that ten runs of both sides take a minute, with
#: scale and zero stored as in hqq's layers, so that both sides measure the same weights.
SETTINGS = ProfileSettings(samples=14, metadata="fp16")
#: Scores by (metric, module).
Scores = dict[tuple[str, str], float]

_LINEAR = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
#: Modules to quantize together, and the module whose output is compared.
_PARTS = (
    (_LINEAR[:3], "self_attn"),
    (_LINEAR[3:4], "self_attn.o_proj"),
    (_LINEAR[4:6], "mlp"),
    (_LINEAR[6:], "mlp.down_proj"),
)
_SINGLE_MODULES = tuple(((name,), name) for name in _LINEAR)


def profile(repeats: int, settings: ProfileSettings = SETTINGS) -> Row:
    """Compare profiles of the demo; theirs is one configuration per repeat, times twelve.

    Their runs for different configurations share nothing and do the same work, so twelve take
    twelve times as long; kurtosis, which has no configuration, is measured once.
    """
    ours: list[Profile] = []
    theirs: dict[QuantConfig, Scores] = {}
    ids = torch.from_numpy(load_calibration(open_demo(), settings.text).ids)
    seconds = []
    theirs_at(LADDER[0], ids), measure_ours(settings)
    for repeat in range(repeats):
        config = LADDER[(7 + 5 * repeat) % len(LADDER)]  # twelve repeats cover all of them
        one = time_call(lambda: ours.append(measure_ours(settings)))
        each = time_call(lambda c=config: theirs.update({c: theirs_at(c, ids)}))
        seconds.append((one, each * len(LADDER) + time_call(_their_kurtosis)))
    pairs = list(compared(ours[-1], theirs))
    error = max(float(np.max(np.abs(a / b - 1))) for a, b in pairs)
    ranks = min(rank_correlation(a, b) for a, b in pairs)
    return Row(
        id="profile",
        what=f"profile of the demo: {len(ours[-1].matrices)} matrices, {len(LADDER)} configurations"
        f", {ids.numel():,} tokens",
        ours="one load, one pass",
        theirs="one load and pass per configuration, measured at one, times 12",
        **Pair(*np.array(seconds).T).figures,
        error=error if ranks >= 0.999 else float("nan"),
        error_limit=0.01,
        error_is="largest relative difference of a score (rank correlation at least 0.999)",
        target=10,
        details={
            "tokens": ids.numel(),
            "rank_correlation": ranks,
            "configurations_of_theirs": [config.name for config in theirs],
        },
    )


def open_demo() -> StreamedModel:
    """Open the demo model as profiling does."""
    return open_streamed(ModelSource("demo"), "cpu")


def measure_ours(settings: ProfileSettings) -> Profile:
    return measure_profile(open_demo(), settings, "bench", metrics=default_metrics())


def compared(ours: Profile, theirs: dict[QuantConfig, Scores]) -> Iterator[tuple]:
    """Yield our scores and theirs, (n,) each, for every metric and configuration they measured."""
    names = [m.name for m in ours.matrices]
    for config, scores in theirs.items():
        for metric in ("weight_error", "sensitivity", "sensitivity_module"):
            found = np.array([scores[metric, name] for name in names])
            yield ours.scores(metric, config), found
    kurtosis = _their_kurtosis()
    yield ours.scores("kurtosis"), np.array([kurtosis[name] for name in names])


# --- the authors' way -------------------------------------------------------------------------


@torch.no_grad()
def theirs_at(config: QuantConfig, ids: Tensor) -> Scores:
    """Return all their scores at one configuration."""
    return (
        _weight_errors(config)
        | _sensitivities("sensitivity", _PARTS, config, ids)
        | _sensitivities("sensitivity_module", _SINGLE_MODULES, config, ids)
    )


def _quantized(weight: Tensor, config: QuantConfig) -> Tensor:
    """Return the nearest weights on ``hqq``'s grid, with 16-bit scale and zero as in its layers.

    Ours rounds to the stored grid; without this step the two would measure different weights.
    """
    _, meta = HqqPackage.quantize(
        weight, nbits=config.bits, group_size=config.group_size, axis=1, device="cpu", bitpack=False
    )
    scale, zero = (meta[name].half().float() for name in ("scale", "zero"))
    groups = weight.view(-1, config.group_size)
    codes = (groups / scale + zero).round_().clamp_(0, 2**config.bits - 1)
    return ((codes - zero) * scale).view_as(weight)


def _stored_weights() -> Iterator[tuple[str, Tensor]]:
    """Yield the name and float32 weight of every linear module in the demo's file."""
    with safe_open(DEMO_FOLDER / "model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dictionary
            if key.endswith("_proj.weight"):
                yield key.removesuffix(".weight"), file.get_tensor(key).float()


def _weight_errors(config: QuantConfig) -> Scores:
    return {
        ("weight_error", name): float(torch.norm(weight - _quantized(weight, config)))
        for name, weight in _stored_weights()
    }


def _their_kurtosis() -> dict[str, float]:
    return {
        name: scipy.stats.kurtosis(weight.double().numpy(), axis=None, fisher=False)
        for name, weight in _stored_weights()
    }


def _sensitivities(metric: str, parts: tuple, config: QuantConfig, ids: Tensor) -> Scores:
    """Do one run: load the model, then capture inputs and compare parts block by block."""
    load_tokenizer(ModelSource("demo"), DEMO_FOLDER)
    model = AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32).eval()
    hidden, kwargs = _first_inputs(model, ids)
    scores = {}
    for layer, block in enumerate(model.model.layers):
        hidden, inputs = _capture_inputs(block, hidden, kwargs)
        for names, output in parts:
            module = block.get_submodule(output)
            given = kwargs if output == "self_attn" else {}
            before = _first_output(module(inputs[names[0]], **given))
            for name in names:
                linear = block.get_submodule(name)
                linear.weight.data = _quantized(linear.weight.data, config)
            after = _first_output(module(inputs[names[0]], **given))
            value = (before - after).float().pow(2).mean().item()
            scores |= {(metric, f"model.layers.{layer}.{name}"): value for name in names}
    return scores


def _first_inputs(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict]:
    """Return the hidden states and keyword arguments that the first block is called with."""
    found: list[tuple[Tensor, dict]] = []

    def capture(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append((args[0], kwargs))
        raise StopIteration

    handle = model.model.layers[0].register_forward_pre_hook(capture, with_kwargs=True)
    try:
        with suppress(StopIteration):  # the rest of the model isn't needed
            model(ids, use_cache=False)
    finally:
        handle.remove()
    return found[0]


def _capture_inputs(
    block: nn.Module, hidden: Tensor, kwargs: dict
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the block's output and the input of each of its linear modules."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        return lambda module, args: inputs.update({name: args[0].detach()})

    handles = [block.get_submodule(name).register_forward_pre_hook(keep(name)) for name in _LINEAR]
    output = _first_output(block(hidden, **kwargs))
    for handle in handles:
        handle.remove()
    return output, inputs


def _first_output(output: object) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
