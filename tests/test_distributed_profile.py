"""Profiles on a real local Ray cluster have the same scores as profiles without Ray."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lsq_core.cli.program import main
from lsq_core.distributed import cluster, profiles
from lsq_core.distributed.executor import RayExecutor
from lsq_core.distributed.profiles import RayProfiler, split
from lsq_core.errors import InputError, LsqError
from lsq_core.model.loading import inspect_model, load_model
from lsq_core.model.source import ModelSource
from lsq_core.profiling.measure import measure_profile
from lsq_core.profiling.metrics import METRICS, default_metrics
from lsq_core.profiling.profile import join_layers
from lsq_core.profiling.settings import ProfileSettings
from tests import failing_actors
from tests.test_distributed import needs_ray, new_session

SPLIT = ["kurtosis", "weight_error", "loss_impact"]


@pytest.fixture
def settings(small_text) -> ProfileSettings:
    return ProfileSettings("rtn", calibration=str(small_text), samples=8, block_tokens=64)


@pytest.fixture
def source(random_model) -> ModelSource:
    return ModelSource(str(random_model("llama-gqa")))


def in_order(values: pd.DataFrame) -> pd.DataFrame:
    return values.sort_values(["metric", "module", "config"], ignore_index=True)


# --- splitting by metric and layer --------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 3, 7, 100])
def test_every_metric_and_layer_is_in_one_task(parts):
    info = inspect_model(ModelSource("demo"))
    found = [
        (name, layer)
        for metrics, layers in split(info, [*METRICS], parts)
        for own in layers
        for name in metrics
        for layer in (range(info.layers) if own is None else own)
    ]
    assert len(found) == len(set(found)) == len(METRICS) * info.layers
    groups = dict(split(info, [*METRICS], parts))
    assert groups["kurtosis", "weight_error"][0].stop <= -(-info.layers // parts) + 1
    assert len(groups["loss_impact",]) <= parts
    if 1 < parts < info.layers:  # later layers rerun fewer blocks
        assert len(groups["loss_impact",][0]) < len(groups["loss_impact",][-1])


@pytest.mark.parametrize("architecture", ["llama-gqa", "mixtral-moe"])
def test_layers_measured_apart_have_the_digits_of_all(architecture, random_model, settings):
    loaded = load_model(ModelSource(str(random_model(architecture))), "cpu")
    whole = measure_profile(loaded, settings, "key", metrics=SPLIT)
    parts = [
        measure_profile(loaded, settings, "key", metrics=SPLIT, layers=range(layer, layer + 1))
        for layer in range(loaded.info.layers)
    ]
    for layer, part in enumerate(parts):
        assert set(part.values["layer"]) == {layer}
    pd.testing.assert_frame_equal(in_order(join_layers(parts).values), in_order(whole.values))


def test_progress_of_some_layers_reaches_its_end(random_model, settings):
    loaded = load_model(ModelSource(str(random_model("llama-gqa"))), "cpu")
    seen = []
    measure_profile(loaded, settings, "k", lambda *a: seen.append(a[:2]), SPLIT, range(1, 2))
    done, totals = zip(*seen, strict=True)
    assert len(set(totals)) == 1
    assert list(done) == sorted(done)
    assert done[-2] == totals[0]


# --- on Ray ---------------------------------------------------------------------------------------


@needs_ray
@pytest.mark.slow
def test_profile_on_ray_has_the_digits_of_one_without(source, settings, tmp_path):
    """Starts a cluster, and an actor again."""
    wanted = ["loss_impact", "expected_kl"]
    here = new_session(source, tmp_path / "here").profile(settings, wanted)
    reports = []
    there = new_session(source, tmp_path / "there", report=lambda *r: reports.append(r))
    failing = failing_actors.ProfilerKilledOnce
    found = there.profile(settings, wanted, RayProfiler(cluster.LOCAL, 1, 2, failing))
    assert (tmp_path / "there" / "killed").exists()
    assert found.id == here.id
    assert set(found.metrics) == {*default_metrics(), *wanted}
    pd.testing.assert_frame_equal(in_order(found.values), in_order(here.values))
    assert any("loss_impact of layer" in message for *_, message in reports)
    before = len(reports)
    again = there.profile(settings, wanted, RayProfiler(cluster.LOCAL, 1, 2))
    assert len(reports) == before + 1, "nothing was started"
    np.testing.assert_array_equal(again.values["value"], found.values["value"])


@needs_ray
@pytest.mark.slow
def test_layers_that_kill_their_actors_end_a_profile_in_a_sentence(
    source, settings, tmp_path, monkeypatch
):
    """Starts a cluster, and an actor again."""
    monkeypatch.setattr(profiles, "MAX_MOVES", 1)
    session = new_session(source, tmp_path / "there")
    measure = RayProfiler(cluster.LOCAL, 1, 1, failing_actors.KilledByLayer)
    with pytest.raises(LsqError, match="weight_error of layer 2 died 2 times"):
        session.profile(settings, measure=measure)
    assert (tmp_path / "there" / "killed").read_text().count("killed") == 2
    assert "sensitivity" in session.find_profile(settings).metrics, "what was done is kept"


@needs_ray
def test_cli_profile_on_ray_refuses_what_cannot_be(source, settings, small_text, tmp_path, capsys):
    command = ["profile", "--model", source.name, "--corpus", str(small_text)]
    command += ["--db", str(tmp_path / "lsq.duckdb"), "--quantizer", "rtn"]
    assert main([*command, "--actors", "2"]) == 2
    assert main([*command, "--ray", "--actors", "0"]) == 2
    assert main([*command, "--ray", "--device", "cuda:7"]) == 2
    assert main([*command, "--ray", "nowhere"]) == 2
    assert capsys.readouterr().err.count("--ray") >= 1


def test_profile_on_ray_without_ray_says_how_to_add_it(source, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    session = new_session(source, tmp_path / "there")
    with pytest.raises(InputError, match="make ray"):
        session.profile(settings, measure=RayProfiler(cluster.LOCAL))


@needs_ray
def test_sweep_profile_is_measured_here_if_the_cluster_computes_otherwise(
    source, settings, tmp_path
):
    """No actor is started, and the reason is reported."""
    executor, reports = RayExecutor(cluster.LOCAL, settings, ["rtn"]), []
    executor._remote_places = [{"device": "cuda:0", "dtype": "bfloat16"}]
    session = new_session(source, tmp_path / "here", report=lambda *r: reports.append(r))
    (measured,) = executor.measure_profile(session, settings, ["kurtosis"])
    assert measured.metrics == ("kurtosis",)
    assert [text for stage, *_, text in reports if stage == "note" and "cuda in bfloat16" in text]
