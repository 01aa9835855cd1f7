"""Importing published measurements, checked against the files and the figures in [A]."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lsq_core.bits import LADDER
from lsq_core.cli.program import main
from lsq_core.errors import InputError
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.model.info import Matrix
from lsq_core.model.source import ModelSource
from lsq_core.planning.plan import Plan
from lsq_core.planning.request import PlanRequest
from lsq_core.reference.importing import import_reference
from lsq_core.results.compare import (
    WinTieLoss,
    add_labels,
    pareto,
    win_tie_loss,
    win_tie_loss_at_equal_bytes,
)
from lsq_core.session import Session
from lsq_core.store import connection as store_module
from lsq_core.store.schema import MIGRATIONS
from lsq_core.store.store import Store
from lsq_core.units import GIB
from tests.conftest import REFERENCE

SEVEN, EIGHT, SEVENTY = (
    "published:Llama-2-7b-hf",
    "published:Meta-Llama-3-8B",
    "published:Llama-2-70b-hf",
)
BOOST = "data-vis/endeavors/boost/data"
COMBINED = f"{BOOST}/combined.csv"
PLAN_FILE = f"{BOOST}/allot/mxq/sensi-boost-2-0/quant-allot-sensi-boost-2-0.csv"


@pytest.fixture(scope="module")
def reference() -> Path:
    """The published measurements; tests that need them are skipped if they are missing."""
    if not REFERENCE.is_dir():
        pytest.skip(f"the published measurements are not at {REFERENCE}")
    return REFERENCE


@pytest.fixture(scope="module")
def imported_reference(published: Path, published_database: Path) -> tuple[Store, dict]:
    """A read-only database with the entire reference, and the summary of its import."""
    return Store(published), json.loads(published_database.with_name("said.json").read_text("utf8"))


@pytest.fixture(scope="module")
def store(imported_reference: tuple[Store, dict]) -> Store:
    return imported_reference[0]


def csv(path: str) -> pd.DataFrame:
    return pd.read_csv(REFERENCE / path)


def open_session(store: Store, model: str) -> Session:
    return Session(ModelSource(model), store)


def rows_by_table(store: Store) -> dict[str, int]:
    tables = ("models", "matrices", "profiles", "scores", "plans", "runs", "evaluations")
    return {t: int(store.query(f"SELECT count(*) n FROM {t}")["n"][0]) for t in tables}


# --- comparison with the files ----------------------------------------------------------------


def test_import_counts_match_files(imported_reference):
    store, result = imported_reference
    assert result["counts"] == rows_by_table(store)
    runs = csv(COMBINED)
    quantized = runs[runs["algo"] != "fp16"]
    figures = runs[["ppl_wikitext", "ppl_c4"]].notna().sum().sum()
    # 70B, 7B and 8B have weight statistics; chat, Instruct and meditron only sensitivities
    assert result["counts"] == {
        "models": 6,
        "matrices": 560 + 5 * 224,
        "profiles": 1 + (3 + 8 + 3) + (3 + 3) + 3 * 3,
        "scores": len(store.query("SELECT 1 FROM scores")),
        "plans": len(quantized),
        "runs": len(quantized),
        "evaluations": figures,
    }
    assert len(quantized) == 948
    assert figures == 1895
    assert len(result["files"]) == 3 + 1 + 3 + 1 + 33 + 1


def test_import_reports_missing_data(imported_reference):
    _, result = imported_reference
    assert [s for s in result["flawed"] if "sensi-boost-3-3 at 3.13" in s] == result["flawed"]
    missing = "\n".join(result["missing"])
    assert re.search(rf"{SEVENTY} .*pileval .*hqq .*no sensitivity\.", missing)
    assert re.search(rf"{SEVENTY}: .*size", missing)
    assert "meditron-7b: only sensitivities" in missing
    assert re.search(r"combined\.csv, row 245: .*mxq1 .*2\.15 .*ppl_wikitext", missing)
    assert sum("has no ppl_" in sentence for sentence in result["missing"]) == 5
    assert re.search(rf"{EIGHT} .*c4@variant-sensi .*hqq .*no sensitivity at", missing)
    assert f"{SEVEN} on pileval with hqq" not in missing, "nothing is missing there"


def test_imported_models_have_shapes_and_sizes(store):
    seven, seventy = store.model(SEVEN), store.model(SEVENTY)
    assert (seven.layers, seven.parameters, len(seven.matrices)) == (32, 6738415616, 224)
    assert seven.linear_parameters == 6476005376
    assert seven.other_bytes == 2 * (6738415616 - 6476005376)
    shapes = {m.type: (m.out_features, m.in_features) for m in store.model(EIGHT).matrices}
    assert shapes == {
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    }
    assert seventy.parameters == seventy.linear_parameters, "the rest is not told"
    assert set(store.models(origin="published")["fingerprint"]) >= {SEVEN, EIGHT, SEVENTY}
    assert store.models().empty, "published models are not among one's own"


@pytest.mark.parametrize("model", [SEVEN, EIGHT, SEVENTY])
def test_default_profile_matches_csv(store, model):
    session = open_session(store, model)
    profile = session.profile(session.default_settings)
    name = model.removeprefix("published:")
    table = csv(f"src/data/fnorm-{name}.csv")
    table.index = "model.layers." + table["layer"].astype(str) + "." + table["module"]
    order = [m.name for m in profile.matrices]
    for config in LADDER:
        own = table[(table["nbit1"] == config.bits) & (table["gsize1"] == config.group_size)]
        assert (profile.scores("weight_error", config) == own["fnorm"].reindex(order)).all()
    once = table[~table.index.duplicated()].reindex(order)
    if model == SEVENTY:
        kurtosis = csv(f"data-vis/data/wdist/wdist-{name}.csv").set_index(["module", "layer"])
        keys = list(zip(once["module"], once["layer"], strict=True))
        assert (profile.scores("kurtosis") == kurtosis.loc[keys, "kurtosis"].to_numpy()).all()
        assert "sensitivity" not in set(profile.values["metric"])
    else:
        assert (profile.scores("kurtosis") == once["kurtosis"]).all()
        detection = profile.scores("sensitivity", LADDER[7])
        assert (detection == once["sensitivity"]).all(), "b4g64 as the published plans had it"
    assert profile.provenance["files"].keys() >= {f"src/data/fnorm-{name}.csv"}


def test_part_sensitivity_shared_by_modules(store):
    table = csv("data-vis/data/llama-sensitivity.csv")
    table = table[(table["dataset"] == "pileval") & (table["nbits"] == 3)]
    table = table[table["group_size"] == 64].set_index(["model", "part", "layer"])["sensitivity"]
    for model, o_proj_part in ((SEVEN, "attn_out"), (EIGHT, "attn_in")):
        values = (
            open_session(store, model).profile(open_session(store, model).default_settings).values
        )
        values = values[(values["metric"] == "sensitivity") & (values["config"] == "b3g64")]
        assert len(values) == 224
        for row in values.itertuples():
            key = (model.removeprefix("published:"), row.part, row.layer)
            assert row.value == table[key]
        parts = values.groupby("type")["part"].unique().str[0]
        assert parts["self_attn.o_proj"] == o_proj_part
        assert parts["self_attn.v_proj"] == "attn_in"
        assert parts["mlp.up_proj"] == "mlp_gate"
        assert parts["mlp.down_proj"] == "mlp_down"


def test_conflicting_files_stored_as_separate_profiles(store):
    key = {"dataset": "pileval", "part": "attn_in", "model": "Llama-2-7b-hf"}
    key |= {"nbits": 3, "group_size": 64, "layer": 5}
    found = {}
    for calibration, file in (
        ("pileval", "llama-sensitivity.csv"),
        ("pileval@variant-sensi", "variant-sensi.csv"),
    ):
        row = csv(f"data-vis/data/{file}")
        for column, value in key.items():
            row = row[row[column] == value]
        stored_rows = store.query(
            "SELECT s.value, p.provenance FROM scores s JOIN profiles p ON s.profile = p.id "
            "WHERE p.fingerprint = ? AND p.settings ->> '$.calibration' = ? "
            "AND p.settings ->> '$.quantizer' = 'hqq' AND s.config = 'b3g64' "
            "AND s.metric = 'sensitivity' AND s.module = 'model.layers.5.self_attn.k_proj'",
            [SEVEN, calibration],
        )
        assert stored_rows["value"].tolist() == row["sensitivity"].tolist()
        assert f"data-vis/data/{file}" in json.loads(stored_rows["provenance"][0])["files"]
        found[file] = stored_rows["value"][0]
    assert len(set(found.values())) == 2


def test_import_profiles_by_calibration_and_quantizer(store):
    frame = store.query(
        "SELECT fingerprint, settings ->> '$.calibration' AS calibration, "
        "settings ->> '$.quantizer' AS quantizer, origin FROM profiles"
    )
    assert set(frame["origin"]) == {"published"}
    seven = frame[frame["fingerprint"] == SEVEN]
    assert sorted(seven.loc[seven["quantizer"] == "rtn", "calibration"]) == [
        "bos",
        "c4",
        "pileval",
        "wikitext2",
    ]
    rtn = csv("data-vis/data/qnt-mtd-sensi.csv").query(
        "quant_method == 'rtn' and dataset == 'bos' and part == 'mlp_down' and nbits == 4 "
        "and group_size == 64 and layer == 31"
    )
    stored_rows = store.query(
        "SELECT value FROM scores s JOIN profiles p ON s.profile = p.id "
        "WHERE p.settings ->> '$.calibration' = 'bos' AND p.settings ->> '$.quantizer' = 'rtn' "
        "AND s.config = 'b4g64' AND s.module = 'model.layers.31.mlp.down_proj'"
    )
    assert stored_rows["value"].tolist() == rtn["sensitivity"].tolist()
    medical = open_session(store, "meditron-7b")
    plan = medical.plan(PlanRequest("sensiboost", base="3.13"), medical.default_settings)
    assert plan.ranking_scores
    profile = store.profile(plan.profile)
    assert profile.provenance["missing"], "it says what was never published"


@pytest.mark.parametrize(
    ("model", "algo", "attempt", "bits", "method", "quantizer"),
    [
        ("Llama-2-7b-hf", "gptq", None, 3.13, "gptq", "gptq"),
        ("Meta-Llama-3-8B", "awq", None, 4.25, "awq", "awq"),
        ("Meta-Llama-3-8B", "bnb", None, 8.13, "bnb", "bnb"),
        ("Meta-Llama-3-8B", "hqq", None, 3.13, "uniform", "hqq"),
        ("Llama-2-7b-hf", "mxq", "mxq1", 2.57, "mxq", "hqq"),
        ("Llama-2-7b-hf", "mxq", "sensi-boost-2-1", 3.51, "sensiboost", "hqq"),
        ("Meta-Llama-3-8B", "mxq", "kurt-boost-3-2", 4.13, "kurtboost", "hqq"),
        ("Meta-Llama-3-8B", "mxq", "sensi-abl-3-3", 4.51, "sensiboost-ablation", "hqq"),
        ("Llama-2-7b-hf", "mxq", "kurt-abl-2-0", 3.25, "kurtboost-ablation", "hqq"),
    ],
)
def test_imported_run_matches_csv(store, model, algo, attempt, bits, method, quantizer):
    table = csv(COMBINED)
    same = (table["model"] == model) & (table["algo"] == algo) & (table["bpp"] == bits)
    same &= table["attempt"].isna() if attempt is None else table["attempt"] == attempt
    (row,) = table[same].itertuples()
    (full,) = table[(table["model"] == model) & (table["algo"] == "fp16")].itertuples()
    runs = store.results(f"published:{model}", origin="published")
    runs = add_labels(runs[runs["method"] == method])
    runs = runs[runs["label"] == f"{bits:.2f}"]
    if attempt and attempt != "mxq1":
        stop, top = map(int, attempt[-3:].split("-"))
        runs = runs[(runs["boost_stop"] == stop) & (runs["top_m"] == top)]
    runs = runs.set_index("corpus")
    assert set(runs.index) == {"wikitext2", "c4"}
    for corpus, column in (("wikitext2", "ppl_wikitext"), ("c4", "ppl_c4")):
        assert runs.loc[corpus, "perplexity"] == getattr(row, column)
        assert runs.loc[corpus, "perplexity_full"] == getattr(full, column)
    first = runs.iloc[0]
    assert first["quantizer"] == quantizer
    assert first["protocol"] == "strided"
    assert pd.isna(first["measured_bytes"]), "nothing of it was measured"
    content = store.plan_content(first["plan"])
    published_entry = content["published"]
    assert published_entry["row"] == row.Index + 2
    assert (published_entry["attempt"], published_entry["bits_label"]) == (attempt, bits)
    if np.isnan(row.model_storage_size):
        assert pd.isna(first["model_bytes"])
        assert published_entry["storage_gib"] is None
    else:
        assert first["model_bytes"] == round(row.model_storage_size * GIB)
        assert published_entry["load_gib"] == row.load_mem_allot
    assert published_entry["bits_exact"] == bool(content["modules"])
    if not content["modules"]:
        assert first["bits_per_param"] == bits


def test_published_plan_from_json_matches_csv(store):
    table = csv(PLAN_FILE)
    table = table[(table["model"] == "Llama-2-7b-hf") & (table["bit_budget"] == 4.13)]
    content = _published_plan(store, SEVEN, "sensi-boost-2-0", "4.13")
    info = store.model(SEVEN)
    plan = Plan.from_json(content, info.matrices, info.other_bytes)
    theirs = {f"model.layers.{r.layer}.{r.module}": f"b{r.b1}g{r.g1}" for r in table.itertuples()}
    assert {m.name: c.name for m, c in plan.choice.items()} == theirs
    bits = 8 * 2**20 * table["memmb"].sum() / table["param_cnt"].sum()
    assert plan.bits_per_param == pytest.approx(bits, rel=1e-12)
    assert (plan.axis, plan.metadata, plan.base) == (0, "8bit", "4.13")
    assert plan.request == PlanRequest("sensiboost", base="4.13", boost_stop=2, top_m=0)


def _published_plan(store: Store, model: str, attempt: str, base: str) -> dict:
    frame = store.query(
        "SELECT id FROM plans WHERE fingerprint = ? AND content ->> '$.published.attempt' = ? "
        "AND content ->> '$.base' = ?",
        [model, attempt, base],
    )
    assert len(frame) == 1
    return store.plan_content(frame["id"][0])


def test_flawed_plan_imported_with_note(store):
    content = _published_plan(store, SEVEN, "sensi-boost-3-3", "3.13")
    assert min(entry["bits"] for entry in content["modules"].values()) == 2
    assert "Flawed as published" in content["notes"][0]
    notes = store.query("SELECT count(*) n FROM plans WHERE content ->> '$.notes' LIKE '%Flawed%'")
    assert notes["n"][0] == 1


def test_mxq_objectives_stored_with_plans(store):
    table = csv("data-vis/data/mxq-objectives.csv").drop_duplicates()
    stored_rows = store.query(
        "SELECT fingerprint, CAST(content ->> '$.published.bits_label' AS DOUBLE) AS bpp, "
        "CAST(content ->> '$.published.objective' AS DOUBLE) AS objective "
        "FROM plans WHERE method = 'mxq'"
    )
    assert len(stored_rows) == len(table) == 518
    table = table.assign(fingerprint="published:" + table["model"])
    both = stored_rows.merge(table, on=["fingerprint", "bpp"])
    assert len(both) == 518
    assert (both["objective"] == both["fnorm"]).all()


def test_mxq_objectives_equal_summed_weight_errors(store):
    """Equal to the digit for seven budgets; the other two plans came from another solve."""
    session = open_session(store, SEVEN)
    profile = session.profile(session.default_settings)
    frame = store.query(
        "SELECT content FROM plans WHERE method = 'mxq' AND fingerprint = ? "
        "AND content ->> '$.published.bits_exact' = 'true'",
        [SEVEN],
    )
    assert len(frame) == 9
    errors = profile.by_config("weight_error")
    names = [c.name for c in LADDER]
    relative_gap = {}
    for content in map(json.loads, frame["content"]):
        total = sum(
            errors[i, names.index(content["modules"][m.name]["config"])]
            for i, m in enumerate(profile.matrices)
        )
        relative_gap[content["request"]["budget"]] = total / content["published"]["objective"] - 1
    exact = [budget for budget, share in relative_gap.items() if abs(share) < 1e-12]
    assert len(exact) == 7
    assert relative_gap["2.250bpp"] == pytest.approx(-0.00127, abs=1e-5)  # with 2.2513 bits
    assert relative_gap["3.130bpp"] == pytest.approx(0.00060, abs=1e-5)


# --- planning from published profiles -----------------------------------------------------------


def test_published_boost_plans_reproduced(store):
    """All but one of the published SensiBoost and KurtBoost plans match, module by module.

    There are 2 models × 2 methods × 2 boost stops × 4 values of top-m × 6 budgets.
    """
    reproduced, different = 0, []
    for model in (SEVEN, EIGHT):
        session = open_session(store, model)
        session.find_profile = functools.cache(session.find_profile)  # otherwise read 96 times
        published = store.query(
            "SELECT content FROM plans WHERE fingerprint = ? "
            "AND method IN ('sensiboost', 'kurtboost')",
            [model],
        )
        for content in map(json.loads, published["content"]):
            ours = session.plan(PlanRequest(**content["request"]), session.default_settings)
            if ours.modules == content["modules"]:
                reproduced += 1
                assert ours.bits_per_param == content["bits_per_param"]
            else:
                different.append((model, content["published"]["attempt"], content["base"]))
    assert reproduced == 191
    assert different == [(SEVEN, "sensi-boost-3-3", "3.13")], "the plan known to be flawed"


def test_plan_without_published_scores_raises(store):
    session = open_session(store, SEVENTY)
    request = PlanRequest("sensiboost", base="3.13")
    with pytest.raises(InputError, match=r"70b-hf .*sensitivity.* SensiBoost"):
        session.plan(request, session.default_settings)
    plan = session.plan(PlanRequest("kurtboost", base="3.13"), session.default_settings)
    assert plan.ranking_scores
    with pytest.raises(InputError, match=r"stdlib .*\bbos"):
        open_session(store, SEVEN).plan(
            request, Session(ModelSource("demo"), store).default_settings
        )
    with pytest.raises(InputError, match="'nothing'"):
        open_session(store, "published:nothing").info  # noqa: B018
    with pytest.raises(InputError, match=r"without .*windows"):
        store.windows(store.results(SEVEN, origin="published")["evaluation"][0])


def test_published_model_run_raises_no_weights(store):
    session = open_session(store, SEVEN)
    plan = session.plan(PlanRequest("uniform", base="3.13"), session.default_settings)
    assert plan.profile is None
    raises_no_weights = pytest.raises(InputError, match="no weights")
    with raises_no_weights:
        session.run(plan, "hqq", EvaluationRequest())
    with raises_no_weights:
        session.evaluate_full(EvaluationRequest())
    with raises_no_weights:
        session.folder  # noqa: B018


def test_results_separate_published_and_measured(store):
    assert store.results().empty
    assert store.results(SEVEN).empty
    assert len(store.results(origin="published")) == 1895 - 4
    assert len(store.results(origin=None)) == 1895 - 4
    own = "SELECT corpus FROM evaluations WHERE run IS NULL AND fingerprint = ?"
    assert sorted(store.query(own, [SEVEN])["corpus"]) == ["c4", "wikitext2"]


def test_local_folder_precedes_published_name(store, tmp_path, monkeypatch):
    (tmp_path / "Llama-2-7b-hf").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no config\.json"):
        open_session(store, "Llama-2-7b-hf").info  # noqa: B018
    assert open_session(store, SEVEN).info.fingerprint == SEVEN


# --- the paper's comparisons ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "other", "percentages"),
    [
        ("sensiboost", "uniform", (98, 1, 1)),
        ("sensiboost", "mxq", (96, 0, 4)),
        ("sensiboost", "sensiboost-ablation", (64, 12, 24)),
        ("kurtboost", "uniform", (92, 8, 0)),
        ("kurtboost", "mxq", (94, 1, 5)),
        ("kurtboost", "kurtboost-ablation", (66, 25, 9)),
        ("sensiboost", "kurtboost", (19, 25, 56)),
    ],
)
def test_win_tie_loss_matches_figure_6(store, method, other, percentages):
    found = win_tie_loss(store.results(SEVEN, origin="published"), method, other)
    assert found.total == 96
    assert found.percentages == percentages


def test_win_tie_loss_small_example():
    runs = pd.DataFrame(
        {
            "fingerprint": "m",
            "corpus": "c",
            "corpus_sha256": ["x", "x", "x", "x", "y"],
            "protocol": "strided",
            "tokens": 10,
            "method": ["kurtboost", "kurtboost", "uniform", "mxq", "uniform"],
            "base": ["3.13", "4.13", "3.13", None, "4.13"],
            "request": [
                '{"boost_stop": 2, "top_m": 0}',
                '{"boost_stop": 2, "top_m": 0}',
                "{}",
                '{"budget": "4.131bpp"}',
                None,
            ],
            "perplexity": [5.004, 6.0, 5.0, 6.01, 1.0],
        }
    )
    assert win_tie_loss(runs, "kurtboost", "uniform") == WinTieLoss(0, 1, 0), "same text only"
    assert win_tie_loss(runs, "kurtboost", "mxq") == WinTieLoss(1, 0, 0)
    assert win_tie_loss(runs, "kurtboost", "gptq").percentages == (0, 0, 0)


def make_runs(rows: list[tuple[str, float, float]], **more: object) -> pd.DataFrame:
    """Return runs of one measurement from rows of method, bits and perplexity."""
    same = {"fingerprint": "m", "corpus": "c", "corpus_sha256": "x", "protocol": "strided"}
    frame = pd.DataFrame(rows, columns=["method", "bits_per_param", "perplexity"])
    return frame.assign(**same, tokens=None, **more)


def test_win_tie_loss_at_equal_bytes_small_example():
    runs = make_runs(
        [
            ("uniform", 3.1, 9.0),
            ("uniform", 3.3, 8.0),
            ("uniform", 3.5, 8.5),  # more bits than 3.3 but worse: no neighbour
            ("mxq", 3.0, 1.0),  # smaller than any uniform run: left out
            ("mxq", 3.2, 8.4),  # uniform reaches √(9·8) = 8.485 there: a win
            ("mxq", 3.2, 8.6),  # and a loss
            ("mxq", 3.3 * (1 - 1e-15), 8.004),  # the same bits summed in another order: ties
            ("mxq", 3.3 * 1.0009, 8.2),  # within 0.1 % of 3.3: the same size, a loss
            ("mxq", 3.4, 8.1),  # no neighbour above: left out
        ]
    )
    assert win_tie_loss_at_equal_bytes(runs, "mxq", "uniform") == WinTieLoss(1, 1, 2)
    assert win_tie_loss_at_equal_bytes(runs, "mxq", "gptq") == WinTieLoss(0, 0, 0)
    other_text = make_runs([("uniform", 2.0, 0.5)]).assign(corpus_sha256="y")
    both = pd.concat([runs, other_text])
    assert win_tie_loss_at_equal_bytes(both, "mxq", "uniform") == WinTieLoss(1, 1, 2)
    assert win_tie_loss_at_equal_bytes(both.iloc[::-1], "mxq", "uniform") == WinTieLoss(1, 1, 2)
    apart = make_runs([("uniform", 2.5, 9.0), ("uniform", 3.1, 8.0), ("mxq", 2.9, 1.0)])
    assert win_tie_loss_at_equal_bytes(apart, "mxq", "uniform") == WinTieLoss(0, 0, 0)


def reference_perplexity_at(runs: list[tuple[float, float]], bits: float) -> float | None:
    """Return the perplexity that runs (bits, perplexity) reach at ``bits``, using loops."""
    same = [ppl for b, ppl in runs if abs(b / bits - 1) <= 0.001]
    if same:
        return min(same)
    front = [
        (b, ppl)
        for b, ppl in runs
        if not any((c <= b and q < ppl) or (c < b and q <= ppl) for c, q in runs)
    ]
    below, above = [r for r in front if r[0] < bits], [r for r in front if r[0] > bits]
    if not below or not above or min(above)[0] / max(below)[0] > 1.1:
        return None
    (low, high_ppl), (high, low_ppl) = max(below), min(above)
    share = (bits - low) / (high - low)
    return high_ppl ** (1 - share) * low_ppl**share


def test_win_tie_loss_at_equal_bytes_matches_loops(store):
    """Against loops over the published runs."""
    runs = store.results(SEVEN, origin="published").dropna(subset=["perplexity"])
    wins = ties = losses = 0
    for mine in runs[runs["method"] == "sensiboost"].itertuples():
        theirs = [
            (run.bits_per_param, run.perplexity)
            for run in runs[runs["method"] == "mxq"].itertuples()
            if run.corpus == mine.corpus
        ]
        best = reference_perplexity_at(theirs, mine.bits_per_param)
        if best is not None:
            own, best = round(mine.perplexity, 2), round(best, 2)
            wins, ties, losses = wins + (own < best), ties + (own == best), losses + (own > best)
    found = win_tie_loss_at_equal_bytes(runs, "sensiboost", "mxq")
    assert found == WinTieLoss(wins, ties, losses)
    assert found.total > 50


def test_pareto_small_example():
    size = pd.Series([3.0, 1.0, 2.0, 3.0, 4.0, np.nan], index=list("abcdef"))
    perplexity = pd.Series([5.0, 9.0, 9.0, 5.0, 6.0, 1.0], index=list("abcdef"))
    front = pareto(size, perplexity)
    assert front[front].index.tolist() == ["a", "b", "d"], "both of two equal runs"


def test_llama3_8b_headline_gain(store):
    """Llama-3-8B at 3.13 bits on WikiText-2: −9.4 % perplexity for +1.8 % bits."""
    runs = add_labels(store.results(EIGHT, origin="published"))
    runs = runs[(runs["label"] == "3.13") & (runs["corpus"] == "wikitext2")]
    (uniform,) = runs[runs["method"] == "uniform"].itertuples()
    boosted = runs[(runs["method"] == "sensiboost") & (runs["boost_stop"] == 3)]
    (boost,) = boosted[boosted["top_m"] == 0].itertuples()
    assert (uniform.perplexity, boost.perplexity) == (9.3077, 8.4326)
    assert f"{boost.perplexity / uniform.perplexity - 1:.1%}" == "-9.4%"
    assert f"{uniform.bits_per_param:.4f}" == "3.1270"
    assert f"{boost.bits_per_param:.4f}" == "3.1834"
    assert f"{boost.bits_per_param / uniform.bits_per_param - 1:.1%}" == "1.8%"


# --- repeated imports and bad input ---------------------------------------------------------------


def test_reimport_replaces_published_and_keeps_own_plans(store, tmp_path):
    again = Store(shutil.copy(store.path, tmp_path / "again.duckdb"))
    before = rows_by_table(again)
    session = open_session(again, SEVEN)
    plan = session.plan(PlanRequest("kurtboost", base="3.13"), session.default_settings)
    own = again.save_plan(plan, SEVEN, plan.profile, "mine")
    ids = again.query("SELECT id FROM runs ORDER BY id")["id"].tolist()
    import_reference(REFERENCE, again)
    assert rows_by_table(again) == before | {"plans": before["plans"] + 1}
    assert again.query("SELECT id FROM runs ORDER BY id")["id"].tolist() == ids
    assert again.plan_content(own)["method"] == "kurtboost"


@pytest.fixture
def small_checkout(reference: Path, tmp_path: Path) -> Path:
    """A checkout of one model and one plan file; the files are links to the reference."""
    root = tmp_path / "checkout"
    names = ("llama-sensitivity", "qnt-mtd-sensi", "variant-sensi", "mxq-objectives")
    for path in (
        "src/data/fnorm-Llama-2-7b-hf.csv",
        "data-vis/data/wdist/wdist-Llama-2-7b-hf.csv",
        *(f"data-vis/data/{name}.csv" for name in names),
        COMBINED,
        PLAN_FILE,
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).symlink_to(reference / path)
    return root


def edit_file(root: Path, path: str, change: Callable[[list[str]], list[str]]) -> None:
    """Replace a link by a changed copy; ``change`` maps the old lines to the new ones."""
    lines = (root / path).read_text("utf8").splitlines()
    (root / path).unlink()
    (root / path).write_text("\n".join(change(lines)) + "\n", "utf8")


def set_cell(row: int, column: int, text: str) -> Callable[[list[str]], list[str]]:
    """Return a change of one cell; rows count from 1 as in the file, columns from 0."""

    def change(lines: list[str]) -> list[str]:
        cells = lines[row - 1].split(",")
        cells[column] = text
        return [*lines[: row - 1], ",".join(cells), *lines[row:]]

    return change


def test_import_partial_checkout_reports_missing(small_checkout, tmp_path):
    store = Store()
    vision = small_checkout / "src/data/fnorm-CLIP.csv"
    vision.write_text("model_type,layer,module\nvision,0,attn.out_proj\n", "utf8")
    (small_checkout / "data-vis/data/wdist/wdist-Llama-2-7b-hf.csv").unlink()
    edit_file(
        small_checkout,
        "src/data/fnorm-Llama-2-7b-hf.csv",
        lambda lines: [",".join(line.split(",")[:9]) for line in lines],
    )
    result = import_reference(small_checkout, store)
    missing = "\n".join(result["missing"])
    assert re.search(r"fnorm-CLIP\.csv .*vision", missing)
    assert re.search(rf"{FNORM} .*\b0 of 224 modules", missing)
    assert re.search("Meta-Llama-3-8B: .*matrices.* runs are left out", missing)
    assert re.search("shape of Meta-Llama-3-8B .*not known", missing)
    assert re.search(rf"{SEVEN} .*pileval .*hqq .*no kurtosis\.", missing)
    session = open_session(store, SEVEN)
    plan = session.plan(PlanRequest("sensiboost", base="3.13"), session.default_settings)
    assert plan.ranking_scores, "another file has the sensitivity"
    with pytest.raises(InputError, match=r"kurtosis.* KurtBoost .*sensiboost"):
        session.plan(PlanRequest("kurtboost", base="3.13"), session.default_settings)


def test_import_underivable_shape_keeps_parameter_count(small_checkout):
    """If q_proj is not square, only its parameter count is known: it gets 128 columns."""

    def widen(lines: list[str]) -> list[str]:
        cells = [line.split(",") for line in lines]
        for row in cells[1:]:
            row[8] = "33554432" if row[1] == "self_attn.q_proj" else row[8]
        return [",".join(row) for row in cells]

    edit_file(small_checkout, "src/data/fnorm-Llama-2-7b-hf.csv", widen)
    store = Store()
    import_reference(small_checkout, store)
    assert store.model(SEVEN).matrices[0] == Matrix(
        "model.layers.0.self_attn.q_proj", 0, "self_attn.q_proj", 262144, 128
    )


FNORM, SENSI = "src/data/fnorm-Llama-2-7b-hf.csv", "data-vis/data/llama-sensitivity.csv"
BAD_CSV_EDITS = {
    "a required column renamed": (FNORM, set_cell(1, 6, "norm"), "no column fnorm"),
    "a perplexity column renamed": (COMBINED, set_cell(1, 5, "ppl"), "no column ppl_wikitext"),
    "a plan's column renamed": (PLAN_FILE, set_cell(1, 6, "bits"), "no column b1"),
    "text for a number": (FNORM, set_cell(7, 6, "tiny"), "row 7: fnorm is 'tiny' instead of a "),
    "text for an optional number": (COMBINED, set_cell(9, 6, "?"), r"row 9: ppl_c4 is '\?'"),
    "a fraction for a layer": (
        SENSI,
        set_cell(12, 5, "0.5"),
        "row 12: layer is '0.5' instead of a ",
    ),
    "a negative number": (SENSI, set_cell(12, 6, "-1"), "row 12: sensitivity is '-1'"),
    "NaN": (SENSI, set_cell(30, 6, "NaN"), "row 30: sensitivity is empty or NaN"),
    "an empty cell": (PLAN_FILE, set_cell(5, 6, ""), "row 5: b1 is empty or NaN"),
    "an empty name": (COMBINED, set_cell(5, 1, ""), "row 5: algo is empty"),
    "infinity": (FNORM, set_cell(8, 6, "inf"), "row 8: fnorm is 'inf'"),
    "an unknown configuration": (
        FNORM,
        set_cell(4, 3, "48"),
        r"row 4: .* = 2, 48, 8, 128 is not a known",
    ),
    "an unknown part": (SENSI, set_cell(6, 1, "attn"), "row 6: 'attn' is not a part"),
    "a contradiction": (
        SENSI,
        lambda lines: [*lines, lines[9][: lines[9].rindex(",")] + ",7"],
        r"row 8066: the same quant_method, .* as row 10 but other values",
    ),
    "two kurtoses of a module": (
        FNORM,
        set_cell(9, 9, "3"),
        r"row 9: the same layer, module as row 2",
    ),
    "two perplexities of a run": (
        COMBINED,
        lambda lines: [*lines, lines[3].replace("6.3173", "6.5")],
        r"row 952: the same model, algo, config, bpp, attempt as row 4",
    ),
    "a file cut off": (FNORM, lambda lines: lines[:-3], "has 9 configurations where others have"),
    "a plan cut off": (
        PLAN_FILE,
        lambda lines: lines[:200],
        "does not name each of the model's 224",
    ),
    "no rows": (COMBINED, lambda lines: lines[:1], "has no rows"),
    "cells without a header": (
        FNORM,
        lambda lines: [lines[0], *(line + ",1" for line in lines[1:])],
        "rows with more cells than the header",
    ),
    "a torn row": (COMBINED, lambda lines: [*lines, "a,b" * 20], "Expected 11 fields in line 952"),
}


@pytest.mark.parametrize("case", BAD_CSV_EDITS)
def test_import_bad_csv_raises_and_imports_nothing(small_checkout, case):
    path, change, message = BAD_CSV_EDITS[case]
    edit_file(small_checkout, path, change)
    store = Store()
    with pytest.raises(InputError, match=message) as caught:
        import_reference(small_checkout, store)
    assert str(small_checkout / path) in str(caught.value)
    assert str(caught.value).count("\n") == 0
    assert set(rows_by_table(store).values()) == {0}


def test_import_duplicate_row_ignored(small_checkout):
    edit_file(small_checkout, SENSI, lambda lines: [*lines, "", lines[9]])
    store = Store()
    import_reference(small_checkout, store)
    again = len(store.query("SELECT 1 FROM scores"))
    edit_file(small_checkout, SENSI, lambda lines: lines[:-2])
    import_reference(small_checkout, store)
    assert len(store.query("SELECT 1 FROM scores")) == again


def test_import_failure_keeps_previous_import(small_checkout):
    store = Store()
    import_reference(small_checkout, store)
    before = rows_by_table(store)
    edit_file(small_checkout, COMBINED, set_cell(9, 5, "none of it"))
    with pytest.raises(InputError, match=r"row 9: ppl_wikitext .*'none of it'"):
        import_reference(small_checkout, store)
    assert rows_by_table(store) == before


def test_import_non_checkout_raises(small_checkout, tmp_path):
    with pytest.raises(InputError, match=r"not a checkout .*src/data"):
        import_reference(tmp_path, Store())
    with pytest.raises(InputError, match="not a checkout"):
        import_reference(tmp_path / "nothing", Store())
    (small_checkout / FNORM).unlink()
    with pytest.raises(InputError, match=r"no src/data/fnorm-\*\.csv"):
        import_reference(small_checkout, Store())
    (small_checkout / COMBINED).unlink()
    with pytest.raises(InputError, match=r"no data-vis/endeavors/boost/data/combined\.csv"):
        import_reference(small_checkout, Store())


def test_store_migration_adds_origin_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "MIGRATIONS", MIGRATIONS[:1])
    old = Store()
    with old.transaction() as connection:
        connection.execute("INSERT INTO models (fingerprint, source) VALUES ('f', 'mine')")
        connection.execute("INSERT INTO runs (id, fingerprint) VALUES ('r', 'f')")
        connection.execute("INSERT INTO evaluations (id, run, fingerprint) VALUES ('e', 'r', 'f')")
    monkeypatch.undo()
    now = Store(old.path)
    assert now.models()["source"].tolist() == ["mine"]
    assert now.results()["origin"].tolist() == ["measured"]
    assert now.results(origin="published").empty


# --- the command line ------------------------------------------------------------------------


@pytest.fixture
def run_cli(capsys):
    def call(*arguments: str) -> tuple[int, dict | str, str]:
        status = main(list(arguments))
        printed = capsys.readouterr()
        as_json = "--json" in arguments and status == 0
        return status, json.loads(printed.out) if as_json else printed.out, printed.err

    return call


def test_cli_import_reference(run_cli, small_checkout, tmp_path):
    database = str(tmp_path / "own.duckdb")
    status, result, log = run_cli(
        "import-reference", str(small_checkout), "--json", "--db", database
    )
    assert status == 0
    assert "import" in log
    assert result["counts"] == rows_by_table(Store(database))
    assert result["models"][0] == SEVEN
    assert len(result["files"][COMBINED]) == 64
    status, text, _ = run_cli("import-reference", str(small_checkout), "--db", database)
    assert status == 0
    assert "has no ppl_wikitext" in text
    status, _, log = run_cli("import-reference", str(tmp_path), "--json", "--db", database)
    assert status == 2
    assert "not a checkout" in log


def test_cli_plan_and_results_for_published_model(run_cli, store):
    database = ("--db", str(store.path))
    plan_command = ("plan", "--method", "sensiboost", "--base", "3.13", "--json", *database)
    plans = {}
    for model in ("Llama-2-7b-hf", SEVEN):
        status, plan, _ = run_cli(*plan_command, "--model", model)
        assert status == 0
        assert plan["fingerprint"] == SEVEN
        plans[model] = plan["modules"]
    published = _published_plan(store, SEVEN, "sensi-boost-2-0", "3.13")
    assert plans["Llama-2-7b-hf"] == plans[SEVEN] == published["modules"]
    status, result, _ = run_cli("results", "--json", *database)
    assert (status, result) == (0, {"results": []})
    results_options = ("--published", "--model", "Llama-2-7b-hf", *database)
    status, result, _ = run_cli("results", "--json", *results_options)
    assert {row["origin"] for row in result["results"]} == {"published"}
    assert {row["model"] for row in result["results"]} == {SEVEN}
    assert run_cli("results", *results_options)[0] == 0
    status, profile, _ = run_cli("profile", "--model", SEVEN, "--corpus", "c4", "--json", *database)
    assert profile["settings"]["axis"] == 0
    assert (
        "published, on c4" in run_cli("profile", "--model", SEVEN, "--corpus", "c4", *database)[1]
    )
    status, model, _ = run_cli("inspect", "--model", SEVEN, "--json", *database)
    assert model["layers"] == 32


def test_cli_run_published_model_exit_2(run_cli, store):
    status, _, log = run_cli(
        *("run", "--model", "Llama-2-7b-hf", "--method", "uniform", "--base", "3.13"),
        *("--json", "--db", str(store.path)),
    )
    assert status == 2
    assert "no weights" in log
