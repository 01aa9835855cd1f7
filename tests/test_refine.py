"""Refinement: the expansion against a plain loop, the search on a known cost, and the stage."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from lsq_core.bits import LADDER, Budget, QuantConfig
from lsq_core.cli.program import main
from lsq_core.errors import InputError, LsqError
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.jobs import arguments
from lsq_core.model.architecture import get_weight, locate_parameter, matrix_view, parameter_name
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from lsq_core.planning.methods import PLANNERS
from lsq_core.planning.methods.refined import is_refinable
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.backward import MAX_SEQUENCES, SampledLabels, cut_sequences
from lsq_core.profiling.calibration import load_calibration
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.quantization.cache import PackedMatrixCache
from lsq_core.quantization.registry import get_quantizer
from lsq_core.refinement import expansion, search
from lsq_core.refinement.expansion import Expander, Expansion
from lsq_core.refinement.step import RefinementStep
from lsq_core.session import Session
from lsq_core.settings import GridSettings
from lsq_core.stages import refine
from lsq_core.stages.plan import plan_identity
from lsq_core.store.refinements import RefinementKey
from lsq_core.store.store import Store
from tests.conftest import ARCHITECTURES

GRID = GridSettings(1, "fp16")
#: Three configurations of the ladder that every matrix of the random models can have.
OPTIONS = (QuantConfig(2, 32), QuantConfig(3, 32), QuantConfig(4, 32))


@pytest.fixture
def profile_settings(small_text):
    return ProfileSettings(
        calibration=str(small_text), samples=24, block_tokens=48, quantizer="rtn", metadata="fp16"
    )


# --- the expansion --------------------------------------------------------------------------


def mixed_choice(matrices):
    return {m: OPTIONS[i % len(OPTIONS)] for i, m in enumerate(matrices)}


def plain_expansion(folder, sequences, choice):
    """Expand using the full model's gradients per sequence; float64 sums by matrix and option."""
    loaded, full = (load_model(ModelSource(str(folder)), "cpu") for _ in range(2))
    rtn, changes = get_quantizer("rtn"), {}
    for matrix, config in choice.items():
        weight = get_weight(full.model, matrix).float()
        present = rtn.round_trip(weight, config, 1, "fp16")
        with torch.no_grad():
            get_weight(loaded.model, matrix).copy_(present)
        for option in OPTIONS:
            changed = rtn.round_trip(weight, option, 1, "fp16") - present
            changes[matrix.name, option] = changed.double()
    labels, found, divergence = SampledLabels(expansion.DRAWS), {key: [] for key in changes}, 0.0
    for number, sequence in enumerate(sequences):
        with torch.no_grad():
            target = full.model(sequence[None], use_cache=False).logits[0].float().log_softmax(-1)
        for parameter in loaded.model.parameters():
            parameter.requires_grad_(True)
        log_probs = loaded.model(sequence[None], use_cache=False).logits[0].float().log_softmax(-1)
        losses = [(target.exp() * (target - log_probs)).sum(), *labels(number, log_probs)]
        divergence += float(losses[0].detach())
        products = {key: [] for key in changes}
        for loss in losses:
            loaded.model.zero_grad()
            loss.backward(retain_graph=True)
            for matrix in choice:
                holder, _ = locate_parameter(loaded.model, matrix)
                gradient = loaded.model.get_parameter(parameter_name(matrix)).grad
                for option in OPTIONS:
                    own = 0.0
                    if gradient is not None:
                        view = matrix_view(gradient, holder, matrix).double()
                        own = float((view * changes[matrix.name, option]).sum())
                    products[matrix.name, option].append(own)
        for key, (first, *rest) in products.items():
            found[key].append(first + 0.5 * np.square(rest).mean())
    return found, divergence


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_expansion_matches_plain_loop(architecture, random_model, profile_settings):
    folder = random_model(architecture)
    loaded = load_model(ModelSource(str(folder)), "cpu")
    ids = torch.from_numpy(load_calibration(loaded, profile_settings.text).ids)
    sequences, matrices = cut_sequences(ids), loaded.info.matrices
    before = {n: t.clone() for n, t in loaded.model.state_dict().items()}
    choice = mixed_choice(matrices)
    allowed = np.ones((len(matrices), len(OPTIONS)), bool)
    allowed[-1] = [option == choice[matrices[-1]] for option in OPTIONS]
    expander = Expander.of(
        loaded, sequences, OPTIONS, allowed, get_quantizer("rtn"), GRID, PackedMatrixCache(2**30)
    )
    found = expander.expand(choice)
    assert all(torch.equal(before[n], t) for n, t in loaded.model.state_dict().items())
    wanted, divergence = plain_expansion(folder, sequences, choice)
    tokens = sequences.numel()
    assert found.kl == pytest.approx(divergence / tokens, rel=1e-4)
    largest = max(abs(sum(values)) for values in wanted.values()) / tokens
    for i, matrix in enumerate(matrices):
        for k, option in enumerate(OPTIONS):
            values = np.array(wanted[matrix.name, option]) / tokens
            if not allowed[i, k]:
                assert np.isnan(found.change[i, k])
            elif option == choice[matrix]:
                assert found.change[i, k] == found.error[i, k] == 0
            elif np.isnan(found.change[i, k]):
                assert matrix.expert is not None
                assert not values.any()
            else:
                close = {"rel": 2e-3, "abs": 2e-4 * largest}
                assert found.change[i, k] == pytest.approx(values.sum(), **close), matrix.name
                spread = values.std(ddof=1) * np.sqrt(len(values))
                assert found.error[i, k] == pytest.approx(spread, **close), matrix.name


def test_parts_of_the_text_take_turns():
    ids = torch.arange(3 * MAX_SEQUENCES * 4).reshape(-1, 4)
    parts = [cut_sequences(ids, part) for part in range(4)]
    assert torch.equal(torch.cat(parts[:3]), ids)
    assert torch.equal(parts[3], parts[0])


# --- the search -----------------------------------------------------------------------------


def quadratic(seed, matrices, options):
    """Return functions for a divergence ½·δᵀMδ of one-hot choices and its exact expansion."""
    random = np.random.default_rng(seed)
    root = random.normal(size=(matrices * options, matrices * options))
    table = root @ root.T / len(root)

    def one_hot(choice):
        chosen = np.zeros((matrices, options))
        chosen[np.arange(matrices), choice] = 1
        return chosen.ravel()

    def measure(choices):
        return [0.5 * one_hot(c) @ table @ one_hot(c) for c in choices]

    def expand(step):
        choice = step.choice
        alone = np.zeros((matrices, options))
        for i, k in itertools.product(range(matrices), range(options)):
            other = np.array(choice)
            other[i] = k
            alone[i, k] = measure([other])[0] - measure([choice])[0]
        return Expansion(alone, np.zeros_like(alone), measure([choice])[0])

    return measure, expand


@settings(deadline=None, max_examples=40)
@given(some.integers(0, 10**6), some.integers(2, 5), some.integers(2, 3))
def test_search_never_gets_worse_and_keeps_the_budget(seed, matrices, options):
    measure, expand = quadratic(seed, matrices, options)
    size, budget = np.arange(options), matrices * (options - 1) // 2
    allowed = [
        np.array(c)
        for c in itertools.product(range(options), repeat=matrices)
        if size[list(c)].sum() <= budget
    ]

    def solve(cost):
        rows = np.arange(matrices)
        return min(allowed, key=lambda choice: cost[rows, choice].sum())

    start = RefinementStep(0, allowed[seed % len(allowed)], np.nan, np.zeros((matrices, options)))
    start = RefinementStep(0, start.choice, measure([start.choice])[0], start.cost)
    steps = [start, *search.refine(start, expand, solve, measure)]
    assert all(a.kl >= b.kl for a, b in itertools.pairwise(steps))
    assert [step.rounds for step in steps] == list(range(len(steps))), "each reads another part"
    numbers = [step.number for step in steps]
    assert numbers == sorted(numbers)
    assert numbers[-1 - search.PATIENCE] == numbers[-1]
    for step in steps:
        assert size[step.choice].sum() <= budget
        assert measure([step.choice])[0] == pytest.approx(step.kl)
    best = min(measure(allowed))
    assert steps[-1].kl >= best - 1e-12


def test_margin_leaves_exchanges_that_chance_made():
    """Of two similar gains, only the certain one is chosen with a margin."""
    change = np.array([[0.0, -1.0], [0.0, -1.1], [0.0, 3.0]])
    error = np.array([[0.0, 0.1], [0.0, 2.0], [0.0, 0.1]])
    present = RefinementStep(0, np.array([0, 0, 0]), 5.0, change)

    def solve(cost):
        return cost.argmin(axis=1)

    proposals = search._propose(present, Expansion(change, error, 5.0), solve)
    assert [p.choice.tolist() for p in proposals] == [[1, 1, 0], [1, 0, 0]]
    assert [p.expected for p in proposals] == pytest.approx([2.9, 4.0])
    assert [p.margin for p in proposals] == [0.0, 1.0]


# --- the stage ------------------------------------------------------------------------------


@pytest.fixture
def session(random_model, tmp_path, small_text):
    folder = random_model("llama-gqa")
    return Session(ModelSource(str(folder)), Store(tmp_path / "lsq.duckdb"), "cpu")


def stored_provenance(store):
    rows = store.query("SELECT CAST(provenance AS VARCHAR) AS text FROM refinements")
    return [json.loads(text) for text in rows["text"]]


def test_refined_plan_is_a_plan_like_others(session, profile_settings):
    budget = "3.2bpp"
    made = session.refine(budget, profile_settings, minutes=0.01)
    assert made.method == "refined"
    start = session.plan("kl-aware", profile_settings, budget=budget)
    assert made.bits_per_param <= 3.2
    key = RefinementKey.of(made.profile, made.request)
    [bytes_] = session.store.refinement_budgets(key)
    options = [config.name for config in LADDER]
    steps = session.store.refinement_steps(key, bytes_, options)
    assert [step.number for step in steps] == list(range(len(steps)))
    configs = [tuple(LADDER[k] for k in step.choice) for step in steps]
    assert configs[0] == start.configs
    assert configs[-1] == made.configs
    assert all(a.kl > b.kl for a, b in itertools.pairwise(steps))
    about = stored_provenance(session.store)
    assert {own["max_tokens"] for own in about} == {refine.MEASURED_TOKENS}
    assert {own["dtype"] for own in about} == {"float32"}
    again = session.plan("refined", profile_settings, budget=budget)
    assert plan_identity(again) == plan_identity(made)
    assert PlanRequest.from_json(json.loads(json.dumps(made.to_json()))["request"]) == made.request


def test_search_goes_on_from_its_last_step(session, profile_settings):
    session.refine("3.2bpp", profile_settings, minutes=0.001)
    key = RefinementKey.of(
        session.profile_key(profile_settings), PlanRequest("refined", budget="3.2bpp")
    )
    [bytes_] = session.store.refinement_budgets(key)
    options = [config.name for config in LADDER]
    before = session.store.refinement_steps(key, bytes_, options)
    session.refine("3.2bpp", profile_settings, minutes=0.001)
    after = session.store.refinement_steps(key, bytes_, options)
    assert len(after) >= len(before)
    for a, b in zip(before, after, strict=False):
        assert (a.kl, a.number, a.choice.tolist()) == (b.kl, b.number, b.choice.tolist())


def test_search_that_has_ended_measures_nothing_more(session, profile_settings):
    session.refine("3.2bpp", profile_settings, minutes=2)
    query = "SELECT step, rounds, failed, created FROM refinements ORDER BY step"
    before = session.store.query(query)
    assert before["failed"].iloc[-1] == search.PATIENCE
    said = []
    session.report = lambda stage, done, total, message: said.append(message)
    session.refine("3.2bpp", profile_settings, minutes=2)
    assert session.store.query(query).equals(before)
    assert "expanded" not in said


def test_proposals_are_measured_on_the_calibration_part_of_a_corpus(session, profile_settings):
    settings = replace(profile_settings, calibration="stdlib")
    session.refine("3.2bpp", settings, minutes=0.001)
    conditions = session.store.query("SELECT conditions FROM refinements")["conditions"]
    [measured_on] = {json.loads(text)["corpus_sha256"] for text in conditions}
    text = EvaluationRequest("stdlib", refine.PROTOCOL, refine.MEASURED_TOKENS)
    assert measured_on == session.stream(replace(text, split="calibration")).sha256
    assert measured_on != session.stream(text).sha256


def test_search_is_among_the_papers_options_also_from_an_extended_profile(
    session, profile_settings
):
    extended = replace(profile_settings, ladder="extended")
    with pytest.raises(InputError):
        session.refine("3.2bpp", profile_settings, ladder="extended")
    assert session.store.profiles(session.info.fingerprint).empty, "it is said before any work"
    session.profile(extended, ["expected_kl"])
    made = session.refine("3.2bpp", profile_settings, minutes=0.01)
    assert set(made.configs) <= set(LADDER)
    [names] = session.store.query("SELECT DISTINCT options FROM refinements")["options"]
    assert list(names) == [config.name for config in LADDER]


def test_exact_is_not_of_a_search(session, profile_settings):
    made = session.refine("3.2bpp", profile_settings, minutes=2)
    exact = session.refine("3.2bpp", profile_settings, minutes=2, exact=True)
    assert plan_identity(exact) == plan_identity(made)


def test_step_of_a_search_beside_this_one_is_kept(tmp_path):
    store, budget = Store(tmp_path / "lsq.duckdb"), Budget("3bpp", 100.0)
    key, names = RefinementKey("profile", "{}"), ["a", "b"]

    def save(number, kl):
        step = RefinementStep(number, np.array([0, 1]), kl, np.zeros((2, 2)))
        store.save_refinement_step(key, {}, budget, step, names, {})

    save(0, 1.0)
    save(1, 0.5)
    for number, kl in ((0, 1.0), (1, 0.6)):
        with pytest.raises(LsqError):
            save(number, kl)
    save(1, 0.4)
    with pytest.raises(LsqError):
        save(2, 0.45)  # it followed the step that was replaced
    assert [step.kl for step in store.refinement_steps(key, budget, names)] == [1.0, 0.4]


def test_search_that_found_nothing_hides_no_better_plan(session, profile_settings):
    """A newer search with only its first step is ignored; a search resumes from its own steps."""
    made = session.refine("3.2bpp", profile_settings, minutes=2)
    with session.store.transaction() as connection:
        connection.execute(
            "INSERT INTO refinements BY NAME SELECT * REPLACE (json_merge_patch(conditions, "
            """'{"corpus_sha256": "other"}') AS conditions, created + INTERVAL 1 HOUR AS created)"""
            " FROM refinements WHERE step = 0"
        )
        connection.execute(
            "INSERT INTO refinements BY NAME "
            "SELECT * REPLACE (nominal_bytes * 1.1 AS nominal_bytes) FROM refinements "
            "WHERE step = 0"
        )
    for budget in ("3.2bpp", "3.5bpp"):
        assert session.plan("refined", profile_settings, budget=budget).method == "refined"
    planned = session.plan("refined", profile_settings, budget="3.2bpp")
    assert plan_identity(planned) == plan_identity(made)
    again = session.refine("3.2bpp", profile_settings, minutes=2)
    assert plan_identity(again) == plan_identity(made)


def test_costs_about_a_restricted_plan_say_nothing_of_a_free_one(session, profile_settings):
    made = session.refine("3.2bpp", profile_settings, minutes=2, pins=("*.layers.0.*q_proj=b4g64",))
    assert made.method == "refined"
    start = session.plan("kl-aware", profile_settings, budget="3.2bpp", pins=made.request.pins)
    assert sum("pins" in note for note in start.notes) == 1
    assert not any("pins" in note for note in made.notes)


def test_nf4_search_expands_four_bits_alone(session, profile_settings):
    settings = replace(profile_settings, quantizer="nf4", metadata="8bit")
    session.refine("4.6bpp", settings, minutes=0.001, start="mxq")
    options = session.store.query("SELECT choice, options FROM refinements").iloc[0]
    chosen = {options["options"][k] for k in options["choice"]}
    assert all(name.startswith("b4") for name in chosen)


def test_killed_search_takes_the_same_steps(random_model, tmp_path, profile_settings):
    """The search is killed during an expansion about a stored step, then restarted."""
    folder = random_model("llama-gqa")
    request = PlanRequest("refined", budget="3.2bpp")
    command = [sys.executable, "-m", "lsq_core", "refine", "--model", str(folder)]
    command += ["--device", "cpu", *arguments.refine_arguments(request, profile_settings, 1)]

    def steps(path):
        session = Session(ModelSource(str(folder)), Store(path), "cpu")
        key = RefinementKey.of(session.profile_key(profile_settings), request)
        names = [config.name for config in LADDER]
        return [
            (step.number, step.choice.tolist(), step.kl)
            for budget in session.store.refinement_budgets(key)
            for step in session.store.refinement_steps(key, budget, names)
        ]

    whole, cut = tmp_path / "whole.duckdb", tmp_path / "cut.duckdb"
    subprocess.run([*command, "--db", str(whole)], check=True, capture_output=True)
    with subprocess.Popen([*command, "--db", str(cut)], stderr=subprocess.PIPE, text=True) as job:
        for line in job.stderr:
            if "gradients of layer" in line:
                job.kill()
                break
    assert job.wait() == -signal.SIGKILL
    assert steps(cut) == steps(whole)[: len(steps(cut))]
    subprocess.run([*command, "--db", str(cut)], check=True, capture_output=True)
    assert steps(cut) == steps(whole)


def test_steps_of_another_dtype_are_another_search(random_model, tmp_path, profile_settings):
    folder, path = random_model("llama-gqa"), tmp_path / "lsq.duckdb"
    for dtype in ("float32", "bfloat16"):
        session = Session(ModelSource(str(folder)), Store(path), "cpu", dtype=dtype)
        session.refine("3.2bpp", profile_settings, minutes=0.001)
    with session.store.connect() as connection:
        found = connection.execute(
            "SELECT conditions ->> '$.dtype', min(step), count(DISTINCT profile) "
            "FROM refinements GROUP BY 1 ORDER BY 1"
        ).fetchall()
    assert found == [("bfloat16", 0, 1), ("float32", 0, 1)]


def test_other_starts_and_restrictions_are_other_searches(session, profile_settings):
    profile = session.profile_key(profile_settings)
    requests = [
        PlanRequest("refined", budget="3.2bpp"),
        PlanRequest("refined", budget="3.2bpp", start="mxq"),
        PlanRequest("refined", budget="3.2bpp", pins=("*=b4g64",)),
    ]
    keys = {RefinementKey.of(profile, request) for request in requests}
    assert len(keys) == 3
    assert RefinementKey.of(profile, requests[0]) == RefinementKey.of(
        profile, PlanRequest("refined", budget="4bpp", start="kl-aware")
    )


def test_what_cannot_be_refined(session, profile_settings, capsys):
    with pytest.raises(InputError, match="lsq refine"):
        session.plan("refined", profile_settings, budget="3.2bpp")
    for start in ("uniform", "sensiboost", "refined"):
        with pytest.raises(InputError):
            session.refine("3.2bpp", profile_settings, start=start)
        with pytest.raises(InputError):
            session.plan("refined", profile_settings, budget="3.2bpp", start=start)
    for minutes in (0, -1, float("nan")):
        with pytest.raises(InputError):
            session.refine("3.2bpp", profile_settings, minutes=minutes)
    assert main(["refine", "--model", "demo", "--budget", "99bpp"]) == 2
    assert "99bpp" in capsys.readouterr().err
    budget = ["--model", "demo", "--budget", "3.2bpp"]
    assert main(["plan", *budget, "--method", "mxq", "--start", "kl-aware"]) == 2
    assert "--start" in capsys.readouterr().err
    assert main(["plan", *budget, "--rank", "--exact"]) == 2
    assert "--exact" in capsys.readouterr().err


def test_which_methods_can_be_refined():
    refinable = {name for name, planner in PLANNERS.items() if is_refinable(planner)}
    assert {"kl-aware", "loss-aware", "mxq", "sensi-knapsack"} <= refinable
    assert not refinable & {"uniform", "sensiboost", "kurtboost", "high-impact", "refined"}
