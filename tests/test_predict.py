"""Predicted perplexity: from published runs, from an exact law, and from too few runs."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from lsq_core.bits import DETECTION_CONFIG, LADDER
from lsq_core.cli.program import main
from lsq_core.errors import InputError
from lsq_core.evaluation.prediction import (
    MIN_PLANS,
    MeasuredPoints,
    TooFewRuns,
    feature_tables,
    features,
    fit,
    load_measured_points,
    parse_loss,
    smallest_budget_within,
)
from lsq_core.jsontext import json_text
from lsq_core.model.info import Matrix, ModelInfo
from lsq_core.model.source import ModelSource
from lsq_core.planning.make import make_frontier, make_plan
from lsq_core.planning.pins import apply_pins
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import PUBLISHED_SETTINGS
from lsq_core.provenance import now
from lsq_core.session import Session
from lsq_core.stages.plan import build_problem
from lsq_core.store.models import PUBLISHED
from lsq_core.store.store import Store

RUNS = {"quantizer": "hqq", "axis": 0, "metadata": "8bit"}
FULL = 6.0
STOPS = len(LADDER)


def select_points(points: MeasuredPoints, chosen: np.ndarray) -> MeasuredPoints:
    """Select points by index or mask."""
    names = ("features", "perplexity", "full_precision", "eight_bit")
    return replace(points, **{name: getattr(points, name)[chosen] for name in names})


# --- published runs ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["Llama-2-7b-hf", "Meta-Llama-3-8B"])
def test_predict_published_runs_from_30(published, model):
    """Medians over 20 draws of WikiText-2 runs at 3 bits or more that have a published plan."""
    published = Store(published)
    session = Session(ModelSource(model), published)
    problem = build_problem(session.info, session.profile(session.default_settings))
    points = load_measured_points(published, PUBLISHED + model, problem, **RUNS, corpus="wikitext2")
    rows = published.results(PUBLISHED + model, origin="published").set_index("run")
    rows = rows[(rows["corpus"] == "wikitext2") & rows["planned_bytes"].notna()]
    assert len(points.perplexity) == len(rows) >= 209
    coarse = select_points(points, rows["bits_per_param"].to_numpy() >= 3)
    assert len(coarse.perplexity) == 207

    figures = []
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(coarse.perplexity))
        predictor, rest = fit(select_points(coarse, order[:30])), select_points(coarse, order[30:])
        actual, truth = predictor.predict(rest.features), rest.perplexity
        error = np.abs(actual.perplexity / truth - 1)
        held = (actual.low <= truth) & (truth <= actual.high)
        figures.append([spearmanr(actual.perplexity, truth)[0], np.median(error), held.mean()])
    rank, error, held = np.median(figures, axis=0)
    print(
        f"{model}: Spearman {rank:.4f}, median error {100 * error:.3f} %, held {100 * held:.1f} %"
    )
    assert rank >= 0.985
    assert error <= 0.004
    assert 0.80 <= held <= 0.97


# --- a model following the law ----------------------------------------------------------------


def random_problem(layers: int = 4, seed: int = 0) -> Problem:
    """Matrices whose squared error falls about fourfold per bit, as with rounding."""
    random = np.random.default_rng(seed)
    types = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    matrices = tuple(
        Matrix(f"model.layers.{layer}.{kind}", layer, kind, 256, 128 * (1 + i))
        for layer in range(layers)
        for i, kind in enumerate(types)
    )
    bits = np.array([c.nominal_bits for c in LADDER])
    square = random.uniform(50, 500, (len(matrices), 1)) * 4.0**-bits
    square *= random.uniform(0.8, 1.25, square.shape)
    worth = random.uniform(0.1, 2, (len(matrices), 1))
    by_config = {"weight_error": np.sqrt(square), "sensitivity": square * worth}
    scores = {"sensitivity": by_config["sensitivity"][:, LADDER.index(DETECTION_CONFIG)]}
    return Problem(matrices, scores, by_config)


def law(x: np.ndarray) -> np.ndarray:
    """Perplexity by the linearity theorem: the cost is the geometric mean of the two sums."""
    return FULL * np.exp(0.01 * np.exp(x.mean(axis=1)))


def make_points(problem: Problem, choices: np.ndarray) -> MeasuredPoints:
    """Return the points these plans would have if their perplexity followed the law."""
    x = features(problem, choices)
    return MeasuredPoints(
        x, law(x), np.full(len(x), FULL), (choices >= 9).all(axis=1), "text", "blocks"
    )


def uniform(problem: Problem, *stops: int) -> np.ndarray:
    """Return the uniform plans of the given stops, (k, n)."""
    return np.repeat(np.array(stops)[:, None], len(problem.matrices), axis=1)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return random_problem()


def test_fit_recovers_law_from_four_runs(problem):
    predictor = fit(make_points(problem, uniform(problem, 0, 3, 5, 8)))
    x = features(problem, np.random.default_rng(1).integers(0, STOPS, (200, 12)))
    actual = predictor.predict(x)
    assert actual.perplexity == pytest.approx(law(x), rel=1e-4)
    assert (actual.low <= law(x)).all()
    assert (law(x) <= actual.high).all()
    assert (actual.high / actual.low < 1.01).all()


def test_fit_follows_runs_off_the_law(problem):
    """Between runs with half the expected slope, their own line is used, not the expected one."""
    random = np.random.default_rng(2)
    choices = uniform(problem, *range(9)) + random.integers(0, 2, (9, 12))
    x = features(problem, choices)
    own = FULL * np.exp(0.05 * np.exp(x.mean(axis=1) / 2))
    predictor = fit(replace(make_points(problem, choices), perplexity=own))
    between = features(problem, uniform(problem, 2, 4, 6))
    truth = FULL * np.exp(0.05 * np.exp(between.mean(axis=1) / 2))
    assert predictor.predict(between).perplexity == pytest.approx(truth, rel=0.005)
    assert predictor.predict(between).perplexity != pytest.approx(law(between), rel=0.02)


def test_fit_too_few_runs_raises(problem):
    points = make_points(problem, uniform(problem, 3, 4, 5, 9, 10, 11))
    with pytest.raises(TooFewRuns, match=f"text .*blocks .*{MIN_PLANS} .*3 so far"):
        fit(points)
    again = make_points(problem, uniform(problem, 3, 4, 5, 3, 4, 5, 3))
    with pytest.raises(TooFewRuns, match="3 so far"):
        fit(again)
    fit(make_points(problem, uniform(problem, 3, 4, 5, 6)))


def noisy(problem: Problem, spread: float, seed: int) -> MeasuredPoints:
    points = make_points(problem, uniform(problem, *range(9)))
    noise = np.random.default_rng(seed).normal(0, spread, 9)
    return replace(points, perplexity=FULL * np.exp(points.cost * np.exp(noise)))


def test_band_wider_when_extrapolating(problem):
    points = select_points(noisy(problem, 0.1, 3), np.array([3, 4, 5, 6, 7, 8]))
    actual = fit(points).predict(features(problem, uniform(problem, 0, 4, 5, 8)))
    assert actual.extrapolated.tolist() == [True, False, False, False]
    width = np.log(np.log(actual.high / FULL) / np.log(actual.low / FULL))
    assert width[0] > 1.5 * width[1:].max()


def test_band_wider_with_noise(problem):
    x = features(problem, uniform(problem, 4))
    calm, wild = (fit(noisy(problem, spread, 3)).predict(x) for spread in (0.02, 0.4))
    assert (wild.high - wild.low > 5 * (calm.high - calm.low)).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    costs=st.lists(st.floats(-0.5, 12), min_size=MIN_PLANS, max_size=12),
    query=st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=1, max_size=5),
    eight_bit=st.lists(st.floats(-0.1, 0.1), max_size=3),
    seed=st.integers(0, 99),
)
def test_prediction_at_least_full_precision_and_in_band(costs, query, eight_bit, seed):
    cost = np.array(costs + eight_bit)
    x = np.random.default_rng(seed).normal(0, 3, (len(cost), 2))
    marks = np.arange(len(cost)) >= len(costs)
    full = np.full(len(cost), FULL)
    actual = fit(MeasuredPoints(x, FULL * np.exp(cost), full, marks)).predict(np.array(query))
    assert np.isfinite(actual.high).all()
    assert (actual.low >= FULL).all()
    assert (actual.low <= actual.perplexity).all()
    assert (actual.perplexity <= actual.high).all()


def test_fit_8_bit_runs_set_floor_only(problem):
    plans = uniform(problem, 3, 4, 5, 6, 7, 8, 9, 10, 11)
    points = make_points(problem, plans)
    without = fit(select_points(points, ~points.eight_bit))
    assert without.floor == (0, 0, 0)
    measured = np.where(points.eight_bit, FULL * np.array([1] * 6 + [1.01, 1.02, 1.05]), 0)
    predictor = fit(replace(points, perplexity=np.maximum(points.perplexity, measured)))
    actual = predictor.predict(points.features)
    assert actual.perplexity[-3:] == pytest.approx([1.02 * FULL] * 3)
    assert (actual.low[-1], actual.high[-1]) == pytest.approx((1.01 * FULL, 1.05 * FULL))
    assert actual.perplexity[0] == pytest.approx(without.predict(points.features).perplexity[0])
    # Below full precision within evaluation noise: predicted as full precision, no better.
    below = replace(points, perplexity=np.where(points.eight_bit, 0.999 * FULL, points.perplexity))
    assert fit(below).predict(points.features[-1:]).perplexity[0] == pytest.approx(FULL, rel=1e-3)


# --- features ---------------------------------------------------------------------------------


def test_features_are_logs_of_sums(problem):
    choice = np.random.default_rng(0).integers(0, STOPS, 12)
    ((sensitivity, error),) = features(problem, choice[None])
    pairs = list(enumerate(choice))
    assert np.exp(sensitivity) == pytest.approx(
        sum(problem.by_config["sensitivity"][i, c] for i, c in pairs)
    )
    assert np.exp(error) == pytest.approx(
        sum(problem.by_config["weight_error"][i, c] ** 2 for i, c in pairs)
    )


def test_expected_kl_is_the_one_feature(problem):
    """Its sum is the cost, with slope one; NaN (an expert that no token reached) adds nothing."""
    kl = problem.by_config["weight_error"] ** 2 / 1000
    kl[3] = np.nan
    known = replace(problem, by_config=problem.by_config | {"expected_kl": kl})
    choice = np.random.default_rng(0).integers(0, STOPS, 12)
    assert np.exp(features(known, choice[None])) == pytest.approx(
        np.nansum(kl[np.arange(12), choice])[None, None]
    )
    choices = uniform(known, 0, 3, 5, 8)
    x = features(known, choices)
    cost = 1.1 * np.exp(x[:, 0])
    points = MeasuredPoints(x, FULL * np.exp(cost), np.full(4, FULL), np.zeros(4, bool))
    other = features(known, uniform(known, 1, 4, 7))
    found = fit(points).predict(other).perplexity
    assert found == pytest.approx(FULL * np.exp(1.1 * np.exp(other[:, 0])), rel=1e-4)


def test_feature_tables_fill_missing_sensitivity(problem):
    full_table = problem.by_config["sensitivity"]
    sparse = np.full_like(full_table, np.nan)
    reference = LADDER.index(DETECTION_CONFIG)
    sparse[1:, reference] = full_table[1:, reference]
    incomplete = replace(problem, by_config=problem.by_config | {"sensitivity": sparse})
    tables = feature_tables(incomplete)[..., 0]
    # Here sensitivity is a multiple of the squared error, so scaling is exact.
    assert tables[1:] == pytest.approx(full_table[1:])
    assert (tables[0] == 0).all()


def test_features_without_sensitivity_raises(problem):
    incomplete = replace(problem, by_config={"weight_error": problem.by_config["weight_error"]})
    with pytest.raises(InputError, match="no sensitivity"):
        features(incomplete, uniform(problem, 3))


# --- the smallest budget within a loss --------------------------------------------------------


@pytest.mark.parametrize("method", ["uniform", "sensiboost", "mxq"])
@pytest.mark.parametrize("loss", [0.5, 0.05, 0.012])
@pytest.mark.parametrize("pins", [(), ("*.layers.0.*=b4g64..b8g32",)])
def test_smallest_within_loss(method, loss, pins):
    problem = random_problem(layers=24)
    predictor = fit(noisy(problem, 0.1, 4))
    request = PlanRequest(method, pins=pins)
    pinned = apply_pins(problem, pins)
    frontier = make_frontier(pinned, request)
    budget = smallest_budget_within(frontier, predictor, pinned, loss)

    def predicted(limit: float) -> float:
        x = features(pinned, frontier.at(limit).choice[None])
        return predictor.predict(x).perplexity[0] / FULL - 1

    assert predicted(budget) <= loss
    smaller = [s.start_bytes for s in frontier.segments]
    smaller += [m.bytes_after for s in frontier.segments for m in s.moves]
    smaller = [b for b in smaller if b < budget]
    assert smaller, "the answer is not just the smallest plan there is"
    assert all(predicted(b) > loss for b in smaller)
    plan = make_plan(problem, replace(request, budget=f"{8 * budget / problem.total:.17f}bpp"))
    assert plan.nominal_bytes == budget, "a budget with nothing to spare"


def test_smallest_within_infeasible_loss_raises(problem):
    points = make_points(problem, uniform(problem, *range(12)))
    perplexity = np.where(points.eight_bit, 1.04 * FULL, points.perplexity)
    predictor = fit(replace(points, perplexity=perplexity))
    frontier = make_frontier(problem, PlanRequest("mxq"))
    with pytest.raises(InputError, match=r"within 1 % .* bpp .*4 %"):
        smallest_budget_within(frontier, predictor, problem, 0.01)


def test_parse_loss():
    assert parse_loss("1%") == 0.01
    assert parse_loss(" .5 % ") == 0.005
    for text in ("abc", "-1%", "0", "0%", "1", "%", "nan%"):
        with pytest.raises(InputError, match=f"'{text}'"):
            parse_loss(text)


# --- the store and the command line -----------------------------------------------------------


def make_model_info(problem: Problem, name: str) -> ModelInfo:
    linear = sum(m.numel for m in problem.matrices)
    return ModelInfo(
        source=PUBLISHED + name,
        revision=None,
        architecture="made up",
        layers=4,
        context=0,
        parameters=linear,
        file_bytes=2 * linear,
        matrices=problem.matrices,
        other_bytes=0,
        fingerprint=PUBLISHED + name,
    )


def make_scores(problem: Problem, profile: str) -> pd.DataFrame:
    return pd.DataFrame(
        {"profile": profile, "module": m.name, "layer": m.layer, "type": m.type}
        | {"metric": metric, "config": config.name, "part": "", "value": table[i, j]}
        for metric, table in problem.by_config.items()
        for i, m in enumerate(problem.matrices)
        for j, config in enumerate(LADDER)
    )


def evaluation_row(
    run: str | None, model: str, corpus: str, perplexity: float, text: str = ""
) -> dict:
    return {
        "id": f"{run}-{corpus}-{text}",
        "run": run,
        "fingerprint": model,
        "corpus": corpus,
        "corpus_sha256": corpus + text,
        "protocol": "strided-512/256",
        "tokens": 1000,
        "perplexity": perplexity,
        "provenance": json_text({"dtype": "float16"}),
        "full_precision": f"None-{corpus}-{text}" if run else None,
    }


@pytest.fixture
def law_store(problem: Problem, tmp_path) -> Store:
    """A made-up model following the law: nine uniform runs on ``text``, three also on ``other``."""
    store = Store(tmp_path / "law.duckdb")
    info = make_model_info(problem, "law")
    model, points = info.fingerprint, make_points(problem, uniform(problem, *range(9)))
    plans, runs = [], []
    evaluations = [evaluation_row(None, model, corpus, FULL) for corpus in ("text", "other")]
    for stop, perplexity in enumerate(points.perplexity):
        request = PlanRequest("uniform", base=LADDER[stop].name)
        content = make_plan(problem, request, axis=0).to_json()
        plans.append({"id": f"p{stop}", "fingerprint": model, "content": json_text(content)})
        runs.append({"id": f"r{stop}", "plan": f"p{stop}", "fingerprint": model} | QUANTIZED)
        evaluations.append(evaluation_row(f"r{stop}", model, "text", perplexity))
        if stop < 3:
            evaluations.append(evaluation_row(f"r{stop}", model, "other", 2 * perplexity))
    profile = PUBLISHED_SETTINGS.key(model, "made up")
    settings_json = json_text(asdict(PUBLISHED_SETTINGS))
    profiles = [
        {"id": profile, "fingerprint": model, "settings": settings_json, "provenance": "{}"}
    ]
    rows = {"profiles": profiles, "plans": plans, "runs": runs, "evaluations": evaluations}
    frames = {table: pd.DataFrame(row).assign(created=now()) for table, row in rows.items()}
    frames["profiles"]["origin"] = "published"
    store.replace_published([info], frames | {"scores": make_scores(problem, profile)})
    return store


QUANTIZED = {"quantizer": "hqq", "dtype": "float16", "origin": "published", "method": "uniform"}


def test_measured_points_filter_by_kind(law_store, problem):
    actual = load_measured_points(law_store, "published:law", problem, **RUNS)
    assert (actual.corpus, actual.protocol, actual.tokens) == ("text", "strided-512/256", 1000)
    order = np.argsort(-actual.perplexity)
    expected = make_points(problem, uniform(problem, *range(9)))
    assert actual.features[order] == pytest.approx(expected.features)
    assert actual.perplexity[order] == pytest.approx(expected.perplexity)
    other = load_measured_points(law_store, "published:law", problem, **RUNS, corpus="other")
    assert len(other.perplexity) == 3
    short = load_measured_points(law_store, "published:law", problem, **RUNS, protocol="strided")
    assert len(short.perplexity) == 9
    for changed in ({"axis": 1}, {"quantizer": "rtn"}, {"metadata": "fp16"}):
        with pytest.raises(TooFewRuns, match=r"\(0 so far"):
            load_measured_points(law_store, "published:law", problem, **(RUNS | changed))
    for wanted in ({"corpus": "c4"}, {"protocol": "blocks"}):
        with pytest.raises(TooFewRuns, match=r"\(0 so far"):
            load_measured_points(law_store, "published:law", problem, **RUNS, **wanted)
    with pytest.raises(TooFewRuns):
        load_measured_points(law_store, "published:stranger", problem, **RUNS)


def test_measured_points_separate_corpora_of_same_name(law_store, problem):
    """A second text is also named ``other`` and has one run more than the first."""
    model = "published:law"
    rows = [evaluation_row(None, model, "other", FULL, "b")]
    rows += [evaluation_row(f"r{stop}", model, "other", 50.0, "b") for stop in range(4)]
    frame = pd.DataFrame(rows).assign(created=now())
    with law_store.transaction() as connection:
        connection.register("frame", frame)
        connection.execute("INSERT INTO evaluations BY NAME SELECT * FROM frame")
    actual = load_measured_points(law_store, model, problem, **RUNS, corpus="other")
    assert actual.perplexity.tolist() == [50.0] * 4


@pytest.fixture
def run_cli(law_store, capsys):
    """Run a command on the made-up model and return (status, JSON or text, standard error)."""

    def call(verb: str, *arguments: str) -> tuple[int, dict | str, str]:
        status = main([verb, "--model", "law", "--db", str(law_store.path), *arguments])
        printed = capsys.readouterr()
        wants_json = "--json" in arguments and status == 0
        return status, json.loads(printed.out) if wants_json else printed.out, printed.err

    return call


def test_cli_plan_predicted_perplexity(run_cli):
    status, plan, _ = run_cli("plan", "--method", "uniform", "--base", "3.51", "--json")
    assert status == 0
    predicted = plan["predicted"]
    expected = law(features(random_problem(), uniform(random_problem(), 5)))[0]
    assert predicted["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert predicted["low"] <= expected <= predicted["high"]
    assert {k: predicted[k] for k in ("full_precision", "extrapolated", "runs", "tokens")} == {
        "full_precision": FULL,
        "extrapolated": False,
        "runs": 9,
        "tokens": 1000,
    }
    assert (predicted["corpus"], predicted["protocol"]) == ("text", "strided-512/256")
    status, text, _ = run_cli("plan", "--method", "uniform", "--base", "8.51")
    assert re.search(r"9 runs, extrapolated; .*6\.0000", text)


def test_cli_plan_prediction_unavailable_reason(run_cli):
    options = ("--method", "uniform", "--base", "3.51")
    _, plan, _ = run_cli("plan", *options, "--corpus", "other", "--json")
    assert list(plan["predicted"]) == ["reason"]
    assert "3 so far" in plan["predicted"]["reason"]
    _, plan, _ = run_cli("plan", *options, "--calibration", "c4", "--json")
    assert "no profile" in plan["predicted"]["reason"]
    _, text, _ = run_cli("plan", *options, "--protocol", "blocks")
    assert "0 so far" in text


@pytest.mark.parametrize("method", ["mxq", "uniform"])
def test_cli_max_loss_gives_smallest_plan(run_cli, method):
    status, plan, _ = run_cli("plan", "--method", method, "--max-loss", "3%", "--json")
    assert status == 0
    assert plan["predicted"]["perplexity"] <= 1.03 * FULL
    bits = float(plan["request"]["budget"].removesuffix("bpp"))
    assert plan["bits_per_param"] == pytest.approx(bits, rel=1e-12)
    again = ["--budget", plan["request"]["budget"], "--json"]
    assert run_cli("plan", "--method", method, *again)[1]["modules"] == plan["modules"]
    _, smaller, _ = run_cli(
        "plan", "--method", method, "--budget", f"{0.9 * bits:.6f}bpp", "--json"
    )
    assert smaller["predicted"]["perplexity"] > 1.03 * FULL


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-loss", "abc"], "'abc'"),
        (["--max-loss=-1%"], "'-1%'"),
        (["--max-loss", "0"], "'0'"),
        (["--max-loss", "1%", "--budget", "3bpp"], "either --max-loss or"),
        (["--max-loss", "1%", "--base", "3.13"], "either --max-loss or"),
        (["--max-loss", "1%", "--corpus", "other"], "3 so far"),
        (["--max-loss", "1%", "--pin", "*=b2g128"], "allow a larger loss"),
    ],
)
def test_cli_invalid_max_loss_exit_2(run_cli, options, message):
    status, out, err = run_cli("plan", "--method", "mxq", *options, "--json")
    assert (status, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("lsq: ")]
    assert message in line


def test_cli_run_prediction_from_earlier_runs(random_model, small_text, capsys):
    """Quantization barely changes a random model: predictions stay close to full precision."""
    run = ["run", "--model", str(random_model("llama-gqa")), "--json", "--samples", "8"]
    run += ["--block-tokens", "64", "--calibration", str(small_text)]
    run += ["--corpus", str(small_text), "--max-tokens", "300"]

    def call(*options: str) -> tuple[int, str, str]:
        status = main([*run, *options])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    status, _, err = call("--method", "mxq", "--max-loss", "50%")
    assert status == 2
    assert "0 so far" in err
    for base in ("2.13", "2.51", "3.25", "4.25"):
        _, out, _ = call("--method", "uniform", "--base", base)
        assert "different plans" in json.loads(out)["predicted"]["reason"]
    status, out, err = call("--method", "mxq", "--max-loss", "50%")
    assert status == 0, err
    outcome = json.loads(out)
    predicted = outcome["predicted"]
    assert predicted["runs"] == 4
    assert predicted["full_precision"] == outcome["perplexity_full"]
    assert predicted["corpus"] == outcome["corpus"]
    assert predicted["perplexity"] <= 1.5 * outcome["perplexity_full"]
    refused = ("--method", "mxq", "--max-loss", "50%", "--quantizer", "rtn")
    assert "--profile-quantizer rtn" in call(*refused)[2]
    assert "Give either" in call("--plan", "x.json", "--max-loss", "1%")[2]
