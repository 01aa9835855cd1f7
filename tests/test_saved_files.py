"""Files of saved models: known by their checksums, of the person's own modes, pruned with care."""

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
from lsq_core.cli import main
from lsq_core.errors import InputError
from lsq_core.model.source import MANIFEST
from lsq_core.quantized.artifact import load_quantized
from lsq_core.quantized.manifest import EVALUATED, UNFINISHED, read_manifest
from lsq_core.results.audit import audit_folder
from lsq_core.store.store import Store
from tests.conftest import ROOT

WEIGHTS = "packed.safetensors"


@pytest.fixture(scope="module")
def whole(random_model, tmp_path_factory) -> Path:
    """A saved model, made by the command line in a data folder with its database."""
    from tests.campaigns.hostile_saved import make_saved

    folder = tmp_path_factory.mktemp("data")
    return make_saved(random_model("llama-gqa"), folder / "models" / "saved", folder)


@pytest.fixture
def saved(whole, tmp_path, monkeypatch) -> Path:
    """A copy of it, in a data folder of its own."""
    data = tmp_path / "data"
    shutil.copytree(whole.parents[1], data)
    monkeypatch.setenv("LSQ_DB", str(data / "lsq.duckdb"))
    return data / "models" / "saved"


def flip_every_37th_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for at in range(start, len(content), 37):
        content[at] ^= 0xFF
    path.write_bytes(content)


def test_changed_weights_are_neither_evaluated_nor_as_planned(saved, capsys):
    flip_every_37th_byte(saved / WEIGHTS)
    with pytest.raises(InputError, match=f"{WEIGHTS} is damaged.*SHA-256"):
        load_quantized(saved, "cpu")
    found = audit_folder(saved, Store())
    assert (found.files, found.changed, found.agrees) == ("changed", (WEIGHTS,), False)
    assert not found.wrong, "by shapes and dtypes alone nothing is wrong"
    assert main(["audit", str(saved)]) == 0
    assert f"{WEIGHTS} isn't what was saved" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", MANIFEST])
def test_what_else_decides_a_result_has_a_checksum_too(saved, name):
    content = json.loads((saved / name).read_text())
    content["bits_per_param" if name == MANIFEST else "added"] = 2.5
    (saved / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"{name} is damaged.*SHA-256"):
        load_quantized(saved, "cpu")


def test_how_texts_are_generated_may_be_changed(saved):
    (saved / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    assert load_quantized(saved, "cpu").model.generation_config.temperature == 0.5


def test_a_whole_model_is_said_to_be_whole(saved):
    found = audit_folder(saved, Store())
    assert (found.files, found.changed, found.agrees) == ("intact", (), True)
    assert len(read_manifest(saved, EVALUATED)["sha256"]) >= 4


def test_a_model_of_an_earlier_version_opens_and_has_no_checksums(saved):
    content = json.loads((saved / MANIFEST).read_text())
    del content["sha256"]
    (saved / MANIFEST).write_text(json.dumps(content))
    assert load_quantized(saved, "cpu").manifest == content
    found = audit_folder(saved, Store())
    assert (found.files, found.agrees) == ("unknown", True)
    assert "no checksums" in found.verdict


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_a_missing_part_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(InputError, match=name):
        load_quantized(saved, "cpu")


def test_files_have_the_mode_of_the_umask(random_model, tmp_path):
    from tests.campaigns.hostile_saved import make_saved

    before = os.umask(0o027)
    try:
        saved = make_saved(random_model("llama-gqa"), tmp_path / "saved", tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}
    assert modes == dict.fromkeys(modes, 0o640)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o750


# --- what a kill leaves -----------------------------------------------------------------------

_KILLED = """
import os, sys
from pathlib import Path
from lsq_core.quantization.registry import artifact

def killed(state, path, **more):
    path.write_bytes(b"half")
    os.kill(os.getpid(), 9)

artifact.save_file = killed
from tests.campaigns.hostile_saved import make_saved
make_saved(*map(Path, sys.argv[1:]))
"""


def test_what_a_killed_save_leaves_is_listed_and_goes(random_model, saved):
    data, target = saved.parents[1], saved.parent / "again"
    model = random_model("llama-gqa")
    command = [sys.executable, "-c", _KILLED, str(model), str(target), str(data)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == -9
    assert not target.exists()
    (left,) = (item for item in disk.kept_on_disk(Store()) if item.kind == "unfinished model")
    assert left.path.parent == saved.parent
    assert left.bytes == 4
    assert left.prunable
    assert main(["disk", "--prune", left.name, "--json"]) == 0
    assert not left.path.exists()
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == -9
    from tests.campaigns.hostile_saved import make_saved

    make_saved(model, target, data)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["again", "saved"], "it healed itself"


def test_a_model_that_is_being_written_is_not_pruned(saved):
    from lsq_core.files import lock_folder

    unfinished = saved.parent / f".other-1{UNFINISHED}"
    unfinished.mkdir()
    lock = lock_folder(unfinished)
    try:
        with pytest.raises(InputError, match="being written"):
            disk.prune(Store(), str(unfinished))
    finally:
        os.close(lock)
    assert disk.prune(Store(), str(unfinished)).kind == "unfinished model"


# --- what is deleted --------------------------------------------------------------------------


def name_in_database(folder: Path) -> None:
    with Store().transaction() as connection:
        connection.execute("UPDATE runs SET saved_to = ?", [str(folder)])


def test_a_folder_elsewhere_that_a_database_names_is_listed_and_stays(saved, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(saved, elsewhere)
    name_in_database(elsewhere)
    (item,) = (item for item in disk.kept_on_disk(Store()) if item.path == elsewhere)
    assert not item.prunable
    assert main(["disk", "--prune", str(elsewhere)]) == 2
    assert "yours to delete" in capsys.readouterr().err
    assert (elsewhere / WEIGHTS).exists()


@pytest.mark.parametrize("inside", ["thesis.txt", "photos/"])
def test_a_folder_with_other_files_stays(saved, inside):
    theirs = saved.parents[1] / "theirs"
    theirs.mkdir()
    (theirs / MANIFEST).write_text("{}")
    (theirs / inside).mkdir() if inside.endswith("/") else (theirs / inside).write_text("x")
    name_in_database(theirs)
    with pytest.raises(InputError, match=inside.strip("/")):
        disk.prune(Store(), str(theirs))
    assert (theirs / MANIFEST).exists()


def test_a_link_among_saved_models_is_not_followed(saved, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(saved, elsewhere)
    link = saved.parent / "link"
    link.symlink_to(elsewhere)
    with pytest.raises(InputError, match="outside"):
        disk.prune(Store(), str(link))
    assert (elsewhere / WEIGHTS).exists()


def test_the_data_folder_itself_is_never_pruned(saved):
    data = saved.parents[1]
    (data / MANIFEST).write_text("{}")
    name_in_database(data)
    with pytest.raises(InputError, match="yours to delete"):
        disk.prune(Store(), str(data))
    assert saved.exists()
