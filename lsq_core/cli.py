"""The command line: ``python -m lsq_core VERB``.

With ``--json`` exactly one JSON document goes to standard output; progress and messages always go
to standard error. Exit status 0, 2 for bad input, 1 for a failure.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from lsq_core import disk, jobs
from lsq_core.config import METADATA_FORMATS, format_bytes
from lsq_core.corpus import BUILT_IN, corpus_identity
from lsq_core.errors import InputError, LsqError
from lsq_core.jsontext import json_text, write_json
from lsq_core.model import MANIFEST, ModelSource
from lsq_core.pipeline import (
    EvaluationRequest,
    Report,
    Workbench,
    evaluate_saved,
    find_published,
)
from lsq_core.plan import PLANNERS, Plan, PlanRequest
from lsq_core.predict import parse_loss
from lsq_core.profile import DEFAULT_METRICS, METRICS, Profile, ProfileSettings
from lsq_core.quantize import QUANTIZERS
from lsq_core.store import PUBLISHED, Store


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status.

    ``job FOLDER`` is how :func:`lsq_core.jobs.start` has a command run; people don't type it.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["job"]:
        return jobs.work(Path(arguments[1]), execute)
    options = build_parser().parse_args(arguments)
    console = _Console()
    try:
        try:
            result = options.call(options, console.report)
        finally:
            console.close()
    except LsqError as error:
        print(f"lsq: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("lsq: stopped", file=sys.stderr)
        return 1
    if options.json:
        print(json_text(result))
    else:
        options.show(result)
    return 0


def execute(arguments: list[str], report: Report) -> dict:
    """Run one command and give its result, reporting to ``report``; for jobs.

    Raises
    ------
    LsqError
        As the command does.
    """
    options = build_parser(exit_on_error=False).parse_args(arguments)
    return options.call(options, report)


class _Console:
    """Progress on standard error: a line that rewrites itself in a terminal, else a few lines."""

    def __init__(self) -> None:
        self.shown = ("", -1)
        self.terminal = sys.stderr.isatty()

    def report(self, stage: str, done: int, total: int, message: str) -> None:
        tenth = 10 * done // total if total else 0
        if not self.terminal and (stage, tenth) == self.shown:
            return
        share = f"{100 * done // total:3d} %" if total > 1 else "     "
        line = f"{stage:>9} {share}  {message}"
        if self.terminal:
            new_stage = stage != self.shown[0] and self.shown[0]
            print(("\n" if new_stage else "\r\033[K") + line, end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
        self.shown = (stage, tenth)

    def close(self) -> None:
        if self.terminal and self.shown[0]:
            print(file=sys.stderr)


# --- options --------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Bad options end as every other bad input does."""

    def error(self, message: str) -> None:
        if self.exit_on_error:
            super().error(message)
        raise InputError(message)


def build_parser(exit_on_error: bool = True) -> argparse.ArgumentParser:
    """The parser of every verb and option."""
    parser = _Parser(
        prog="python -m lsq_core",
        description="Explore where the bits should go, without writing code.",
        exit_on_error=exit_on_error,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, call: Callable, show: Callable, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, exit_on_error=exit_on_error)
        sub.add_argument("--json", action="store_true", help="print one JSON document")
        sub.add_argument("--db", help="database file (default: LSQ_DB, or data/lsq.duckdb)")
        sub.set_defaults(call=call, show=show)
        return sub

    _add_model_verbs(verb)
    _add_keeping_verbs(verb)
    return parser


def _add_model_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Verbs about one model, in the order of the way through."""
    _add_model(verb("inspect", inspect, show_model, "what a model is, before any weight is read"))

    sub = verb("profile", profile, show_profile, "measure how hard each module is to quantize")
    _add_model(sub)
    _add_device(sub)
    sub.add_argument("--corpus", help=f"calibration text: {_corpora()} (stdlib)")
    sub.add_argument("--quantizer", help=f"one of {', '.join(QUANTIZERS)} (hqq)")
    dear = [name for name in METRICS if name not in DEFAULT_METRICS]
    sub.add_argument(
        "--metric",
        action="append",
        default=[],
        help=f"also measure {' or '.join(dear)}, which a plan that needs it adds by itself",
    )
    _add_profile(sub)

    sub = verb("plan", plan, show_plan, "choose a configuration for each module")
    _add_model(sub)
    _add_device(sub)
    _add_plan(sub)
    sub.add_argument("--corpus", help="text to predict perplexity on (that of most runs)")
    sub.add_argument("--protocol", help="strided or blocks, to predict it by (that of most runs)")
    sub.add_argument("--out", type=Path, help="write the plan into a file, for run --plan")

    sub = verb("run", run, show_run, "plan, quantize, evaluate, keep the result")
    _add_model(sub)
    _add_device(sub)
    _add_plan(sub)
    sub.add_argument("--plan", type=Path, help="apply a plan that plan --out wrote")
    sub.add_argument("--quantizer", default="hqq", help=f"one of {', '.join(QUANTIZERS)}")
    _add_evaluation(sub)
    sub.add_argument("--save", type=Path, help="keep the quantized model in this new folder")

    sub = verb("eval", evaluate, show_figures, "perplexity of a saved or a full-precision model")
    _add_model(sub)
    _add_device(sub)
    _add_evaluation(sub)


def _add_keeping_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Verbs about what is kept, and the app."""
    sub = verb("results", results, show_results, "every run in the database")
    sub.add_argument("--model", help="only runs of this model")
    sub.add_argument(
        "--published", action="store_true", help="the imported runs in place of your own"
    )

    sub = verb(
        "import-reference",
        import_reference,
        show_import,
        "take in the published measurements of a checkout of lm-quant-toolkit",
    )
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("folder", type=Path, metavar="DIR", nargs="?", help="holds src and data-vis")
    what.add_argument(
        "--download", action="store_true", help="fetch its pinned revision, by git, in place of DIR"
    )

    sub = verb("disk", on_disk, show_disk, "what is kept on disk, and pruning it")
    sub.add_argument("--prune", metavar="NAME", help="delete one of what disk lists")

    sub = verb("app", app, lambda result: None, "serve the app on this machine")
    sub.add_argument("--port", type=int, default=8501)


def _corpora() -> str:
    return f"{', '.join(BUILT_IN)}, hf:org/name, or a text file"


def _add_model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--model",
        required=True,
        help="demo, a Hugging Face id, a local folder, or an imported model",
    )
    sub.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    sub.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model; only for models you trust",
    )
    sub.add_argument(
        "--allow-pickle",
        action="store_true",
        help="open pickled weights, which can run code; only for models you trust",
    )


def _add_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (auto)")
    sub.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (auto)")


def _add_profile(sub: argparse.ArgumentParser) -> None:
    """Options that say how a profile is measured; an imported model has its own defaults."""
    sub.add_argument("--axis", type=int, help="grouping axis, 0 or 1 (1)")
    sub.add_argument(
        "--metadata",
        help=f"how scale and zero are stored: {' or '.join(METADATA_FORMATS)} (8bit)",
    )
    sub.add_argument("--samples", type=int, help="calibration texts (128)")
    sub.add_argument("--block-tokens", type=int, help="tokens of a calibration block (512)")


def _add_plan(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--method", help=f"one of {', '.join(PLANNERS)}")
    sub.add_argument("--base", help="a ladder stop, such as 3.13 or b3g128")
    sub.add_argument("--budget", help="3.2bpp, or bytes of the linear weights: 9MiB, 1.5GiB")
    sub.add_argument(
        "--max-loss",
        metavar="PERCENT",
        help="in place of base and budget: the smallest plan with predicted perplexity at most so "
        "far above full precision, such as 1%%",
    )
    sub.add_argument("--boost-stop", type=int, default=2, help="stops a flagged layer gains (2)")
    sub.add_argument("--top-m", type=int, default=0, help="outliers to keep, 0 for all (0)")
    sub.add_argument("--calibration", help=f"calibration text: {_corpora()} (stdlib)")
    sub.add_argument(
        "--metric",
        default="sensitivity",
        help="what SensiBoost reads: sensitivity (by part) or sensitivity_module",
    )
    sub.add_argument("--profile-quantizer", help="quantizer of the profile (hqq)")
    sub.add_argument("--seed", type=int, default=0, help="seed of the ablations (0)")
    sub.add_argument(
        "--exact", action="store_true", help="solve a knapsack to the optimum, with its gap"
    )
    sub.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="PATTERN=CONFIG",
        help="fix modules to a configuration or range: '*.layers.0.*=b8g64' (repeatable)",
    )
    _add_profile(sub)


def _add_evaluation(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--corpus", default="stdlib", help=f"evaluation text: {_corpora()}")
    sub.add_argument("--protocol", default="strided", help="strided or blocks (strided)")
    sub.add_argument("--max-tokens", type=int, help="evaluate on at most so many tokens")


def _workbench(options: argparse.Namespace, report: Report) -> Workbench:
    return Workbench(_source(options), Store(options.db), options.device, options.dtype, report)


def _source(options: argparse.Namespace) -> ModelSource:
    return ModelSource(
        options.model, options.revision, options.trust_remote_code, options.allow_pickle
    )


def _settings(
    options: argparse.Namespace, bench: Workbench, quantizer: str | None, calibration: str | None
) -> ProfileSettings:
    """The profile settings that were given, and the model's defaults for the others."""
    chosen = {
        "quantizer": quantizer,
        "axis": options.axis,
        "metadata": options.metadata,
        "calibration": calibration,
        "samples": options.samples,
        "block_tokens": options.block_tokens,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    return replace(bench.default_settings, **given)


def _plan_request(options: argparse.Namespace) -> PlanRequest:
    if not options.method:
        raise InputError(f"Give a method with --method: {', '.join(PLANNERS)}.")
    if options.metric not in METRICS or not options.metric.startswith("sensitivity"):
        raise InputError(
            f"'{options.metric}' is not a metric SensiBoost can read; choose sensitivity or "
            "sensitivity_module."
        )
    return PlanRequest(
        method=options.method,
        base=options.base,
        budget=options.budget,
        boost_stop=options.boost_stop,
        top_m=options.top_m,
        metric=options.metric,
        seed=options.seed,
        exact=options.exact,
        pins=tuple(options.pin),
    )


def _plan(
    options: argparse.Namespace, bench: Workbench, settings: ProfileSettings
) -> tuple[Plan, Profile | None]:
    """The plan that was asked for, by a base, a budget or a loss, and its profile."""
    request = _plan_request(options)
    if options.max_loss is not None:
        if options.base or options.budget:
            raise InputError("Give --max-loss, or a base or budget, but not both.")
        loss = parse_loss(options.max_loss)
        request = bench.request_within(request, settings, loss, options.corpus, options.protocol)
    return bench.plan(request, settings)


def _evaluation(options: argparse.Namespace) -> EvaluationRequest:
    return EvaluationRequest(options.corpus, options.protocol, options.max_tokens)


# --- verbs ----------------------------------------------------------------------------------


def inspect(options: argparse.Namespace, report: Report) -> dict:
    """Layers, parameters, bytes and modules, from the config alone for a remote model."""
    from lsq_core.load import inspect_model

    source, store = _source(options), Store(options.db)
    info = find_published(source, store) or inspect_model(source)
    if info.fingerprint:
        store.save_model(info)
    return _described(info) | {
        "modules": {m.name: [m.out_features, m.in_features] for m in info.matrices}
    }


def _described(info: object) -> dict:
    return {
        "model": info.source,
        "fingerprint": info.fingerprint or None,
        "architecture": info.architecture,
        "layers": info.layers,
        "context": info.context,
        "parameters": info.parameters,
        "linear_parameters": info.linear_parameters,
        "covered": info.covered,
        "left_out": list(info.left_out),
        "file_bytes": info.file_bytes,
        "tied_embeddings": info.tied_embeddings,
    }


def profile(options: argparse.Namespace, report: Report) -> dict:
    """Measure or find a profile."""
    bench = _workbench(options, report)
    settings = _settings(options, bench, options.quantizer, options.corpus)
    found = bench.profile(settings, options.metric)
    return {
        "profile": found.id,
        "model": _described(bench.info),
        "settings": asdict(found.settings),
        "provenance": found.provenance,
        "scores": found.values.to_dict("records"),
    }


def plan(options: argparse.Namespace, report: Report) -> dict:
    """Make a plan, measuring what it needs first."""
    bench = _workbench(options, report)
    settings = _settings(options, bench, options.profile_quantizer, options.calibration)
    made, used = _plan(options, bench, settings)
    content = made.to_json() | {
        "predicted": bench.predicted(made, settings, options.corpus, options.protocol),
        "model": bench.source.name,
        "fingerprint": bench.info.fingerprint,
        "profile": used.id if used else None,
        "covered": bench.info.covered,
    }
    if options.out:
        _write_new(options.out, content)
    return content


def _write_new(path: Path, content: dict) -> None:
    try:
        write_json(path, content)
    except OSError as error:
        raise LsqError(f"{path} cannot be written: {error.strerror}.") from error


def run(options: argparse.Namespace, report: Report) -> dict:
    """Plan or take a saved plan, quantize, evaluate, keep."""
    evaluation = _evaluation(options)
    corpus_identity(evaluation.corpus)  # a wrong path is told before anything is measured
    bench = _workbench(options, report)
    settings = _settings(options, bench, options.profile_quantizer, options.calibration)
    if options.plan:
        if options.method or options.base or options.budget or options.max_loss:
            raise InputError(
                "Give a saved plan, or a method with base, budget or max-loss, but not both."
            )
        made, used = _saved_plan(options.plan, bench), None
    else:
        if options.max_loss and options.quantizer != settings.quantizer:
            raise InputError(
                f"--max-loss predicts by the profile of {settings.quantizer}; give "
                f"--profile-quantizer {options.quantizer} to run by that quantizer."
            )
        made, used = _plan(options, bench, settings)
    measured_by = replace(settings, quantizer=options.quantizer)
    predicted = bench.predicted(made, measured_by, evaluation.corpus, evaluation.protocol)
    save = options.save.expanduser().resolve() if options.save else None
    outcome = bench.run(made, used, options.quantizer, evaluation, save)
    return {
        "model": bench.source.name,
        "fingerprint": bench.info.fingerprint,
        "predicted": predicted,
    } | outcome


def _saved_plan(path: Path, bench: Workbench) -> Plan:
    try:
        content = json.loads(path.read_text("utf8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a plan: it holds no JSON ({error}).") from error
    return Plan.from_json(content, bench.info.matrices, bench.info.other_bytes)


def evaluate(options: argparse.Namespace, report: Report) -> dict:
    """Evaluate a folder that ``run --save`` wrote, or a model in full precision."""
    request = _evaluation(options)
    source = _source(options)
    folder = source.local_folder
    if folder is not None and (folder / MANIFEST).is_file():
        return evaluate_saved(
            folder, request, Store(options.db), options.device, options.dtype, report
        )
    return _workbench(options, report).evaluate_full(request)


def results(options: argparse.Namespace, report: Report) -> dict:
    """Every run, newest first: measured here, or published."""
    origin = "published" if options.published else "measured"
    frame = Store(options.db).results(origin=origin)
    if options.model:
        frame = frame[frame["model"].isin([options.model, PUBLISHED + options.model])]
    frame = frame.assign(created=frame["created"].astype(str))
    return {"results": frame.astype(object).where(frame.notna(), None).to_dict("records")}


def import_reference(options: argparse.Namespace, report: Report) -> dict:
    """Take in published measurements, in the place of those taken in before."""
    from lsq_core import reference

    store = Store(options.db)
    if options.download:
        return reference.import_download(store, report)
    return reference.import_reference(options.folder, store, report)


def on_disk(options: argparse.Namespace, report: Report) -> dict:
    """What is kept on disk; ``--prune`` deletes one of it."""
    store = Store(options.db)
    pruned = disk.prune(store, options.prune) if options.prune else None
    return {
        "pruned": asdict(pruned) if pruned else None,
        "kept": [asdict(item) for item in disk.kept_on_disk(store)],
    }


def app(options: argparse.Namespace, report: Report) -> dict:
    """Serve the app until stopped."""
    import os
    import subprocess

    root = Path(__file__).resolve().parents[1]
    environment = os.environ | ({"LSQ_DB": str(Store(options.db).path)} if options.db else {})
    command = [sys.executable, "-m", "streamlit", "run", "app.py"]
    command += ["--server.port", str(options.port)]
    status = subprocess.call(command, cwd=root, env=environment)
    if status:
        raise LsqError(f"The app ended with status {status}; its own message is above.")
    return {}


# --- for people -----------------------------------------------------------------------------


def show_model(result: dict) -> None:
    """Print what a model is."""
    print(
        f"{result['model']}: {result['architecture']}, {result['layers']} layers, "
        f"{result['parameters']:,} parameters, {format_bytes(result['file_bytes'])}; "
        f"{100 * result['covered']:.1f} % of them in {len(result['modules'])} planned modules"
    )
    for name in result["left_out"]:
        print(f"left at full precision, since no group size divides it: {name}")


def show_profile(result: dict) -> None:
    """Print which profile was measured."""
    provenance = result["provenance"]
    published = provenance.get("origin") == "published"
    tokens = "published, on" if published else f"on {provenance['tokens']:,} tokens of"
    print(
        f"profile {result['profile']} of {result['model']['model']}: {len(result['scores']):,} "
        f"scores {tokens} {provenance['corpus']}"
    )


def show_plan(result: dict) -> None:
    """Print a plan's size, its boosted modules and its configurations by count."""
    print(
        f"{result['method']}: {result['bits_per_param']:.4f} bits per parameter, "
        f"{format_bytes(result['planned_bytes'])} planned for the linear weights, "
        f"{format_bytes(result['model_bytes'])} for the model"
    )
    for name, worth in result["flagged"].items():
        print(f"  {result['modules'][name]['config']:>7}  {name}  ({worth:.2f})")
    counts: dict[str, int] = {}
    for entry in result["modules"].values():
        counts[entry["config"]] = counts.get(entry["config"], 0) + 1
    print("  " + ", ".join(f"{n} × {config}" for config, n in sorted(counts.items())))
    if "gap" in result:
        print(f"at most {100 * result['gap']:.2g} % above the least possible cost at this budget")
    for note in result["notes"]:
        print(note)
    show_predicted(result["predicted"])


def show_predicted(found: dict) -> None:
    """Print a predicted perplexity with its band, or why there is none."""
    if "reason" in found:
        print(f"no predicted perplexity: {found['reason']}")
        return
    beyond = ", beyond what was run" if found["extrapolated"] else ""
    print(
        f"predicted perplexity {found['perplexity']:.4f} ({found['low']:.4f} to "
        f"{found['high']:.4f}, 9 times in 10) on {found['corpus']} ({found['protocol']}), from "
        f"{found['runs']} runs{beyond}; full precision {found['full_precision']:.4f}"
    )


def show_run(result: dict) -> None:
    """Print a plan and what came of it."""
    show_plan(result)
    show_figures(result)
    change = result["increase"]
    interval = f"95 % interval {100 * change['low']:+.2f} to {100 * change['high']:+.2f} %"
    if math.isnan(change["low"]):
        interval = "too few windows for an interval"
    print(
        f"full precision {result['perplexity_full']:.4f}: {100 * change['relative']:+.2f} % "
        f"({interval}), "
        f"KL {result['kl']:.4f} nats, same top token {100 * result['top1']:.1f} %"
    )


def show_figures(result: dict) -> None:
    """Print a perplexity with what it was measured on."""
    cut = ", cut by max-tokens" if result["truncated"] else ""
    print(
        f"perplexity {result['perplexity']:.4f} on {result['tokens']:,} tokens of "
        f"{result['corpus']} ({result['protocol']}{cut})"
    )


def show_results(result: dict) -> None:
    """Print the runs as a table."""
    print(f"{'model':<24} {'method':<20} {'bits':>7} {'MiB':>9} {'perplexity':>11}  corpus")
    for row in result["results"]:
        # A published run tells no bytes of its linear weights.
        size = row["measured_bytes"]
        mib = "–" if size is None else f"{size / 2**20:.2f}"
        print(
            f"{str(row['model'])[-24:]:<24} {row['method']:<20} {row['bits_per_param']:>7.4f} "
            f"{mib:>9} {row['perplexity']:>11.4f}  {row['corpus']} ({row['protocol']})"
        )


def show_import(result: dict) -> None:
    """Print what was taken in, and what the files lack."""
    counts = ", ".join(f"{count:,} {table}" for table, count in result["counts"].items())
    print(f"{result['source']}: {counts}")
    for sentence in [*result["flawed"], *result["missing"]]:
        print(f"  {sentence}")


def show_disk(result: dict) -> None:
    """Print what is kept."""
    for item in result["kept"]:
        print(f"{format_bytes(item['bytes']):>12}  {item['kind']:<14} {item['name']}")
