"""The noise floor: measuring and storing it, and its effect on verdicts and shown digits."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsq_core.cli.program import main
from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation.noise import (
    Condition,
    NoiseFloor,
    describe_unknown,
    format_figure,
    format_noise,
    is_below_noise,
)
from lsq_core.evaluation.perplexity import make_text_passes
from lsq_core.evaluation.protocol import EvaluationRequest, EvaluationText, Protocol
from lsq_core.evaluation.text_pass import make_groups
from lsq_core.quantized.convert import cast_copies
from lsq_core.quantized.modules import packed_modules
from lsq_core.results.card import run_card
from lsq_core.results.difference import run_difference
from lsq_core.results.gains import describe_gain, gain_of_run
from lsq_core.results.report import format_run_figures
from lsq_core.session import Session
from lsq_core.shipped import import_measurements
from lsq_core.stages import noise as noise_stage
from lsq_core.store import connection as store_module
from lsq_core.store.schema import MIGRATIONS
from lsq_core.store.store import Store

TOKENS = 700
REQUEST = EvaluationRequest("stdlib", "strided", TOKENS)


def make_floor(perplexity: float, kl: float, **changed: object) -> NoiseFloor:
    """Return a floor with these shares, for perplexity 20 at full precision and 25 quantized."""
    conditions = (
        Condition("as usual", 20.0, 25.0, 0.1),
        Condition("in float64", 20.0, 25.0 * (1 + perplexity), 0.1 * (1 - kl)),
    )
    floor = NoiseFloor(
        "strided-512/256", "cpu", "float32", "stdlib", "abc", 699, "uniform 4.13, hqq", conditions,
        {"device": "cpu", "dtype": "float32"},
    )  # fmt: skip
    return replace(floor, **changed)


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Session:
    return Session("demo", tmp_path_factory.mktemp("noise") / "noise.duckdb", device="cpu")


@pytest.fixture(scope="module")
def measured(session) -> NoiseFloor:
    return session.measure_noise(REQUEST)


@pytest.fixture(scope="module")
def outcome(session, measured) -> dict:
    """The result of a run with a known floor."""
    return session.run(session.plan("uniform", base="3.13"), "hqq", REQUEST)


# --- measuring ------------------------------------------------------------------------------


def test_conditions_are_the_same_model_computed_otherwise(measured, session):
    usual, *others = measured.conditions
    assert [c.name for c in others] == ["one window a batch", "large batches", "in float64"]
    assert usual.perplexity > usual.perplexity_full > 1
    assert usual.perplexity_full == session.evaluate_full(REQUEST)["perplexity"]
    assert 0 < measured.perplexity < 1e-5
    assert 0 < measured.kl < 1e-3
    assert measured.tokens == TOKENS
    wide = others[-1]
    assert measured.perplexity >= abs(wide.perplexity / usual.perplexity - 1)


def test_bfloat16_is_noisier_than_float32(measured, session):
    other = Session("demo", session.store, device="cpu", dtype="bfloat16")
    floor = other.measure_noise(REQUEST)
    assert floor.conditions[-1].name == "in float32"
    assert floor.perplexity > 100 * measured.perplexity
    found = session.store.noise_floor(session.info.fingerprint, floor.protocol, floor.provenance)
    assert found == floor
    assert session.store.noise_floor(
        session.info.fingerprint, measured.protocol, measured.provenance
    ) == measured  # fmt: skip


def test_batches_differ_as_asked():
    ids = np.arange(4096) % 100
    batches = {}
    for tokens in (None, 1, 2**13):
        text = EvaluationText(ids, Protocol.named("blocks", 512), tokens)
        model = torch.nn.Module()
        model.get_input_embeddings = lambda: torch.nn.Embedding(100, 4)
        [text_pass] = make_text_passes(model, 1, [text], None, None, None)
        (group,) = make_groups(text_pass, 2**20, text_pass.batch_tokens or 2**11)
        batches[tokens] = [len(batch) for batch in group.batches]
    assert batches == {None: [4, 4], 1: [1] * 8, 2**13: [8]}


def test_cast_copies_share_codes_and_leave_the_original(session):
    plan = session.plan("uniform", base="4.13")
    quantized, full = session.quantize(plan).model, session.loaded.model
    wide, wide_full = cast_copies([quantized, full], torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    name, module = next(iter(packed_modules(wide).items()))
    original = packed_modules(quantized)[name]
    assert all(a is b for a, b in zip(
        module.packed.tensors.values(), original.packed.tensors.values(), strict=True
    ))  # fmt: skip
    assert torch.equal(module.weight, original.weight.double())
    assert wide.get_input_embeddings().weight is wide_full.get_input_embeddings().weight


def test_too_little_memory_is_said_before_the_work(session, monkeypatch):
    monkeypatch.setattr("lsq_core.model.loading.free_bytes", lambda device: 1000)
    with pytest.raises(LsqError, match="float64"):
        noise_stage.measure_noise(session, REQUEST)


def test_wrong_inputs(session):
    with pytest.raises(InputError):
        session.measure_noise(REQUEST, base="5")
    with pytest.raises(InputError):
        session.measure_noise(EvaluationRequest("no-such-file.txt"))


# --- reporting --------------------------------------------------------------------------------


def test_run_tells_the_floor(session, measured, outcome):
    assert outcome["noise"] == measured.to_json()
    (row,) = session.store.results().itertuples()
    assert (row.noise, row.noise_kl) == (measured.perplexity, measured.kl)
    record = session.store.record(row.evaluation)
    assert record["noise"] == measured.to_json()
    shown = format_run_figures(record)
    assert format_noise(measured.perplexity) in shown["numerical noise"]
    assert format_noise(measured.perplexity).replace(" ", "\u00a0") in run_card(
        session.store, row.evaluation
    ).foot.replace(" ", "\u00a0")


def test_unknown_floor_says_how_it_is_measured(session, measured, tmp_path, capsys):
    """The reason names the command that measures the floor, and running it does so."""
    db = str(tmp_path / "other.duckdb")
    where = ["--db", db, "--model", "demo", "--max-tokens", "300"]
    assert main(["eval", *where, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    reason = result["noise"]["reason"]
    command = describe_unknown("demo", result["protocol"], "float32")
    assert reason == command
    assert "lsq noise --model demo --protocol strided --dtype float32" in command
    assert main(["noise", *where, "--json"]) == 0
    noise = json.loads(capsys.readouterr().out)["noise"]
    assert main(["eval", *where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["noise"] == noise
    assert main(["noise", *where]) == 0
    assert "in float64" in capsys.readouterr().out


def test_newest_floor_counts(tmp_path):
    store = Store(tmp_path / "s.duckdb")
    for share in (0.01, 0.02):
        store.save_noise_floor("f", make_floor(share, 0.1))
    found = store.noise_floor("f", "strided-512/256", {"device": "cpu:0", "dtype": "float32"})
    assert found.perplexity == pytest.approx(0.02)
    for other in ({"device": "cuda:0", "dtype": "float32"}, {"device": "cpu", "dtype": "float16"}):
        assert store.noise_floor("f", "strided-512/256", other) is None
    assert store.noise_floor("f", "blocks", {"device": "cpu", "dtype": "float32"}) is None


def test_database_without_the_table_opens(tmp_path, monkeypatch):
    path = tmp_path / "old.duckdb"
    at = next(i for i, script in enumerate(MIGRATIONS) if "noise_floors" in script)
    monkeypatch.setattr(store_module, "MIGRATIONS", MIGRATIONS[:at])
    Store(path)
    monkeypatch.undo()
    store = Store(path)
    store.save_noise_floor("f", make_floor(0.01, 0.1))
    assert store.noise_floor("f", "strided-512/256", {"device": "cpu", "dtype": "float32"})


def test_shipped_floor_stands_beside_shipped_runs(tmp_path):
    store = Store(tmp_path / "s.duckdb")
    assert import_measurements(store)
    runs = store.results()
    assert runs["noise"].between(1e-12, 1e-4).all()
    assert runs["noise_kl"].between(1e-12, 1e-2).all()


# --- verdicts and digits ------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "is_noise"), [(0.01, True), (1e-6, False), (None, False)])
def test_difference_below_the_floor_is_no_gain(share, is_noise):
    rows = {
        "evaluation": ["u", "s"], "method": ["uniform", "sensiboost"], "quantizer": "hqq",
        "perplexity": [20.0, 19.9], "bits_per_param": [3.13, 3.15], "increase": [0.1, 0.09],
        "noise": share,
    }  # fmt: skip
    gain = gain_of_run(pd.DataFrame(rows), "s", "bits_per_param")
    assert gain.is_noise is is_noise
    text = describe_gain(gain, 3.13)
    assert ("lower" in text) is not is_noise


def test_difference_of_two_runs_ties_below_the_floor(session, measured, outcome):
    store = session.store
    session.run(session.plan("uniform", base="3.25"), "hqq", REQUEST)
    a, b = store.results()["evaluation"][:2]
    found = run_difference(store, a, b)
    assert found.noise == measured.perplexity
    assert not found.is_noise
    assert replace(found, noise=10.0).is_noise
    assert replace(found, noise=10.0).is_tie


@given(
    st.floats(1e-6, 1e9),
    st.one_of(st.none(), st.floats(0, 0.5)),
)
def test_shown_digits_are_above_the_floor(value, noise):
    """A figure is rounded to a digit whose unit is above the noise."""
    text = format_figure(value, noise)
    digits = text.partition(".")[2]
    unit = 10.0 ** -len(digits)
    floor = value * (noise or 0.0)
    if digits:
        assert unit >= floor * (1 - 1e-9)
        assert abs(float(text) - value) <= 0.5000001 * unit
    else:
        assert abs(float(text) - value) <= max(0.5, 5.0000001 * floor)
    assert len(digits) <= 4


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.1e-6, "± 0.0002 %"), (0.0036, "± 0.4 %"), (0.02, "± 2 %"), (0.0, "± 0 %")],
)
def test_noise_is_rounded_up_to_one_digit(share, text):
    assert format_noise(share) == text
    assert float(text.strip("± %")) >= 100 * share


def test_unknown_noise_hides_nothing():
    assert not is_below_noise(0.0, None)
    assert not is_below_noise(1e-9, float("nan"))
    assert format_figure(19.12345678, float("nan")) == "19.1235"
