"""Using a session from a notebook: the README example, printed objects and bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import lsq_core as lsq
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.results.audit import audit_folder
from lsq_core.store.store import Store
from tests.conftest import ROOT


def test_public_names_are_exported_lazily():
    code = (
        "import sys, lsq_core as lsq; print(lsq.__version__, 'Session' in dir(lsq)); "
        "print(sorted({'numpy', 'torch', 'duckdb', 'streamlit'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == [f"{lsq.__version__} True", "[]"], done.stderr
    assert all(getattr(lsq, name) is not None for name in lsq.__all__)
    with pytest.raises(AttributeError, match="Sesion"):
        lsq.Sesion  # noqa: B018


@pytest.fixture(scope="module")
def session(random_model, tmp_path_factory) -> lsq.Session:
    folder = tmp_path_factory.mktemp("session")
    text = folder / "text.txt"
    text.write_text("\n".join(f"Return the {i}-th item, or raise IndexError." for i in range(200)))
    session = lsq.Session(random_model("llama-gqa"), folder / "lsq.duckdb", "cpu")
    session.corpus = str(text)
    return session


@pytest.fixture(scope="module")
def profile(session) -> lsq.Profile:
    return session.profile(quantizer="rtn", calibration=session.corpus, samples=8, block_tokens=48)


@pytest.fixture(scope="module")
def plan(session, profile) -> lsq.Plan:
    return session.plan("mxq", profile.settings, budget="4.3bpp")


@pytest.fixture(scope="module")
def quantized(session, plan) -> lsq.QuantizedRun:
    return session.quantize(plan, "rtn")


def test_plan_fields_as_keywords_match_a_request(session, profile, plan):
    request = lsq.PlanRequest("mxq", budget="4.3bpp")
    assert session.plan(request, profile.settings).modules == plan.modules
    assert plan.profile == profile.id


def test_served_plan_by_keyword(session, profile):
    served = session.plan(
        "mxq", profile.settings, budget="5bpp", serve="vllm", ties=["o_proj,q_proj"]
    )
    assert served.request == lsq.PlanRequest(
        "mxq", budget="5bpp", serve="vllm", ties=("o_proj,q_proj",)
    )
    assert {config.bits for config in served.configs} <= {4, 8}
    with pytest.raises(lsq.InputError, match="ties has to be a list"):
        session.plan("mxq", profile.settings, budget="5bpp", ties="q_proj,k_proj")


def test_evaluate_stores_what_the_command_line_prints(session, quantized):
    result = session.evaluate(quantized, session.corpus, max_tokens=300)
    full = session.evaluate(corpus=session.corpus, max_tokens=300)
    (row,) = session.store.results(session.info.fingerprint).itertuples()
    assert (result.run, result.perplexity) == (row.run, row.perplexity)
    assert result.perplexity_full == full.perplexity
    assert result.to_dict()["measured_bytes"] == result.measured_bytes == row.measured_bytes
    assert (full.run, full.increase) == (None, None)


def test_saved_run_loads_audits_and_is_recorded(session, quantized, tmp_path):
    session.evaluate(quantized, session.corpus, max_tokens=300)
    folder = quantized.save(tmp_path / "saved")
    assert not audit_folder(folder, session.store).mismatches
    assert session.store.run(quantized.run)["saved_to"] == str(folder)
    assert lsq.load_quantized(folder, "cpu").manifest["run"] == quantized.run
    assert quantized.save(folder) == folder, "saved already"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(lsq.InputError, match="other"):
        quantized.save(tmp_path / "other")


def test_objects_print_as_short_tables(session, profile, plan, quantized):
    result = session.evaluate(quantized, session.corpus, max_tokens=300)
    for shown in map(repr, (session, profile, plan, quantized, result)):
        assert 2 <= len(shown.splitlines()) <= 9
        assert max(map(len, shown.splitlines())) < 200
        assert "Matrix(" not in shown
    assert f"{plan.bits_per_param:.4f} nominal" in repr(plan)
    assert f"{result.perplexity:.4f}" in repr(result)


def test_plan_and_profile_as_frames_and_figure(session, profile, plan):
    frame = plan.to_frame()
    assert dict(zip(frame["module"], frame["config"], strict=True)) == {
        m.name: c.name for m, c in plan.choice.items()
    }
    assert profile.to_frame().equals(profile.values)
    assert profile.to_frame() is not profile.values
    (cells,) = plan.figure().data[:1]
    assert len(cells.x) == session.info.layers


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda s: s.plan("mxq", budgets="3bpp"), "budgets"),
        (lambda s: s.plan("nothing"), "nothing"),
        (lambda s: s.plan(lsq.PlanRequest("uniform"), base="4.25"), "request"),
        (lambda s: s.profile(sample=3), "sample"),
        (lambda s: s.profile(samples="many"), "samples"),
        (lambda s: s.profile(metadata="none"), "none"),
        (lambda s: s.evaluate(max_tokens="many"), "many"),
        (lambda s: s.evaluate(s.plan("uniform", base="4.25")), "Plan"),
        (lambda s: s.evaluate(protocol="none"), "none"),
    ],
)
def test_bad_input_raises(session, call, named):
    with pytest.raises(lsq.InputError, match=named):
        call(session)


def test_session_repr_reports_errors_and_downloads_nothing(tmp_path, monkeypatch):
    store = lsq.Store(tmp_path / "lsq.duckdb")
    assert "There is no folder" in repr(lsq.Session(tmp_path / "missing", store))

    def download(*_: object, **__: object) -> str:
        raise AssertionError("repr downloads")

    monkeypatch.setattr("lsq_core.model.source._download_from_hub", download)
    assert "not downloaded yet" in repr(lsq.Session("some-org/some-model", store))


def test_model_of_the_same_shapes_is_told_apart(session, quantized, random_model, tmp_path):
    """Otherwise results would silently be compared with the wrong full-precision model."""
    copy = shutil.copytree(random_model("llama-gqa"), tmp_path / "tuned")
    (weights,) = copy.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    save_file(tensors, weights, {"format": "pt"})
    tuned = lsq.Session(copy, session.store, "cpu")
    assert tuned.info.matrices == session.info.matrices
    with pytest.raises(lsq.InputError, match="session that quantized it"):
        tuned.evaluate(quantized, session.corpus, max_tokens=300)
    other_dtype = lsq.Session(session.source, session.store, "cpu", "bfloat16")
    with pytest.raises(lsq.InputError, match="float32 and this session on cpu in bfloat16"):
        other_dtype.evaluate(quantized, session.corpus, max_tokens=300)


def test_plan_for_another_model_is_refused(session, plan):
    with pytest.raises(lsq.InputError, match="another model"):
        lsq.Session("demo", session.store, "cpu").quantize(plan, "rtn")


def test_saving_while_quantizing_writes_what_save_writes(session, plan, quantized, tmp_path):
    made = session.quantize(plan, "rtn", save=str(tmp_path / "at once"))
    assert made.row["saved_to"] == str(tmp_path / "at once")
    quantized.save(tmp_path / "later")
    at_once, later = (
        json.loads((tmp_path / name / "lsq.json").read_text()) for name in ("at once", "later")
    )
    for manifest in (at_once, later):
        del manifest["run"], manifest["sha256"]["lsq.json"]  # the checksum covers the run's id
    assert at_once == later
    assert len(at_once["sha256"]) >= 4


def test_readme_session_runs(tmp_path):
    """Uses a smaller corpus and fewer samples than the README, so that it takes seconds."""
    readme = (ROOT / "README.md").read_text("utf8")
    (code,) = re.findall(r"```python\n(import lsq_core as lsq\n.*?)```", readme, re.DOTALL)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Return the {i}-th item, or raise IndexError." for i in range(200)))
    for old, new in (
        (
            "s.profile()",
            f"s.profile(quantizer='rtn', calibration={str(text)!r}, samples=16, block_tokens=48)",
        ),
        ('budget="3.2bpp")', 'budget="3.2bpp", settings=profile.settings)'),
        ('corpus="stdlib"', f"corpus={str(text)!r}, max_tokens=200"),
    ):
        assert code.count(old) == 1
        code = code.replace(old, new)
    done = subprocess.run(
        [sys.executable, "-c", code + "print(result.perplexity)"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "LSQ_HOME": str(tmp_path)},
    )
    assert float(done.stdout.splitlines()[-1]) > 1, done.stderr
    assert Path(tmp_path / "my-model-3bit" / "lsq.json").is_file()


def test_run_in_bfloat16_plans_from_the_usual_profile(random_model, small_text, tmp_path):
    """The float32 profile is reused; results are stored separately by dtype and are close."""
    model, store = str(random_model("llama-gqa")), Store(tmp_path / "lsq.duckdb")
    settings = ProfileSettings("rtn", calibration=str(small_text), samples=4, block_tokens=64)
    request = EvaluationRequest(str(small_text))
    usual = lsq.Session(model, store, "cpu")
    profile = usual.profile(settings)
    plan = usual.plan("mxq", settings, budget="3.2bpp")
    expected = usual.run(plan, "rtn", request)
    other = lsq.Session(model, store, "cpu", "bfloat16")
    made = other.plan("mxq", settings, budget="3.2bpp")
    assert made.profile == plan.profile == profile.id
    assert made.choice == plan.choice
    found = other.run(made, "rtn", request)
    assert found["dtype"] == "bfloat16"
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=0.05)
    dtypes = store.query("SELECT DISTINCT provenance ->> '$.dtype' AS d FROM evaluations")
    assert set(dtypes["d"]) == {"float32", "bfloat16"}
    assert len(store.profiles(usual.info.fingerprint)) == 1
    own = other.profile(settings)
    assert own.id != profile.id, "one that is asked for is measured in the session's dtype"
    assert other.plan("mxq", settings, budget="3.2bpp").profile == own.id
