"""Compare every benchmark row that this machine can measure with its recorded ratio.

``python -m lsq_core bench --record`` on an idle machine records the ratios. A row fails if its
ratio is below 80 % of the recorded one, or if it was never recorded.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from lsq_core import bench
from lsq_core.bench import MIN_RATIO_SHARE, ROWS, Pair, Row, measure, recorded
from lsq_core.cli.program import main
from lsq_core.errors import InputError, LsqError

#: Rows that take more than ten seconds: measured once per attempt, other rows three times.
SLOW = ("solver_cpu_eager", "profile", "perplexity", "replan10", "sweep12", "plan_cold")
#: Attempts per row. Other load on the machine can only slow a measurement down, so a row counts
#: as slower only if every attempt was.
ATTEMPTS = 3


def regression_message(row: Row, known: dict[str, float], slowness: float = 1.0) -> str:
    """Return what is too slow about a row on a machine ``slowness`` times as slow, or ''."""
    if row.most_s is not None:
        spent = row.ours_s if row.processor_s is None else row.processor_s
        limit = row.most_s * slowness
        if spent > limit:
            return f"{row.id} took {spent:.3g} s and may take {limit:.3g} s"
    if row.ratio is not None and row.device == "cpu":
        if row.id not in known:
            return f"{row.id} was never recorded; run bench --only {row.id} --record"
        if row.ratio < MIN_RATIO_SHARE * known[row.id]:
            return f"{row.id} is {row.ratio:.3g}×, and was {known[row.id]:.3g}× when recorded"
    return ""


@pytest.mark.bench
@pytest.mark.parametrize(
    "id", [pytest.param(id, marks=pytest.mark.slow) if id in SLOW else id for id in ROWS]
)
def test_bench_row_meets_limits(id, slowness):
    """Slow rows measure a profile, ten runs, long texts and cold processes, ours and theirs."""
    for _ in range(ATTEMPTS):
        (row,) = measure([id], repeats=1 if id in SLOW else 3)
        if row.reason:
            pytest.skip(f"{id}: {row.reason}")
        assert not row.wrong, f"{row.error_is} is {row.error}, limit {row.error_limit}"
        slow = regression_message(row, recorded(), slowness)
        if not slow:
            return
    pytest.fail(slow)


def test_regression_message_limit_and_recorded_ratio():
    known = {"x": 10.0}
    fast = Row("x", "", ours_s=1.0, theirs_s=8.5, ratio=8.5)
    assert regression_message(fast, known) == ""
    assert "never recorded" in regression_message(fast, {})
    assert "was 10×" in regression_message(Row("x", "", ours_s=1.0, theirs_s=7.9, ratio=7.9), known)
    assert regression_message(Row("x", "", ours_s=1.0, ratio=1.0, device="cuda"), known) == ""
    assert "0.5 s" in regression_message(Row("x", "", ours_s=1.0, most_s=0.5), known)
    assert regression_message(Row("x", "", ours_s=1.0, processor_s=0.4, most_s=0.5), known) == ""
    assert "0.8 s" in regression_message(Row("x", "", ours_s=1.0, most_s=0.5), known, 1.6)
    assert regression_message(Row("x", "", ours_s=1.0, most_s=0.5), known, 2.0) == ""


def test_row_wrong_and_missed_flags():
    assert not Row("x", "", error=0.001, error_limit=0.001).wrong
    assert Row("x", "", error=0.002, error_limit=0.001).wrong
    assert Row("x", "", error=float("nan"), error_limit=0.001).wrong
    assert not Row("x", "", reason="no GPU", target=20).missed
    assert Row("x", "", ours_s=1.0, ratio=1.2, target=1.3).missed
    assert Row("x", "", ours_s=1.0, most_s=0.5).missed


def test_pair_figures_use_pairwise_ratios():
    figures = Pair(np.array([1.0, 2.0, 1.0]), np.array([4.0, 8.0, 3.0])).figures
    assert (figures["ours_s"], figures["theirs_s"]) == (1.0, 4.0)
    assert (figures["ratio"], figures["least"]) == (4.0, 3.0)
    assert figures["noise"] == pytest.approx(1 / 8)


def test_record_stores_least_ratio_and_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RECORDED", tmp_path / "recorded.json")
    assert recorded() == {}
    bench.record([Row("a", "", ratio=4.0, least=3.0), Row("b", "", reason="no GPU")])
    bench.record([Row("c", "", ratio=2.0, least=1.5)])
    assert recorded() == {"a": 3.0, "c": 1.5}
    assert {"machine", "threads", "versions"} < json.loads(bench.RECORDED.read_text())["a"].keys()
    with pytest.raises(LsqError, match=r"\bc\b.* limit"):
        bench.record([Row("c", "", ratio=9.0, least=9.0, error=2.0, error_limit=1.0)])
    assert recorded()["c"] == 1.5


def test_cli_bench_prints_table(monkeypatch, capsys):
    rows = [
        Row("perplexity", "perplexity of a model", "batches", "a loop", 0.5, 1.0, 2.0, 0.1, 2.0),
        Row("solver_gpu", "the solver on a GPU", reason="there is no GPU here"),
    ]
    monkeypatch.setattr(bench, "measure", lambda ids, repeats, progress, model: rows)
    assert main(["bench", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    first_row = result["rows"][0]
    assert [first_row[n] for n in ("id", "ours_s", "theirs_s", "ratio")] == [
        "perplexity",
        0.5,
        1,
        2,
    ]
    assert main(["bench"]) == 0
    output = capsys.readouterr().out
    assert "500 ms" in output
    assert "2×" in output
    assert "there is no GPU here" in output
    assert "threads on" in output
    assert main(["bench", "--markdown"]) == 0
    assert "| perplexity of a model: batches, against a loop | 500 ms | 1 s | 2× |" in (
        capsys.readouterr().out
    )


def test_unknown_row_raises(capsys):
    with pytest.raises(InputError, match=r"'nothing' .*solver_cpu"):
        measure(["nothing"])
    assert main(["bench", "--only", "import", "--repeats", "0"]) == 2


@pytest.mark.parametrize("id", [id for id in ROWS if id.endswith("_gpu")])
def test_row_that_needs_a_gpu_says_so(id, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (row,) = measure([id], repeats=1)
    assert row.reason == bench.NO_GPU
    assert (row.device, row.ours_s, row.missed, row.wrong) == ("cuda", None, False, False)


def test_gpu_rows_measure_on_any_device(small_text):
    """Runs the same code on a CPU, with fewer tokens and a smaller layer."""
    from lsq_core.bench import gpu, packed
    from lsq_core.profiling.settings import ProfileSettings

    evaluated = gpu.evaluate_on("cpu", 1, "demo", 600)
    assert not evaluated.wrong
    assert evaluated.details["scored_tokens_per_s"] > 0
    settings = ProfileSettings("rtn", calibration=str(small_text), samples=4, block_tokens=64)
    assert gpu.profile_on("cpu", 1, "demo", settings).ours_s > 0
    forward = packed.measure_forward("packed_forward_gpu", packed.Case(512, (1, 64)), 1)
    assert not forward.wrong
    assert len(forward.details["cases"]) == 4 * 2 * 2


def test_ratios_of_other_models_are_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RECORDED", tmp_path / "recorded.json")
    with pytest.raises(InputError, match="sweep12"):
        bench.record([Row("sweep12", "", ratio=9.0, least=9.0, details={"model": "smollm2"})])
    assert recorded() == {}
