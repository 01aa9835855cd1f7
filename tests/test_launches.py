"""Upper bounds on the kernels that profiling launches and on its waits for the device."""

from __future__ import annotations

import pytest
import torch

from lsq_core.bits import LADDER
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from lsq_core.profiling import measure
from lsq_core.profiling.metrics import default_metrics
from lsq_core.profiling.metrics.weight_error import squared_distances
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.registry import get_quantizer
from tests.launches import count_launches

#: Configurations by group size, as they are quantized together.
SIZES = [[c for c in LADDER if c.group_size == size] for size in (32, 64, 128)]


def weight(rows=96, columns=384):
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "constant rows", "tiny"])
@pytest.mark.parametrize("metadata", ["8bit", "fp16"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("quantizer", ["hqq", "rtn"])
def test_configurations_together_are_those_alone(quantizer, axis, metadata, kind):
    """Values are bit-identical to those of the stored matrices."""
    values = weight()
    if kind == "heavy tails":
        torch.manual_seed(0)
        values = 0.02 * torch.distributions.StudentT(2.0).sample(values.shape)
    elif kind == "constant rows":
        values[3:9] = 0.7
    elif kind == "tiny":
        values = values * 2.0**-100
    by = get_quantizer(quantizer)
    for configs in SIZES:
        together = by.round_trips(values, configs, axis, metadata)
        for config, found in zip(configs, together, strict=True):
            assert torch.equal(found, by.store(values, config, axis, metadata).dequantize())


@pytest.mark.parametrize(("quantizer", "most"), [("hqq", 620), ("rtn", 590)])
def test_twelve_configurations_of_a_matrix_take_few_kernels(quantizer, most, monkeypatch):
    """Includes measuring the errors; one configuration at a time took 2,700 kernels."""
    values, by = weight(), get_quantizer(quantizer)
    squared_distances(by.round_trips(values, SIZES[0], 1, "8bit"), values)  # tables are copied once
    with count_launches(monkeypatch) as launches:
        for configs in SIZES:
            squared_distances(by.round_trips(values, configs, 1, "8bit"), values)
    assert sum(launches.kernels.values()) <= most, launches.kernels
    assert launches.kernels["solver"] == (len(SIZES) if quantizer == "hqq" else 0)
    assert not launches.waits


def test_no_score_of_a_block_is_waited_for(random_model, monkeypatch):
    """The only waits per block are the check of its weights and reading its scores at the end."""
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")
    settings = ProfileSettings(samples=1, block_tokens=64)
    metrics = measure.make_metrics(default_metrics())
    ids = torch.arange(8 * 64).view(8, 64)
    with torch.no_grad():
        for context in measure.iter_blocks(loaded, ids):
            context.parts  # computed by a pass through the block that gives no scores  # noqa: B018
            with count_launches(monkeypatch) as launches:
                scores = [score for _, score in measure._score_block(context, settings, metrics)]
            assert launches.waits == {"aten::_local_scalar_dense": 1}, "the check of its weights"
            with count_launches(monkeypatch) as launches:
                read = measure._read_values(scores)
            assert launches.waits == {"tolist": 1}
            assert len(read) == len(scores) > len(LADDER)
            assert all(isinstance(score.value, float) for score in read)
