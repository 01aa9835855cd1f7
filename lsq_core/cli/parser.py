"""The parser of all verbs and their options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from lsq_core.cli import export_plan, result_verbs, show, sweep_options, tasks, verbs
from lsq_core.cli.convert import add_target_options, convert
from lsq_core.cli.output import escape_controls
from lsq_core.cli.plan_options import (
    add_plan_details,
    add_plan_options,
    add_profile_options,
    add_refine_options,
    corpus_choices,
)
from lsq_core.errors import InputError
from lsq_core.evaluation.protocol import PROTOCOLS
from lsq_core.exports.weights.registry import FORMATS, LSQ
from lsq_core.profiling.metrics import METRICS, proxies
from lsq_core.quantization.registry import MATRIX_QUANTIZERS, QUANTIZERS
from lsq_core.stages.noise import DEFAULT_BASE


class _Parser(argparse.ArgumentParser):
    """Reports bad options in the same way as other bad input."""

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse as argparse does, but reject ``--out=--``, which argparse reads as no value."""
        given = sys.argv[1:] if args is None else args
        for argument in given:
            if argument.startswith("-") and argument.endswith("=--"):
                self.error(f"argument {argument.removesuffix('=--')}: expected one argument")
        return super().parse_args(given, namespace)

    def error(self, message: str) -> None:
        if self.exit_on_error:
            super().error(escape_controls(message))
        raise InputError(message)


def build_parser(exit_on_error: bool = True) -> argparse.ArgumentParser:
    """Build the parser; without ``exit_on_error``, bad options raise :class:`InputError`."""
    parser = _Parser(
        prog="lsq",
        description="Layer-sensitive mixed-precision quantization of LLMs.",
        exit_on_error=exit_on_error,
    )
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    shows: dict[str, Callable[[dict], None]] = {}

    def verb(name: str, call: Callable, show: Callable, text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text, exit_on_error=exit_on_error)
        sub.add_argument("--json", action="store_true", help="print one JSON document")
        sub.add_argument("--db", help="database file (default: LSQ_DB, or lsq.duckdb in LSQ_HOME)")
        sub.set_defaults(call=call, show=show)
        shows[name] = show
        return sub

    _add_model_verbs(verb)
    _add_run_verbs(verb)
    _add_storage_verbs(verb)
    _add_maintenance_verbs(verb, shows)
    return parser


def _add_model_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verbs about one model, in the order of the workflow."""
    _add_model(
        verb("inspect", verbs.inspect, show.model, "describe a model without reading its weights")
    )

    sub = verb(
        "profile", verbs.profile, show.profile, "measure how hard each module is to quantize"
    )
    _add_model(sub)
    _add_device(sub)
    sub.add_argument("--corpus", help=f"calibration corpus: {corpus_choices()} (stdlib)")
    sub.add_argument("--quantizer", help=f"one of {', '.join(MATRIX_QUANTIZERS)} (hqq)")
    extra = [name for name, metric in METRICS.items() if not metric.default]
    exact = [name for name in extra if name not in proxies()]
    sub.add_argument(
        "--metric",
        action="append",
        default=[],
        help=f"also measure {' or '.join(extra)}: {' and '.join(exact)} is added by plans that "
        f"need it, {' and '.join(proxies())} are fast proxies of the exact score",
    )
    add_profile_options(sub)
    sweep_options.add_ray_options(sub)
    _add_planning_verbs(verb)
    _add_measuring_verbs(verb)


def _add_planning_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verbs that make a plan."""
    sub = verb("plan", verbs.plan, show.plan, "choose a configuration for each module")
    _add_model(sub)
    _add_device(sub)
    add_plan_options(sub)
    sub.add_argument(
        "--corpus", help="corpus to predict perplexity on (default: that of most runs)"
    )
    sub.add_argument(
        "--protocol",
        help="protocol to predict it for (default: that of most runs)",
    )
    sub.add_argument("--out", type=Path, help="write the plan to a file, for run --plan")
    sub.add_argument(
        "--rank",
        action="store_true",
        help="instead of one plan: every method's within the budget, best first, with what is "
        "predicted and what was measured",
    )

    sub = verb(
        "refine",
        verbs.refine,
        show.plan,
        "improve a plan by exchanges that lower the measured KL divergence; plan, run and sweep "
        "then use it with --method refined",
    )
    _add_model(sub)
    _add_device(sub)
    add_refine_options(sub)


def _add_measuring_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verbs that measure one model, quantized or not."""
    sub = verb("run", verbs.run, show.run, "plan, quantize, evaluate and store the result")
    _add_model(sub)
    _add_device(sub)
    add_plan_options(sub)
    sub.add_argument("--plan", type=Path, help="apply a plan written by plan --out")
    sub.add_argument("--quantizer", help=f"one of {', '.join(QUANTIZERS)} (hqq)")
    _add_hybrid(sub)
    _add_evaluation(sub)
    sub.add_argument("--save", type=Path, help="save the quantized model to this new folder")
    add_target_options(sub, list(FORMATS), LSQ)

    sub = verb("eval", verbs.evaluate, show.figures, "perplexity of one model, quantized or not")
    _add_model(sub)
    _add_device(sub)
    _add_evaluation(sub)

    sub = verb("noise", verbs.noise, show.noise, "measure the numerical noise of figures")
    _add_model(sub)
    _add_device(sub)
    _add_evaluation(sub)
    sub.add_argument("--base", default=DEFAULT_BASE, help=f"uniform plan ({DEFAULT_BASE})")

    sub = verb("tasks", tasks.measure, tasks.show, "measure a run or a model on lm-eval's tasks")
    tasks.add_options(sub)
    _add_model(sub, required=False)
    _add_device(sub)


def _add_run_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add ``sweep``, and the verbs about existing runs and saved models."""
    sub = verb("sweep", verbs.sweep, show.sweep, "run every method at every size on every corpus")
    _add_model(sub)
    _add_device(sub)
    sweep_options.add(sub, corpus_choices())
    _add_hybrid(sub)
    _add_protocol(sub)
    add_plan_details(sub)
    _add_saved_model_verbs(verb)


def _add_saved_model_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verbs about a model that was already quantized."""
    sub = verb("convert", convert, show.converted, "write a saved model in another tool's format")
    sub.add_argument("folder", metavar="FOLDER", help="a model that run --save wrote")
    sub.add_argument("--out", type=Path, required=True, help="the new folder")
    add_target_options(sub, [name for name in FORMATS if name != LSQ], "")
    sub.add_argument(
        "--no-evaluation",
        dest="evaluate",
        action="store_false",
        help="don't measure what is decoded from the new folder",
    )
    _add_evaluation(sub)
    _add_model(sub, required=False)
    _add_device(sub)

    sub = verb("audit", verbs.audit, show.audit, "compare what was stored with what was planned")
    sub.add_argument("target", metavar="FOLDER|RUN", help="a saved model, or the id of a run")
    _add_model(sub, required=False)
    _add_device(sub)

    sub = verb("generate", verbs.generate, show.generated, "continue a text with both models")
    either = sub.add_mutually_exclusive_group(required=True)
    either.add_argument("--saved", type=Path, metavar="FOLDER", help="a saved quantized model")
    either.add_argument("--run", metavar="ID", help="a run; its model is rebuilt unless saved")
    sub.add_argument("--prompt", required=True, help="text to continue")
    sub.add_argument("--max-new-tokens", type=int, default=60, help="tokens to generate (60)")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    sub.add_argument("--seed", type=int, default=0, help="sampling seed, temperature above 0 (0)")
    _add_model(sub, required=False)
    _add_device(sub)


def _add_storage_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verbs about stored results."""
    sub = verb("results", result_verbs.results, show.results, "list the runs in the database")
    sub.add_argument("--model", help="only runs of this model")
    sub.add_argument(
        "--published", action="store_true", help="the imported runs instead of your own"
    )

    about = "export all runs as a table, or one run as a report"
    sub = verb("export", result_verbs.export, show.exported, about)
    sub.add_argument(
        "--out",
        type=Path,
        required=True,
        help="a new file: .csv or .parquet for all runs; .html (a report) or .bib for one",
    )
    sub.add_argument("--run", metavar="ID", help="run to write a report or BibTeX of")
    sub.add_argument("--model", help="only runs of this model")
    sub.add_argument(
        "--published", action="store_true", help="the imported runs instead of your own"
    )

    export_plan.add_options(
        verb(
            "export-plan",
            export_plan.export_plan,
            export_plan.show,
            "write a plan in the format of another tool",
        )
    )

    sub = verb(
        "card", result_verbs.card, show.exported, "draw one run as a picture to show to others"
    )
    sub.add_argument("run", metavar="RUN", help="run id as listed by 'results --json'")
    sub.add_argument(
        "--out", type=Path, required=True, help="a new file: .png, or .html with the command line"
    )

    _add_import_verb(verb)


def _add_import_verb(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb that imports published measurements."""
    sub = verb(
        "import-reference",
        verbs.import_reference,
        show.imported,
        "import the published measurements from a checkout of lm-quant-toolkit",
    )
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        nargs="?",
        help="the checkout, containing src and data-vis",
    )
    what.add_argument(
        "--download",
        action="store_true",
        help="fetch its pinned revision with git instead of reading DIR",
    )


def _add_maintenance_verbs(
    verb: Callable[..., argparse.ArgumentParser], shows: Mapping[str, Callable[[dict], None]]
) -> None:
    """Add the verbs about jobs and files, the benchmarks, and the app."""
    sub = verb("jobs", verbs.jobs_verb, show.jobs, "list background jobs, running and finished")
    sub.add_argument("--cancel", metavar="ID", help="cancel this job")

    resumed = partial(show.resumed, shows=shows)
    sub = verb("resume", verbs.resume, resumed, "resume an interrupted job")
    sub.add_argument(
        "id", nargs="?", help="job id as listed by 'jobs' (default: the newest interrupted job)"
    )

    sub = verb("disk", verbs.disk_usage, show.disk, "show and prune what is stored on disk")
    sub.add_argument("--prune", metavar="NAME", help="delete one of the listed items")

    sub = verb(
        "repair", verbs.repair, show.repaired, "recover what can be read from a damaged database"
    )
    sub.add_argument("database", type=Path, help="the damaged database, which is not modified")
    sub.add_argument(
        "--out", type=Path, help="file to create (default: next to it, named *.repaired)"
    )

    _add_bench(verb("bench", verbs.bench, show.bench, "benchmark against the usual tools"))

    sub = verb("app", verbs.app, lambda result: None, "serve the app on this machine")
    sub.add_argument("--port", type=int, default=8501)
    sub.add_argument(
        "--address",
        default="127.0.0.1",
        help="address to listen on; any but localhost requires the token (127.0.0.1)",
    )
    sub.add_argument(
        "--token",
        action="store_true",
        help="require the token in the printed URL, even on localhost",
    )
    sub.add_argument("--model", help="model to open with (smollm2 if installed, else demo)")
    sub.add_argument(
        "--no-shipped",
        dest="shipped",
        action="store_false",
        help="don't import the measurements that come with the project",
    )


def _add_bench(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="ID",
        help="run only this benchmark (repeatable)",
    )
    sub.add_argument(
        "--model",
        default="demo",
        help="model for sweep12, evaluate_gpu and profile_gpu, as in other verbs (demo)",
    )
    sub.add_argument("--repeats", type=int, default=5, help="number of measurements per side (5)")
    sub.add_argument(
        "--markdown",
        dest="show",
        action="store_const",
        const=show.bench_markdown,
        help="print the table as Markdown",
    )
    sub.add_argument(
        "--record",
        action="store_true",
        help="record the ratios as the reference for the regression tests",
    )


def _add_model(sub: argparse.ArgumentParser, required: bool = True) -> None:
    sub.add_argument(
        "--model",
        required=required,
        help="demo, a Hugging Face id, a local folder, or an imported model"
        if required
        else "current location of the full-precision model (default: the original location)",
    )
    sub.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    sub.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code shipped with the model; only for models you trust",
    )
    sub.add_argument(
        "--allow-pickle",
        action="store_true",
        help="load pickled weights, which can run code; only for models you trust",
    )


def _add_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (auto)")
    sub.add_argument(
        "--dtype",
        default="auto",
        help="dtype to compute in: float32, bfloat16 (faster on a CPU with native support), "
        "float16, or auto: float32 on a CPU, the checkpoint's own on a GPU (auto)",
    )


def _add_hybrid(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--hybrid",
        action="store_true",
        help="same as --quantizer hybrid: learned rounding for high-impact rows, learned clipping "
        f"for the rest, {QUANTIZERS['hybrid'].steps:,} steps per block; --quantizer hybrid-500 "
        "takes fewer",
    )


def _add_evaluation(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--corpus", default="stdlib", help=f"evaluation corpus: {corpus_choices()} (stdlib)"
    )
    _add_protocol(sub)


def _add_protocol(sub: argparse.ArgumentParser) -> None:
    protocols = f"{', '.join(PROTOCOLS)} (strided)"
    sub.add_argument("--protocol", default="strided", help=protocols)
    sub.add_argument("--max-tokens", type=int, help="evaluate on at most this many tokens")
