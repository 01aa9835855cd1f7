"""Stored figures never change, are reused only under the same conditions, and are finite."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import duckdb
import numpy as np
import pandas as pd
import pytest
import torch

from lsq_core import provenance
from lsq_core.bits import QuantConfig
from lsq_core.cli.program import main
from lsq_core.corpus.registry import corpus_identity
from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation.protocol import MIN_PREDICTED, EvaluationRequest, Protocol, make_windows
from lsq_core.evaluation.result import Evaluation
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.profile import Profile
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.provenance import DeviceAndDtype, versions
from lsq_core.results.export import csv_bytes
from lsq_core.results.report import format_run_figures
from lsq_core.session import Session
from lsq_core.stages.model import resolve_device_and_dtype
from lsq_core.stages.profile import merge_profile, profile_key
from lsq_core.store import connection as store_module
from lsq_core.store.schema import MIGRATIONS
from lsq_core.store.store import Store
from lsq_core.sweep import items, sweep
from tests.helpers import evaluate_model

PLACES = [("cpu", "float32"), ("cpu", "bfloat16"), ("cuda:0", "float32"), ("cuda:0", "bfloat16")]


def evaluation(
    perplexity: float, device: str = "cpu", dtype: str = "float32", **more
) -> Evaluation:
    """Return an evaluation of 100 tokens, made on a device with a version of torch."""
    package_versions = {"torch": more.pop("torch", "2.0"), "duckdb": more.pop("duckdb", "1.0")}
    return Evaluation(
        protocol="strided",
        nll=np.full(4, 25 * np.log(perplexity)),
        counts=np.full(4, 25),
        seconds=1.0,
        corpus="c",
        corpus_sha256="abc",
        provenance={"device": device, "dtype": dtype, "bos": 0, "versions": package_versions},
        **{"kl": 0.1, "top1": 0.5} | more,
    )


def save_evaluated_run(store: Store, run: str, own: Evaluation) -> None:
    row = {"fingerprint": "f", "method": "uniform", "quantizer": "rtn"}
    place = {name: own.provenance[name] for name in ("device", "dtype")}
    store.save_run(run, row | place, [own])


def full_perplexities(store: Store) -> dict[str, float]:
    return store.results().set_index("run")["perplexity_full"].round(6).to_dict()


# --- full-precision pairs ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "later_place",
    [{"device": "cuda:0"}, {"torch": "2.1"}, {"device": "cuda:0", "dtype": "bfloat16"}],
    ids=["another device", "another torch", "another device and dtype"],
)
def test_result_keeps_its_full_precision_pair(later_place):
    store = Store()
    store.save_full_precision("f", evaluation(10, kl=None))
    save_evaluated_run(store, "r", evaluation(11))
    before = store.results()
    store.save_full_precision("f", evaluation(10.9, kl=None, **later_place))
    pd.testing.assert_frame_equal(store.results(), before)
    assert before["increase"][0] == pytest.approx(0.1)
    assert csv_bytes(store.results()) == csv_bytes(before), "and so do exports"
    record = store.record(before["evaluation"][0])
    assert record["full"]["perplexity"] == pytest.approx(10)
    assert format_run_figures(record)["full precision"].startswith("10.0000 (this run +10.00 %)")


def test_full_precision_paired_by_device_and_dtype():
    store = Store()
    for number, place in enumerate(PLACES):
        store.save_full_precision("f", evaluation(10 + number, *place, kl=None))
    for number, place in enumerate(PLACES):
        save_evaluated_run(store, f"r{number}", evaluation(20 + number, *place))
    assert full_perplexities(store) == {f"r{n}": 10 + n for n in range(4)}
    store.save_full_precision("f", evaluation(99, "cuda:1", "float32", kl=None))
    assert len(store.query("SELECT id FROM evaluations WHERE run IS NULL")) == 4, "the same kind"


def test_result_paired_once_full_precision_is_available():
    store = Store()
    store.save_full_precision("f", evaluation(12, torch="2.1", kl=None))
    save_evaluated_run(store, "r", evaluation(20))
    assert np.isnan(full_perplexities(store)["r"]), "that of another torch is not its own"
    store.save_full_precision("f", evaluation(10, duckdb="1.1", kl=None))
    assert full_perplexities(store) == {"r": 10}, "DuckDB computes nothing of either"
    store.save_full_precision("f", evaluation(11, torch="2.2", kl=None))
    assert full_perplexities(store) == {"r": 10}


def test_migration_pairs_old_results_by_time(tmp_path, monkeypatch):
    """Pairs with equal provenance are measured, others inferred; a row may have none."""
    path, older = tmp_path / "old.duckdb", MIGRATIONS.index(_pairing_migration())
    monkeypatch.setattr(store_module, "MIGRATIONS", MIGRATIONS[:older])
    places = {"a": ("cpu", "1"), "b": ("cpu", "2"), "g": ("cuda:0", "1")}
    texts = {
        name: json.dumps({"device": device, "dtype": "float32", "versions": {"torch": torch}})
        for name, (device, torch) in places.items()
    }
    rows = [  # id, run, provenance, second, perplexity
        ("full-a", None, "a", 1, 10.0),
        ("r1", "r1", "a", 2, 11.0),  # same provenance as full-a
        ("r2", "r2", "b", 3, 12.0),  # another torch: full-a is the latest so far
        ("full-g", None, "g", 4, 10.9),  # on a GPU, the newest of its dtype
        ("r3", "r3", "g", 5, 11.0),  # same provenance as full-g
        ("r4", "r4", "a", 0, 11.0),  # before any other; full-a has the same provenance
    ]
    with Store(path).connect() as connection:
        for run in ("r1", "r2", "r3", "r4", "r5"):
            connection.execute("INSERT INTO runs (id, fingerprint) VALUES (?, 'f')", [run])
        for id, run, text, second, perplexity in rows:
            connection.execute(
                "INSERT INTO evaluations (id, run, fingerprint, corpus_sha256, protocol, tokens, "
                "perplexity, provenance, created, kl) VALUES (?, ?, 'f', 'abc', 'strided', 100, "
                "?, ?, TIMESTAMP '2026-01-01' + to_seconds(?), 0.1)",
                [id, run, perplexity, texts[text], second],
            )
        connection.execute(
            "INSERT INTO evaluations (id, run, fingerprint, corpus_sha256, protocol, tokens, "
            "perplexity, provenance, created, kl) VALUES ('r5', 'r5', 'f', 'abc', 'strided', 99, "
            "11, ?, TIMESTAMP '2026-01-02', 0.1)",
            [texts["a"]],
        )
    monkeypatch.undo()
    found = Store(path).results().set_index("evaluation")
    assert found["full_precision"].dropna().to_dict() == {
        "r1": "full-a", "r2": "full-a", "r3": "full-g", "r4": "full-a"
    }  # fmt: skip
    assert found["pairing"].dropna().to_dict() == {
        "r1": "measured", "r2": "inferred", "r3": "measured", "r4": "measured"
    }  # fmt: skip


def _pairing_migration() -> str:
    """Return the migration that adds full-precision pairs."""
    return next(script for script in MIGRATIONS if "ADD COLUMN full_precision" in script)


# --- keys of profiles and runs ----------------------------------------------------------------


@pytest.fixture
def folder(random_model):
    return str(random_model("llama-gqa"))


def open_session(folder: str, **options) -> Session:
    return Session(ModelSource(folder), Store(), device="cpu", **options)


def test_profiles_stored_per_dtype(folder, small_text):
    settings = ProfileSettings("rtn", calibration=str(small_text), samples=8, block_tokens=64)
    found = {}
    for dtype in ("float32", "bfloat16"):
        session = open_session(folder, dtype=dtype)
        assert session.find_profile(settings) is None
        found[dtype] = session.profile(settings)
        assert found[dtype].provenance["dtype"] == dtype
    for dtype, profile in found.items():
        again = open_session(folder, dtype=dtype).find_profile(settings)
        assert again.id == profile.id
        pd.testing.assert_frame_equal(again.values, profile.values)
    errors = [profile.scores("sensitivity", QuantConfig(8, 32)) for profile in found.values()]
    assert not np.allclose(*errors, rtol=1e-3), "which is why they are two"


def test_profile_key_depends_on_device_dtype_arithmetic(folder, monkeypatch):
    info, settings = open_session(folder).info, ProfileSettings("rtn")
    own = profile_key(info, settings, DeviceAndDtype("cpu", "float32"))
    assert resolve_device_and_dtype(info, "cpu") == DeviceAndDtype("cpu", "float32")
    keys = {
        profile_key(info, settings, DeviceAndDtype(device[:4].rstrip(":"), d))
        for device, d in PLACES
    }
    assert len(keys) == 4
    for package, changes in {"duckdb": False, "pulp": False, "torch": False, "hqq": True}.items():
        with monkeypatch.context() as patch:
            fake_version(patch, package)
            key = profile_key(info, settings, DeviceAndDtype("cpu", "float32"))
        assert (key != own) == changes, package
    versions.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "ARITHMETIC", provenance.ARITHMETIC + 1)
        versions.cache_clear()
        assert profile_key(info, settings, DeviceAndDtype("cpu", "float32")) != own
    versions.cache_clear()


def fake_version(patch: pytest.MonkeyPatch, package: str) -> None:
    """Pretend that another version of a package is installed."""
    own = provenance.version
    patch.setattr(provenance, "version", lambda n: "99.9" if n == package else own(n))
    versions.cache_clear()


@pytest.fixture
def arithmetic_1(monkeypatch):
    """Set the arithmetic version of the release that did not record it yet."""
    monkeypatch.setattr(provenance, "ARITHMETIC", 1)
    versions.cache_clear()
    yield
    versions.cache_clear()


def test_find_profile_ignores_older_arithmetic(folder):
    session, settings = open_session(folder), ProfileSettings("rtn")
    older = settings.key(session.info.fingerprint, corpus_identity(settings.calibration))
    package_versions = {name: text for name, text in versions().items() if name != "arithmetic"}
    recorded = {"device": "cpu", "dtype": "float32", "versions": package_versions}
    session.store.merge_profile(make_profile(session, older, recorded, ["weight_error"]))
    assert session.find_profile(settings) is None


@pytest.mark.usefixtures("arithmetic_1")
def test_find_profile_converts_previous_version_key(folder):
    session, settings = open_session(folder), ProfileSettings("rtn")
    older = settings.key(session.info.fingerprint, corpus_identity(settings.calibration))
    package_versions = {name: text for name, text in versions().items() if name != "arithmetic"}
    recorded = {"device": "cpu", "dtype": "float32", "versions": package_versions}
    elsewhere = recorded | {"device": "cuda:0"}
    kept = make_profile(session, older, recorded, ["kurtosis", "weight_error"])
    session.store.merge_profile(kept)
    session.store.merge_profile(
        replace(make_profile(session, older, elsewhere, ["sensitivity"]), provenance=elsewhere)
    )
    session.store.save_row_scores(older, {"m": np.ones(3)}, elsewhere)
    assert open_session(folder, dtype="bfloat16").find_profile(settings) is None
    found = session.find_profile(settings)
    assert found.id == session.profile_key(settings) != older
    assert set(found.metrics) == {"kurtosis", "weight_error"}, "what the GPU added is another's"
    assert session.store.row_scores(found.id) == {}
    assert session.store.profile(older) is None


def make_profile(
    session: Session, id: str, recorded: dict, metrics: list[str], value=1.0
) -> Profile:
    """Return a made-up profile with the given metrics."""
    matrix = session.info.matrices[0]
    values = pd.DataFrame(
        [(matrix.name, 0, matrix.type, metric, "", "", value) for metric in metrics],
        columns=["module", "layer", "type", "metric", "config", "part", "value"],
    )
    info = session.info
    return Profile(id, info.fingerprint, ProfileSettings("rtn"), info.matrices, values, recorded)


def test_keep_profile_concurrent_threads_merge_metrics(folder):
    """All threads start merging at the same time."""
    session = open_session(folder)
    metrics = ["kurtosis", "weight_error", "sensitivity", "sensitivity_module"]
    recorded = {"device": "cpu", "dtype": "float32", "corpus_sha256": "abc"}
    gate, failed = threading.Barrier(len(metrics)), []

    def measure(metric: str) -> None:
        try:
            mine = Session(session.source, Store(), device="cpu")
            gate.wait()
            merge_profile(mine, make_profile(session, "p", recorded, [metric]))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=measure, args=[metric]) for metric in metrics]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert set(session.store.profile("p").metrics) == set(metrics)


class ConnectionWithConcurrentWrite:
    """A DuckDB connection; after its first statement another connection writes and commits."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, write: Callable[[], None]) -> None:
        self.connection, self.write = connection, write

    def execute(self, sql: str, *parameters: object) -> duckdb.DuckDBPyConnection:
        result = self.connection.execute(sql, *parameters)
        if self.write is not None:
            write, self.write = self.write, None
            write()
        return result

    def __getattr__(self, name: str) -> object:
        return getattr(self.connection, name)


def test_merge_profile_concurrent_write_between_read_and_write(folder, monkeypatch):
    """The transaction that read an outdated profile is repeated, so no metric is lost."""
    session, recorded = open_session(folder), {"corpus_sha256": "abc"}
    first = make_profile(session, "p", recorded, ["kurtosis"])
    second = make_profile(session, "p", recorded, ["weight_error"])
    original, transactions = Store.transaction, []

    @contextmanager
    def transaction(store: Store) -> Iterator[object]:
        transactions.append(store)
        with original(store) as connection:
            if len(transactions) == 1:
                connection = ConnectionWithConcurrentWrite(
                    connection, lambda: Store().merge_profile(first)
                )
            yield connection

    monkeypatch.setattr(Store, "transaction", transaction)
    session.store.merge_profile(second)
    monkeypatch.undo()
    assert len(transactions) == 3, "the first attempt, the concurrent write, the second attempt"
    assert set(session.store.profile("p").metrics) == {"kurtosis", "weight_error"}


def test_keep_profile_new_corpus_replaces_old_metrics(folder):
    session = open_session(folder)
    session.store.merge_profile(make_profile(session, "p", {"corpus_sha256": "old"}, ["kurtosis"]))
    session.store.merge_profile(
        make_profile(session, "p", {"corpus_sha256": "new"}, ["weight_error"])
    )
    found = session.store.profile("p")
    assert (found.metrics, found.provenance["corpus_sha256"]) == (("weight_error",), "new")


# --- failures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_evaluate_non_finite_raises_naming_module(folder, value):
    loaded = load_model(ModelSource(folder), "cpu")
    loaded.model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    ids, protocol = np.arange(1, 200), Protocol.named("strided", 256)
    whole = load_model(ModelSource(folder), "cpu").model
    with pytest.raises(LsqError, match=r"model\.layers\.1\.mlp\.up_proj"):
        evaluate_model(loaded.model, ids, protocol, bos=0, reference=whole)
    with pytest.raises(LsqError, match=r"full-precision .* model\.layers\.1\.mlp\.up_proj"):
        evaluate_model(whole, ids, protocol, bos=0, reference=loaded.model)


def test_cli_run_non_finite_exit_1_stores_nothing(random_model, small_text, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    folder.mkdir()
    for file in random_model("llama-gqa").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][7] = torch.inf
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    words = ["--model", str(folder), "--corpus", str(small_text), "--device", "cpu"]
    for verb in (["eval"], ["run", "--method", "uniform", "--base", "4.13", "--quantizer", "rtn"]):
        assert main([*verb, *words, "--max-tokens", "200", "--json"]) == 1
        assert "model.norm" in capsys.readouterr().err
    store = Store()
    assert store.results().empty
    assert store.query("SELECT id FROM evaluations").empty


@pytest.mark.parametrize("name", ["strided", "blocks"])
def test_lay_windows_text_too_short_raises(name):
    protocol = Protocol.named(name, 32)
    enough = MIN_PREDICTED + 1 if name == "strided" else 96
    assert sum(window.scored for window in make_windows(enough, protocol)) >= MIN_PREDICTED
    with pytest.raises(InputError, match=rf"{enough - 1} tokens.* {MIN_PREDICTED} predicted"):
        make_windows(enough - 1, protocol)


def test_evaluation_request_max_tokens_below_minimum_raises():
    EvaluationRequest(max_tokens=MIN_PREDICTED + 1)
    with pytest.raises(InputError, match=rf"at least {MIN_PREDICTED + 1}.*\b64\b"):
        EvaluationRequest(max_tokens=MIN_PREDICTED)


# --- runs -------------------------------------------------------------------------------------


def test_add_evaluation_repeated_is_one_result():
    store = Store()
    save_evaluated_run(store, "r", evaluation(11))
    manifest = {"run": "r", "fingerprint": "f"}
    for release in ("1.0", "1.1"):
        store.add_evaluation(manifest, 1, "x", evaluation(11, kl=None, duckdb=release))
    assert sorted(store.results()["saved_model"]) == [False, True]
    store.add_evaluation(manifest, 1, "x", evaluation(11, kl=None, torch="2.1"))
    assert len(store.results()) == 3, "by another torch it is another figure"


def test_run_seconds_sum_to_total(folder, small_text):
    session = open_session(folder)
    settings = ProfileSettings("rtn", calibration=str(small_text), samples=8, block_tokens=64)
    plan = session.plan(PlanRequest("mxq", budget="3.4bpp"), settings)
    request = EvaluationRequest(str(small_text), max_tokens=1500)
    seconds = dict(session.run(plan, "rtn", request)["seconds"])
    whole = seconds.pop("whole")
    assert sum(seconds.values()) == pytest.approx(whole, rel=0.05)
    assert {"load", "profile", "quantize", "full precision", "evaluate"} <= seconds.keys()
    assert min(seconds.values()) >= 0
    kept = session.store.record(session.store.results()["evaluation"][0])["evaluation"]["seconds"]
    assert kept == pytest.approx(seconds | {"whole": whole})


def test_sweep_reuses_runs_after_non_numeric_upgrade(folder, small_text, monkeypatch):
    """DuckDB only stores and PuLP only plans, but torch computes the figures."""
    text = EvaluationRequest(str(small_text), max_tokens=200)
    sweep_items = items([PlanRequest("uniform", base="4.13")], ["rtn"], [text])

    def state() -> str:
        [row] = sweep(open_session(folder), sweep_items, ProfileSettings("rtn"))
        return row["state"]

    assert state() == "done"
    for package, expected in {"duckdb": "found", "pulp": "found", "torch": "done"}.items():
        with monkeypatch.context() as patch:
            fake_version(patch, package)
            assert state() == expected, package
        versions.cache_clear()
