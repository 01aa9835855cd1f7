"""The command line as users and scripts see it: exit status, JSON output, error messages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from lsq_core.cli.program import main
from lsq_core.evaluation.bootstrap import bootstrap_difference
from lsq_core.store.store import Store
from tests.conftest import ROOT

PROFILE = ["--samples", "8", "--block-tokens", "64"]
UNIFORM = ["plan", "--model", "M", "--method", "uniform", "--base", "3.13"]
RTN = ["--profile-quantizer", "rtn"]


@pytest.fixture
def run_cli(capsys):
    """A function that runs a command in this process: (status, JSON or text, standard error)."""

    def call(*arguments: str) -> tuple[int, dict | str, str]:
        status = main(list(arguments))
        printed = capsys.readouterr()
        wants_json = "--json" in arguments and status == 0
        return status, json.loads(printed.out) if wants_json else printed.out, printed.err

    return call


@pytest.fixture
def model(random_model) -> str:
    return str(random_model("llama-gqa"))


STARTUP_SCRIPT = """
import os, runpy, sys
sys.argv = ["lsq_core", "--help"]
try:
    runpy.run_module("lsq_core", run_name="__main__")
except SystemExit:
    print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("variables", "spincount"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_startup_sets_gomp_spincount_unless_configured(variables, spincount):
    free = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", STARTUP_SCRIPT]
    completed = subprocess.run(
        command, env=free | variables, capture_output=True, text=True, cwd=ROOT
    )
    assert completed.stderr.split() == [spincount, "False"]


def test_cli_json_is_only_stdout(model, small_text, tmp_path):
    """Runs in a process of its own, from the repository root, as in the README."""
    command = [sys.executable, "-m", "lsq_core", "run", "--model", model, "--method", "sensiboost"]
    command += ["--base", "3.51", "--calibration", str(small_text), "--corpus", str(small_text)]
    command += ["--max-tokens", "500", "--json", "--db", str(tmp_path / "own.duckdb"), *PROFILE]
    command += [*RTN, "--quantizer", "rtn"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["method"] == "sensiboost"
    assert "evaluate" in done.stderr
    assert "quantize" in done.stderr
    for key in (
        "bits_per_param",
        "nominal_bytes",
        "planned_bytes",
        "model_bytes",
        "perplexity",
        "perplexity_full",
        "measured_bytes",
        "kl",
        "quantize_seconds",
    ):
        assert result[key] > 0, key
    assert result["measured_bytes"] == result["planned_bytes"]
    assert result["modules"]["model.layers.0.self_attn.q_proj"]["bits"] == 3
    assert any("no z-score" in note for note in result["notes"]), "two layers are shallow"
    assert Store(tmp_path / "own.duckdb").results()["run"].tolist() == [result["run"]]


def test_cli_profile_plan_run_eval_workflow(run_cli, model, small_text, tmp_path):
    status, profile, _ = run_cli(
        "profile", "--model", model, "--corpus", str(small_text), "--json", *PROFILE
    )
    assert status == 0
    assert {s["metric"] for s in profile["scores"]} == {
        "kurtosis",
        "weight_error",
        "sensitivity",
        "sensitivity_module",
    }

    shared = ["--model", model, "--calibration", str(small_text), *PROFILE]
    plan_file = tmp_path / "plan.json"
    status, plan, _ = run_cli(
        "plan", *shared, "--method", "mxq", "--budget", "3.4bpp", "--out", str(plan_file), "--json"
    )
    assert status == 0
    assert plan["profile"] == profile["profile"], "found again, not measured again"
    assert plan["bits_per_param"] <= 3.4

    saved = tmp_path / "saved"
    run = ["run", *shared, "--plan", str(plan_file), "--corpus", str(small_text)]
    status, outcome, _ = run_cli(*run, "--max-tokens", "400", "--save", str(saved), "--json")
    assert status == 0
    assert outcome["modules"] == plan["modules"]
    assert outcome["truncated"]

    evaluate = ["eval", "--corpus", str(small_text), "--max-tokens", "400", "--json"]
    status, again, _ = run_cli(*evaluate, "--model", str(saved))
    assert status == 0
    assert again["perplexity"] == pytest.approx(outcome["perplexity"], rel=1e-6)
    assert again["run"] == outcome["run"]
    status, full, _ = run_cli(*evaluate, "--model", model)
    assert full["perplexity"] == pytest.approx(outcome["perplexity_full"], rel=1e-6)

    status, results, _ = run_cli("results", "--json")
    assert [r["run"] for r in results["results"]] == [outcome["run"]] * 2
    assert results["results"][0]["perplexity_full"] == pytest.approx(full["perplexity"])

    status, kept, _ = run_cli("disk", "--json")
    entry = next(item for item in kept["kept"] if item["name"] == str(saved))
    assert entry["bytes"] == sum(p.stat().st_size for p in saved.rglob("*"))
    status, kept, _ = run_cli("disk", "--prune", str(saved), "--json")
    assert kept["pruned"]["bytes"] == entry["bytes"]
    assert not saved.exists()
    assert len(run_cli("results", "--json")[1]["results"]) == 2, "what was measured stays"


def test_cli_eval_saved_model_adds_result_to_other_database(run_cli, model, small_text, tmp_path):
    saved = tmp_path / "saved"
    run = ["run", "--model", model, "--method", "uniform", "--base", "4.25", "--save", str(saved)]
    text = ["--corpus", str(small_text), "--max-tokens", "300", "--json"]
    _, outcome, _ = run_cli(*run, *text)
    other = str(tmp_path / "other.duckdb")
    for _ in range(2):
        status, again, _ = run_cli("eval", "--model", str(saved), *text, "--db", other)
        assert status == 0
    rows = Store(other).results()
    assert rows["run"].tolist() == [outcome["run"]], "evaluated twice, it is one line"
    assert rows["method"].tolist() == ["uniform"]
    assert rows["perplexity"].tolist() == [again["perplexity"]]


def test_cli_text_output(run_cli, model, small_text):
    status, text, _ = run_cli("plan", "--model", model, "--method", "uniform", "--base", "b4g64")
    assert status == 0
    assert "4.2539" in text
    assert "14 × b4g64" in text
    status, text, _ = run_cli("inspect", "--model", model)
    assert "2 layers" in text
    status, text, _ = run_cli(
        *["run", "--model", model, "--method", "uniform", "--budget", "128KiB"],
        *["--corpus", str(small_text), "--max-tokens", "300"],
    )
    assert "perplexity" in text
    assert "too few windows" in text
    assert run_cli("results")[1].count("uniform") == 1


def test_cli_run_interval_matches_stored_windows(run_cli, model, small_text):
    _, outcome, _ = run_cli(
        *["run", "--model", model, "--method", "uniform", "--base", "2.13", "--json"],
        *["--corpus", str(small_text), "--max-tokens", "2000"],
    )
    store = Store()
    row = store.results().iloc[0]
    nll, counts = store.windows(row["evaluation"])
    full = store.query("SELECT nll FROM evaluations WHERE run IS NULL")["nll"][0]
    difference = bootstrap_difference(nll, full, counts)
    assert outcome["increase"]["relative"] == pytest.approx(difference.relative)
    assert outcome["increase"]["low"] == pytest.approx(difference.low)
    assert row["increase"] == pytest.approx(difference.relative)


def test_cli_served_plan_records_constraint_and_free_plan(run_cli, model):
    arguments = ["plan", "--model", model, "--method", "mxq", "--budget", "5bpp", *RTN, *PROFILE]
    tie = ["--tie", "o_proj,q_proj"]
    _, free, _ = run_cli(*arguments, "--json")
    status, served, _ = run_cli(*arguments, "--serve", "vllm", *tie, "--json")
    assert status == 0
    assert not {"ties", "serve"} & set(free["request"])
    assert (served["request"]["serve"], served["request"]["ties"]) == ("vllm", ["o_proj,q_proj"])
    assert served["free"]["bits_per_param"] == free["bits_per_param"]
    assert served["free"]["objective"] == free["objective"] < served["objective"]
    configs = {name: entry["config"] for name, entry in served["modules"].items()}
    for layer in range(2):
        attention = {config for name, config in configs.items() if f"{layer}.self_attn" in name}
        assert len(attention) == 1
    assert "constraints of vLLM" in run_cli(*arguments, "--serve", "vllm")[1]


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--model", "M", "--method", "magic", "--base", "3.13"], "magic"),
        (["plan", "--model", "M"], "--method"),
        (["plan", "--model", "M", "--method", "uniform"], "base configuration"),
        (["plan", "--model", "M", "--method", "uniform", "--base", "3.14"], "3.14"),
        (["plan", "--model", "M", "--method", "uniform", "--budget", "1bpp"], "out of reach"),
        (["plan", "--model", "M", "--method", "uniform", "--budget", "9MB"], "not a budget"),
        (
            ["plan", "--model", "M", "--method", "mxq", "--base", "3.13", *RTN, *PROFILE],
            "takes a budget",
        ),
        (
            ["plan", "--model", "M", "--method", "sensiboost", "--base", "3.13", "--metric", "x"],
            "'x'",
        ),
        ([*UNIFORM, "--tie", "q_proj"], "not a tie"),
        ([*UNIFORM, "--tie", "q_proj,x_proj"], "names x_proj"),
        ([*UNIFORM, "--serve", "tgi"], "'tgi' is not a server"),
        ([*UNIFORM, "--serve", "vllm"], "cannot have b3g128"),
        (
            ["plan", "--model", "M", "--method", "mxq", "--budget", "3bpp", "--serve", "vllm"],
            "vLLM",
        ),
        (["profile", "--model", "M", "--quantizer", "awq9"], "awq9"),
        (["profile", "--model", "M", "--axis", "3"], "axis"),
        (["profile", "--model", "M", "--corpus", "no-such"], "'no-such'"),
        (["profile", "--model", "M", "--samples", "1" + "0" * 30], "from 1 to 2147483647"),
        (["profile", "--model", "M", "--device", "warp"], "Device 'warp' is not available"),
        (["profile", "--model", "/no/such/folder"], "/no/such/folder"),
        (
            ["run", "--model", "M", "--method", "uniform", "--base", "3.13", "--protocol", "p"],
            "strided",
        ),
        (
            ["run", "--model", "M", "--method", "uniform", "--base", "3.13", "--max-tokens", "1"],
            "at least 65",
        ),
        (
            ["run", "--model", "M", "--method", "uniform", "--base", "3.13", "--quantizer", "q"],
            "'q'",
        ),
        (["run", "--model", "M", "--plan", "/no/plan.json"], "cannot be read"),
        (["disk", "--prune", "nothing"], "'nothing'"),
        (["results", "--db", "/"], "is a folder"),
        (["repair", "/"], "/ is not a file"),
    ],
)
def test_cli_bad_input_exit_2_one_line(run_cli, model, arguments, message):
    arguments = [model if a == "M" else a for a in arguments]
    status, out, err = run_cli(*arguments, "--json")
    assert status == 2
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("lsq: ")]
    assert message in line
    assert "Traceback" not in err


def test_cli_argparse_error_exit_2(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--model", "demo", "--top-m", "many"])
    assert ended.value.code == 2
    assert "invalid int value" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["job"])
    assert ended.value.code == 2
    assert main(["job", "no-such-folder"]) == 2
    assert capsys.readouterr().err.endswith("lsq: There is no job in no-such-folder.\n")
    for option in ("--out", "--db"):
        with pytest.raises(SystemExit) as ended:
            main(["export", "--out", "x.csv", f"{option}=--"])
        assert ended.value.code == 2
        assert f"argument {option}: expected one argument" in capsys.readouterr().err


def test_cli_short_corpus_error_states_minimum(run_cli, model, tmp_path):
    tiny = tmp_path / "tiny.txt"
    tiny.write_text("Too short.", "utf8")
    status, _, err = run_cli("profile", "--model", model, "--corpus", str(tiny))
    assert status == 2
    assert re.search(r"\b4 calibration tokens\b.*\b256\b", err)
    status, _, err = run_cli(
        *["run", "--model", model, "--method", "uniform", "--base", "3.13"],
        *["--corpus", str(tiny), "--protocol", "blocks"],
    )
    assert status == 2
    assert re.search(r"blocks-256 .*\b256\b", err)
    assert "quantize" not in err, "it is told before any work"
    status, _, err = run_cli(
        "run", "--model", model, "--method", "mxq", "--budget", "99bpp", "--corpus", str(tiny)
    )
    assert status == 2
    assert "99bpp" in err, "a budget is, before the model would be fetched to read a text"
    store = Store()
    assert store.results().empty
    assert store.query("SELECT count(*) n FROM profiles")["n"][0] == 0


def test_cli_unreachable_model_exit_1(run_cli):
    status, _, err = run_cli("profile", "--model", "some-org/some-model")
    assert status == 1
    assert "Hugging Face" in err


def test_cli_unknown_corpus_fails_before_profiling(run_cli, model):
    run = ["run", "--model", model, "--method", "sensiboost", "--base", "3.13"]
    status, _, err = run_cli(*run, "--corpus", "/no/such/file.txt")
    assert status == 2
    assert "'/no/such/file.txt'" in err
    assert "profile" not in err.replace("lsq: ", "")


def test_cli_save_to_nonempty_folder_fails_early(run_cli, model, tmp_path):
    (tmp_path / "something").write_text("precious")
    status, _, err = run_cli(
        *["run", "--model", model, "--method", "uniform", "--base", "3.13"],
        *["--save", str(tmp_path)],
    )
    assert status == 2
    assert "not empty" in err
    assert "quantize" not in err
    assert (tmp_path / "something").read_text() == "precious"


def test_cli_help_lists_commands():
    done = subprocess.run(
        [sys.executable, "-m", "lsq_core", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for verb in ("inspect", "profile", "plan", "run", "eval", "results", "disk", "app"):
        assert verb in done.stdout


def test_cli_database_path_from_option_or_environment(run_cli, model, tmp_path, monkeypatch):
    chosen = tmp_path / "deep" / "er" / "x.duckdb"
    assert run_cli("inspect", "--model", model, "--db", str(chosen))[0] == 0
    assert chosen.is_file()
    monkeypatch.setenv("LSQ_DB", str(tmp_path / "env.duckdb"))
    assert run_cli("inspect", "--model", model)[0] == 0
    assert (tmp_path / "env.duckdb").is_file()
    for path in (chosen, tmp_path / "env.duckdb"):
        assert Store(path).models()["source"].tolist() == [model]
