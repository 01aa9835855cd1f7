"""Model identity: from content rather than name, including the tokenizer and remote code."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

from lsq_core.cli import program
from lsq_core.errors import InputError
from lsq_core.model.identity import code_hash, compute_identity, tokenizer_hash
from lsq_core.model.loading import inspect_model
from lsq_core.model.source import DEMO_FOLDER, ModelSource, cached_folder, fingerprint
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.session import Session
from lsq_core.stages.model import find_model_info, known_identity
from lsq_core.stages.profile import profile_key
from lsq_core.store.schema import MIGRATIONS
from lsq_core.store.store import Store
from tests.helpers import update_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return a function that adds a model to an empty Hugging Face cache, as a download would."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))

    def add_model(name: str, model: Path, *revisions: str) -> Path:
        home = folder / f"models--{name.replace('/', '--')}"
        snapshot = home / "snapshots" / COMMIT
        if not snapshot.is_dir():
            shutil.copytree(model, snapshot)
        (home / "refs").mkdir(exist_ok=True)
        for revision in revisions or ("main",):
            (home / "refs" / revision).write_text(COMMIT)
        return snapshot

    return add_model


def edit_tokenizer(folder: Path) -> None:
    """Swap two vocabulary entries, which gives another tokenizer of the same size."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf8"))
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content), "utf8")


def test_profile_key_changes_with_tokenizer(model_copy, tmp_path):
    store, settings = Store(tmp_path / "db"), ProfileSettings()
    before = Session(ModelSource(str(model_copy)), store)
    key = before.profile_key(settings)
    edit_tokenizer(model_copy)
    after = Session(ModelSource(str(model_copy)), store)
    assert after.info.fingerprint == before.info.fingerprint, "weights and config are the same"
    assert after.profile_key(settings) != key
    assert profile_key(after.info, settings) == after.profile_key(settings), "as the pages have it"


def test_tokenizer_hash_ignores_non_token_changes(model_copy):
    before = tokenizer_hash(model_copy)
    path = model_copy / "tokenizer_config.json"
    content = json.loads(path.read_text("utf8")) | {"name_or_path": "x", "chat_template": "{{ y }}"}
    path.write_text(json.dumps(content, indent=4), "utf8")
    (model_copy / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert tokenizer_hash(model_copy) == before
    path.write_text(json.dumps(content | {"add_bos_token": True}), "utf8")
    assert tokenizer_hash(model_copy) != before


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.model", "vocab.txt"])
def test_tokenizer_hash_covers_each_file(tmp_path, name):
    assert tokenizer_hash(tmp_path) == ""
    (tmp_path / name).write_text("a")
    first = tokenizer_hash(tmp_path)
    (tmp_path / name).write_text("b")
    assert first
    assert tokenizer_hash(tmp_path) not in ("", first)


def test_identity_includes_remote_code_only_if_trusted(model_copy):
    (model_copy / "m.py").write_text("x = 1")
    assert code_hash(model_copy) == "", "nothing reaches that file"
    update_config(model_copy, auto_map={"AutoConfig": "m.C"})
    first = compute_identity(model_copy, trust_remote_code=True)
    (model_copy / "m.py").write_text("x = 2")
    second = compute_identity(model_copy, trust_remote_code=True)
    assert first.fingerprint == second.fingerprint
    assert first.code
    assert second.code
    assert first.code != second.code
    assert compute_identity(model_copy).code == "", "code that does not run changes no figure"
    keys = {
        ProfileSettings().key(one.fingerprint, "corpus", one.tokenizer, one.code)
        for one in (first, second)
    }
    assert len(keys) == 2


def test_model_source_relative_path_resolved(model_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(model_copy.parent)
    for name in ("./copy", "copy", "../" + model_copy.parent.name + "/copy"):
        assert ModelSource(name).name == str(model_copy)
    session = Session(ModelSource("./copy"), Store(tmp_path / "db"))
    mark = session.info.fingerprint
    monkeypatch.chdir("/")
    stored_sources = Store(tmp_path / "db").models()["source"].tolist()
    assert stored_sources == [str(model_copy)]
    assert fingerprint(ModelSource(stored_sources[0]).local_folder) == mark


def test_known_info_same_model_under_two_names(model_copy, cache, tmp_path):
    """Information stored under one name is found under the other."""
    store = Store(tmp_path / "db")
    mark = Session(ModelSource(str(model_copy)), store).info.fingerprint
    cache("some-org/some-model", model_copy, "main", "v2")
    for source in (
        ModelSource("some-org/some-model"),
        ModelSource("some-org/some-model", "v2"),
        ModelSource("some-org/some-model", COMMIT),
    ):
        info_found = find_model_info(source, store)
        assert (info_found.fingerprint, info_found.source) == (mark, source.name)
        assert info_found.revision == source.revision
    assert find_model_info(ModelSource("some-org/some-model", "v3"), store) is None


def test_known_info_after_files_removed(model_copy, cache, tmp_path):
    store = Store(tmp_path / "db")
    snapshot = cache("some-org/some-model", model_copy)
    info_before = Session(ModelSource("some-org/some-model"), store).info
    shutil.rmtree(snapshot)
    assert cached_folder(ModelSource("some-org/some-model")) is None
    info_after = find_model_info(ModelSource("some-org/some-model"), store)
    assert (info_after.fingerprint, info_after.tokenizer) == (
        info_before.fingerprint,
        info_before.tokenizer,
    )
    assert profile_key(info_after, ProfileSettings()) == profile_key(info_before, ProfileSettings())


def test_identify_unknown_models_returns_none(tmp_path):
    """Neither model has a fingerprint, and one with an empty fingerprint cannot be stored."""
    store = Store(tmp_path / "db")
    assert known_identity(ModelSource("some-org/one"), store) is None
    assert known_identity(ModelSource("some-org/two"), store) is None
    info = replace(inspect_model(ModelSource("demo")), fingerprint="")
    with pytest.raises(ValueError, match="no identity"):
        store.save_model(info)


def test_inspect_cached_model_offline(model_copy, cache):
    cache("some-org/some-model", model_copy)
    info = inspect_model(ModelSource("some-org/some-model"))
    assert info.file_bytes == (model_copy / "model.safetensors").stat().st_size
    assert info.fingerprint == fingerprint(model_copy)


def test_cached_folder_incomplete_snapshot_is_none(model_copy, cache):
    snapshot = cache("some-org/some-model", model_copy)
    (snapshot / "model.safetensors").unlink()
    assert cached_folder(ModelSource("some-org/some-model")) is None


@pytest.mark.parametrize("name", ["x" * 5000, "/" + "x" * 5000, "a\0b", "~nobody-here/x", "DEMO"])
def test_model_name_invalid_path_raises(name, tmp_path):
    """The error is one short line, with the exit status of bad input."""
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(InputError) as caught:
        Session(ModelSource(name), Store(tmp_path / "db")).info  # noqa: B018
    assert caught.value.exit_code == 2
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_migration_keeps_model_names(tmp_path):
    import duckdb

    path = tmp_path / "old.duckdb"
    version = next(n for n, script in enumerate(MIGRATIONS) if "CREATE TABLE model_names" in script)
    with duckdb.connect(str(path)) as connection:
        for script in MIGRATIONS[:version]:
            connection.execute(script)
        connection.execute("CREATE TABLE schema_version (version INTEGER)")
        connection.execute(
            "INSERT INTO schema_version SELECT unnest(generate_series(1, ?))", [version]
        )
        connection.execute(
            "INSERT INTO models (fingerprint, source, revision) VALUES ('f', 'org/x', NULL)"
        )
    assert Store(path).find_model_by_name("org/x", None) == ("f", "", "")


def test_known_info_demo_by_content(tmp_path):
    store = Store(tmp_path / "db")
    Session(ModelSource("demo"), store).info  # noqa: B018
    assert find_model_info(ModelSource(str(DEMO_FOLDER)), store).source == str(DEMO_FOLDER)


# --- files fetched for remote models --------------------------------------------------------------


@pytest.fixture
def hub(model_copy, cache, monkeypatch):
    """Simulate a hub that holds one model; return the list of fetched file names."""
    import fnmatch

    fetched = []

    def download(name, revision=None, allow_patterns=(), **more):
        home = cache(name, model_copy, revision or "main").parent / "fetched"
        home.mkdir(exist_ok=True)
        for path in model_copy.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, home)
                fetched.append(path.name)
        return str(home)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("lsq_core.model.source.remote_file_bytes", lambda source: 0)
    monkeypatch.setattr("lsq_core.model.identity.cached_folder", lambda source: None)
    monkeypatch.setattr("lsq_core.model.loading.cached_folder", lambda source: None)
    return fetched


INFEASIBLE_BUDGET = ["--method", "uniform", "--budget", "0.5bpp"]


@pytest.mark.parametrize(
    "command",
    [
        ["plan", *INFEASIBLE_BUDGET],
        ["run", *INFEASIBLE_BUDGET],
        ["run", "--method", "mxq", "--budget", "0.5bpp"],
        ["run", "--plan", "{plan}"],
        ["sweep", "--method", "uniform", "--budget", "0.5bpp"],
    ],
)
def test_cli_infeasible_request_fetches_no_weights(hub, command, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"modules": {"model.layers.99.x": {"bits": 2, "group_size": 64}}}))
    command = [word.format(plan=plan) for word in command]
    assert program.main([*command, "--model", "some-org/some-model"]) in (1, 2)
    assert "config.json" in hub
    assert not [name for name in hub if name.endswith(".safetensors")]
    assert "lsq:" in capsys.readouterr().err


def test_cli_feasible_plan_fetches_config_before_weights(hub, capsys):
    command = [
        "plan",
        "--method",
        "uniform",
        "--budget",
        "3.2bpp",
        "--model",
        "some-org/some-model",
    ]
    assert program.main(command) == 0
    assert hub.index("config.json") < hub.index("model.safetensors")


def test_cli_inspect_remote_model_small_files_only(hub, model_copy, capsys):
    """The index names files that were not fetched, and the config has no dtype."""
    config = json.loads((model_copy / "config.json").read_text())
    config.pop("dtype", None)
    (model_copy / "config.json").write_text(json.dumps(config))
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (model_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert program.main(["inspect", "--model", "some-org/some-model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 2
    assert set(hub) == {"config.json", "model.safetensors.index.json"}


def test_cli_inspect_quantized_remote_model_exit_2(hub, model_copy, capsys):
    (model_copy / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert program.main(["inspect", "--model", "some-org/some-model"]) == 2
    assert "FP8" in capsys.readouterr().err
    assert not [name for name in hub if name.endswith(".safetensors")]
