"""Files of saved models: checksums, permissions and safe pruning."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lsq_core import disk
from lsq_core.cli.program import main
from lsq_core.errors import InputError
from lsq_core.model.source import MANIFEST_FILE
from lsq_core.quantized.artifact import load_quantized
from lsq_core.quantized.manifest import EVALUATION_KEYS, UNFINISHED_SUFFIX, read_manifest
from lsq_core.results.audit import audit_folder
from lsq_core.store.store import Store
from tests.conftest import ROOT

WEIGHTS = "packed.safetensors"


@pytest.fixture(scope="module")
def saved_template(random_model, tmp_path_factory) -> Path:
    """Return a model saved with the command line, in a data folder with its database."""
    from tests.campaigns.hostile_saved import make_saved

    folder = tmp_path_factory.mktemp("data")
    return make_saved(random_model("llama-gqa"), folder / "models" / "saved", folder)


@pytest.fixture
def saved(saved_template, tmp_path, monkeypatch) -> Path:
    """Return a copy of the saved model in its own data folder."""
    data = tmp_path / "data"
    shutil.copytree(saved_template.parents[1], data)
    monkeypatch.setenv("LSQ_DB", str(data / "lsq.duckdb"))
    return data / "models" / "saved"


def flip_every_37th_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for at in range(start, len(content), 37):
        content[at] ^= 0xFF
    path.write_bytes(content)


def test_changed_weights_fail_checksum(saved, capsys):
    flip_every_37th_byte(saved / WEIGHTS)
    with pytest.raises(InputError, match=f"{WEIGHTS} is damaged.*SHA-256"):
        load_quantized(saved, "cpu")
    report = audit_folder(saved, Store())
    assert (report.files, report.changed, report.agrees) == ("changed", (WEIGHTS,), False)
    assert not report.mismatches, "by shapes and dtypes alone nothing is wrong"
    assert main(["audit", str(saved)]) == 0
    assert f"{WEIGHTS} has changed since it was saved" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", MANIFEST_FILE])
def test_changed_config_tokenizer_or_manifest_raises(saved, name):
    content = json.loads((saved / name).read_text())
    content["bits_per_param" if name == MANIFEST_FILE else "added"] = 2.5
    (saved / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"{name} is damaged.*SHA-256"):
        load_quantized(saved, "cpu")


def test_changed_generation_config_is_accepted(saved):
    (saved / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    assert load_quantized(saved, "cpu").model.generation_config.temperature == 0.5


def test_audit_intact_model(saved):
    report = audit_folder(saved, Store())
    assert (report.files, report.changed, report.agrees) == ("intact", (), True)
    assert len(read_manifest(saved, EVALUATION_KEYS)["sha256"]) >= 4


def test_load_quantized_without_checksums(saved):
    content = json.loads((saved / MANIFEST_FILE).read_text())
    del content["sha256"]
    (saved / MANIFEST_FILE).write_text(json.dumps(content))
    assert load_quantized(saved, "cpu").manifest == content
    report = audit_folder(saved, Store())
    assert (report.files, report.agrees) == ("unknown", True)
    assert "no checksums" in report.verdict


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_load_quantized_missing_file_raises(saved, name):
    (saved / name).unlink()
    with pytest.raises(InputError, match=name):
        load_quantized(saved, "cpu")


def test_saved_files_respect_umask(random_model, tmp_path):
    from tests.campaigns.hostile_saved import make_saved

    before = os.umask(0o027)
    try:
        saved = make_saved(random_model("llama-gqa"), tmp_path / "saved", tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}
    assert modes == dict.fromkeys(modes, 0o640)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o750


# --- leftovers of a killed save ---------------------------------------------------------------

_KILL_DURING_SAVE = """
import os, sys
from pathlib import Path
from lsq_core.quantized import artifact

def killed(state, path, **more):
    path.write_bytes(b"half")
    os.kill(os.getpid(), 9)

artifact.save_file = killed
from tests.campaigns.hostile_saved import make_saved
make_saved(*map(Path, sys.argv[1:]))
"""


def test_killed_save_leftovers_listed_and_prunable(random_model, saved):
    data, target = saved.parents[1], saved.parent / "again"
    model = random_model("llama-gqa")
    command = [sys.executable, "-c", _KILL_DURING_SAVE, str(model), str(target), str(data)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == -9
    assert not target.exists()
    (leftover,) = (
        item for item in disk.list_disk_items(Store()) if item.kind == "unfinished model"
    )
    assert leftover.path.parent == saved.parent
    assert leftover.bytes == 4
    assert leftover.prunable
    assert main(["disk", "--prune", leftover.name, "--json"]) == 0
    assert not leftover.path.exists()
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == -9
    from tests.campaigns.hostile_saved import make_saved

    make_saved(model, target, data)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["again", "saved"], "it healed itself"


def test_prune_model_being_written_raises(saved):
    from lsq_core.files import lock_folder

    unfinished = saved.parent / f".other-1{UNFINISHED_SUFFIX}"
    unfinished.mkdir()
    lock = lock_folder(unfinished)
    try:
        with pytest.raises(InputError, match="being written"):
            disk.prune(Store(), str(unfinished))
    finally:
        os.close(lock)
    assert disk.prune(Store(), str(unfinished)).kind == "unfinished model"


# --- pruning ----------------------------------------------------------------------------------


def set_saved_path(folder: Path) -> None:
    with Store().transaction() as connection:
        connection.execute("UPDATE runs SET saved_to = ?", [str(folder)])


def test_prune_folder_outside_data_raises(saved, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(saved, elsewhere)
    set_saved_path(elsewhere)
    (item,) = (item for item in disk.list_disk_items(Store()) if item.path == elsewhere)
    assert not item.prunable
    assert main(["disk", "--prune", str(elsewhere)]) == 2
    assert "delete it yourself" in capsys.readouterr().err
    assert (elsewhere / WEIGHTS).exists()


@pytest.mark.parametrize("other_file", ["thesis.txt", "photos/"])
def test_prune_folder_with_other_files_raises(saved, other_file):
    theirs = saved.parents[1] / "theirs"
    theirs.mkdir()
    (theirs / MANIFEST_FILE).write_text("{}")
    (theirs / other_file).mkdir() if other_file.endswith("/") else (theirs / other_file).write_text(
        "x"
    )
    set_saved_path(theirs)
    with pytest.raises(InputError, match=other_file.strip("/")):
        disk.prune(Store(), str(theirs))
    assert (theirs / MANIFEST_FILE).exists()


def test_prune_link_raises(saved, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(saved, elsewhere)
    link = saved.parent / "link"
    link.symlink_to(elsewhere)
    with pytest.raises(InputError, match="outside"):
        disk.prune(Store(), str(link))
    assert (elsewhere / WEIGHTS).exists()


def test_prune_data_folder_raises(saved):
    data = saved.parents[1]
    (data / MANIFEST_FILE).write_text("{}")
    set_saved_path(data)
    with pytest.raises(InputError, match="delete it yourself"):
        disk.prune(Store(), str(data))
    assert saved.exists()
