"""Untrusted models: size limits, confinement to their folder, errors without tracebacks."""

from __future__ import annotations

import json
import shutil
import struct
import time
from pathlib import Path

import pytest

from lsq_core.cli.program import main
from lsq_core.errors import InputError
from lsq_core.model.loading import inspect_model, load_model
from lsq_core.model.source import ModelSource
from lsq_core.untrusted import read_json_object, wrap_library_errors
from tests.campaigns import hostile_models, hostile_saved
from tests.helpers import update_config

INDEX = "model.safetensors.index.json"


def assert_refused(folder: Path, pattern: str, seconds: float = 10) -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match=pattern) as caught:
        inspect_model(ModelSource(str(folder)))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < seconds


# --- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [10**5, 10**9, 1e9])
@pytest.mark.parametrize("key", ["num_hidden_layers", "num_labels", "num_key_value_heads"])
def test_inspect_huge_config_value_refused_quickly(model_copy, key, layers):
    update_config(model_copy, **{key: 10 * layers})
    assert_refused(model_copy, key)


def test_inspect_oversized_model_refused(model_copy):
    update_config(model_copy, vocab_size=10**9, hidden_size=2**20, head_dim=32)
    assert_refused(model_copy, "larger than any model")


def test_inspect_too_many_experts_refused(random_model, tmp_path):
    folder = tmp_path / "experts"
    shutil.copytree(random_model("mixtral-moe"), folder)
    update_config(folder, num_local_experts=9_000, num_hidden_layers=20)
    assert_refused(folder, "larger than any model")


def test_describe_12000_experts_within_10_s(random_model, tmp_path):
    """A quadratic search once took two minutes for 12,000 matrices."""
    from lsq_core.model.architecture import describe_model
    from lsq_core.model.loading import build_meta_model

    folder = tmp_path / "experts"
    shutil.copytree(random_model("mixtral-moe"), folder)
    update_config(folder, num_local_experts=3_000)
    source = ModelSource(str(folder))
    model, started = build_meta_model(source, folder), time.monotonic()
    assert len(describe_model(model, source).matrices) > 12_000
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer_config.json"])
def test_inspect_huge_text_file_refused(model_copy, name):
    with (model_copy / name).open("ab") as file:
        file.truncate(2 * 2**30)  # sparse
    assert_refused(model_copy, f"{name} is 2.00 GiB")


def test_inspect_huge_safetensors_header_refused(model_copy):
    with (model_copy / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 8 * 2**30))
        file.truncate(8 * 2**30 + 8)  # sparse
    assert_refused(model_copy, "more than any real file")


def test_read_object_deep_nesting_raises(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a":' * 100_000)
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_json_object(path)


# --- file locations ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret.safetensors", "{folder}/../secret.safetensors"])
def test_inspect_index_outside_folder_refused(model_copy, name):
    (model_copy / "model.safetensors").rename(model_copy.parent / "secret.safetensors")
    with (model_copy.parent / "secret.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    where = name.format(folder=model_copy)
    weight_map = {key: where for key in header if key != "__metadata__"}
    (model_copy / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert_refused(model_copy, "not a file inside that folder")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_inspect_link_outside_folder_refused(model_copy, name):
    outside = model_copy.parent / f"outside-{name}"
    (model_copy / name).rename(outside)
    (model_copy / name).symlink_to(outside)
    assert_refused(model_copy, "link to a file outside its folder")


def test_load_model_hub_cache_snapshot_links_allowed(model_copy, tmp_path):
    home = tmp_path / "models--org--name"
    (home / "blobs").mkdir(parents=True)
    snapshot = home / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(model_copy.iterdir()):
        shutil.copy(path, home / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    loaded = load_model(ModelSource(str(snapshot)), "cpu")
    assert loaded.info.layers == 2
    link = snapshot / "model.safetensors"
    blob = link.resolve()
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    assert_refused(snapshot, "outside its folder")


# --- library errors ---------------------------------------------------------------------------


def test_refusing_translates_library_errors_only():
    from lsq_core.bits import config_from_json

    with (
        pytest.raises(InputError, match="no number: could not convert"),
        wrap_library_errors("no number: {}".format),
    ):
        float("x")
    with pytest.raises(InputError, match="no JSON"), wrap_library_errors("no JSON: {}".format):
        json.loads("{")
    with pytest.raises(KeyError), wrap_library_errors("hidden: {}".format):
        config_from_json({})  # raised by this project's own code, so it is a bug
    with pytest.raises(KeyboardInterrupt), wrap_library_errors("hidden: {}".format):
        raise KeyboardInterrupt


def test_hostile_models_campaign_sample(tmp_path):
    """Run each mutation of the campaign once."""
    log_lines: list[str] = []
    counts = hostile_models.campaign(len(hostile_models.MUTATIONS), tmp_path, log=log_lines.append)
    assert (counts["failed"], counts["reads outside"]) == (0, 0), log_lines
    assert counts["inspect: exit 2"] >= 5


def test_hostile_saved_models_campaign_sample(tmp_path):
    """Run each mutation of the campaign once."""
    log_lines: list[str] = []
    counts = hostile_saved.campaign(len(hostile_saved.MUTATIONS), tmp_path, log=log_lines.append)
    assert (counts["failed"], counts["reads outside"]) == (0, 0), log_lines
    assert counts["eval: exit 2"] >= 5


def test_cli_inspect_too_many_layers_exit_2(model_copy, capsys):
    update_config(model_copy, num_hidden_layers=10**9)
    assert main(["inspect", "--model", str(model_copy)]) == 2
    assert "num_hidden_layers" in capsys.readouterr().err
