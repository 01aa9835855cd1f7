"""Every verb and its options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lsq_core.cli import show, verbs
from lsq_core.cli.output import printable
from lsq_core.config import METADATA_FORMATS
from lsq_core.corpus import BUILT_IN
from lsq_core.errors import InputError
from lsq_core.plan import PLANNERS
from lsq_core.profile import DEFAULT_METRICS, METRICS, PROXIES
from lsq_core.quantize import MATRIX_WISE, QUANTIZERS


class _Parser(argparse.ArgumentParser):
    """Bad options end as every other bad input does."""

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse as argparse does, which takes the ``--`` of ``--out=--`` for no value at all."""
        given = sys.argv[1:] if args is None else args
        for argument in given:
            if argument.startswith("-") and argument.endswith("=--"):
                self.error(f"argument {argument.removesuffix('=--')}: expected one argument")
        return super().parse_args(given, namespace)

    def error(self, message: str) -> None:
        if self.exit_on_error:
            super().error(printable(message))
        raise InputError(message)


def build_parser(exit_on_error: bool = True) -> argparse.ArgumentParser:
    """The parser of every verb and option."""
    parser = _Parser(
        prog="python -m lsq_core",
        description="Explore where the bits should go, without writing code.",
        exit_on_error=exit_on_error,
    )
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, call: Callable, show: Callable, text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text, exit_on_error=exit_on_error)
        sub.add_argument("--json", action="store_true", help="print one JSON document")
        sub.add_argument("--db", help="database file (default: LSQ_DB, or data/lsq.duckdb)")
        sub.set_defaults(call=call, show=show)
        return sub

    _add_model_verbs(verb)
    _add_comparing_verbs(verb)
    _add_keeping_verbs(verb)
    return parser


def _add_model_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Verbs about one model, in the order of the way through."""
    _add_model(
        verb("inspect", verbs.inspect, show.model, "what a model is, before any weight is read")
    )

    sub = verb(
        "profile", verbs.profile, show.profile, "measure how hard each module is to quantize"
    )
    _add_model(sub)
    _add_device(sub)
    sub.add_argument("--corpus", help=f"calibration text: {_corpora()} (stdlib)")
    sub.add_argument("--quantizer", help=f"one of {', '.join(MATRIX_WISE)} (hqq)")
    dear = [name for name in METRICS if name not in DEFAULT_METRICS]
    sub.add_argument(
        "--metric",
        action="append",
        default=[],
        help=f"also measure {' or '.join(dear)}: loss_impact is added by a plan that needs it, "
        f"{' and '.join(PROXIES)} are fast proxies, compared with the exact score",
    )
    _add_profile(sub)

    sub = verb("plan", verbs.plan, show.plan, "choose a configuration for each module")
    _add_model(sub)
    _add_device(sub)
    _add_plan(sub)
    sub.add_argument("--corpus", help="text to predict perplexity on (that of most runs)")
    sub.add_argument("--protocol", help="strided or blocks, to predict it by (that of most runs)")
    sub.add_argument("--out", type=Path, help="write the plan into a file, for run --plan")

    sub = verb("run", verbs.run, show.run, "plan, quantize, evaluate, keep the result")
    _add_model(sub)
    _add_device(sub)
    _add_plan(sub)
    sub.add_argument("--plan", type=Path, help="apply a plan that plan --out wrote")
    sub.add_argument("--quantizer", help=f"one of {', '.join(QUANTIZERS)} (hqq)")
    _add_hybrid(sub)
    _add_evaluation(sub)
    sub.add_argument("--save", type=Path, help="keep the quantized model in this new folder")

    sub = verb(
        "eval", verbs.evaluate, show.figures, "perplexity of a saved or a full-precision model"
    )
    _add_model(sub)
    _add_device(sub)
    _add_evaluation(sub)


def _add_comparing_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Verbs about many runs, or about one that was made."""
    sub = verb("sweep", verbs.sweep, show.sweep, "every method at every size, on every text")
    _add_model(sub)
    _add_device(sub)
    for option, text in {
        "--method": f"one of {', '.join(PLANNERS)}, or all (repeatable)",
        "--base": "a ladder stop, such as 3.13 (repeatable)",
        "--budget": "3.2bpp, or bytes of the linear weights: 9MiB (repeatable)",
        "--quantizer": f"one of {', '.join(QUANTIZERS)} (hqq; repeatable)",
        "--baseline": "a quantizer whose uniform plans are added, or all (repeatable)",
        "--corpus": f"evaluation text: {_corpora()} (stdlib; repeatable)",
    }.items():
        sub.add_argument(option, action="append", default=[], help=text)
    _add_hybrid(sub)
    sub.add_argument(
        "--remember",
        default="1GiB",
        metavar="BYTES",
        help="quantized matrices kept in memory for the plans to come (1GiB)",
    )
    _add_protocol(sub)
    _add_plan_details(sub)

    sub = verb("audit", verbs.audit, show.audit, "what was stored, against what was planned")
    sub.add_argument("target", metavar="FOLDER|RUN", help="a saved model, or the id of a run")
    _add_model(sub, required=False)
    _add_device(sub)

    sub = verb("generate", verbs.generate, show.generated, "one prompt, both models' texts")
    of = sub.add_mutually_exclusive_group(required=True)
    of.add_argument("--saved", type=Path, metavar="FOLDER", help="a saved quantized model")
    of.add_argument("--run", metavar="ID", help="a run, quantized again unless it was saved")
    sub.add_argument("--prompt", required=True, help="the text to go on from")
    sub.add_argument("--max-new-tokens", type=int, default=60, help="tokens to write (60)")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    sub.add_argument("--seed", type=int, default=0, help="seed of the draws above 0 (0)")
    _add_model(sub, required=False)
    _add_device(sub)


def _add_keeping_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Verbs about what is kept, and the app."""
    sub = verb("results", verbs.results, show.results, "every run in the database")
    sub.add_argument("--model", help="only runs of this model")
    sub.add_argument(
        "--published", action="store_true", help="the imported runs in place of your own"
    )

    sub = verb("export", verbs.export, show.exported, "runs as a table, or one of them whole")
    sub.add_argument(
        "--out",
        type=Path,
        required=True,
        help="a new file: .csv or .parquet for all runs; .html (a report) or .bib for one",
    )
    sub.add_argument("--run", metavar="ID", help="the run that a report or BibTeX is of")
    sub.add_argument("--model", help="only runs of this model")
    sub.add_argument(
        "--published", action="store_true", help="the imported runs in place of your own"
    )

    sub = verb(
        "import-reference",
        verbs.import_reference,
        show.imported,
        "take in the published measurements of a checkout of lm-quant-toolkit",
    )
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("folder", type=Path, metavar="DIR", nargs="?", help="holds src and data-vis")
    what.add_argument(
        "--download", action="store_true", help="fetch its pinned revision, by git, in place of DIR"
    )

    sub = verb("jobs", verbs.jobs_verb, show.jobs, "background jobs, running and ended")
    sub.add_argument("--cancel", metavar="ID", help="end this one")

    sub = verb("resume", verbs.resume, show.resumed, "let an interrupted job go on")
    sub.add_argument("id", nargs="?", help="a job as 'jobs' lists it (the newest interrupted)")

    sub = verb("disk", verbs.on_disk, show.disk, "what is kept on disk, and pruning it")
    sub.add_argument("--prune", metavar="NAME", help="delete one of what disk lists")

    sub = verb("repair", verbs.repair, show.repaired, "copy what can be read of a damaged database")
    sub.add_argument("database", type=Path, help="stays as it is")
    sub.add_argument("--out", type=Path, help="a new file (beside it, named *.repaired)")

    _add_bench(
        verb("bench", verbs.bench, show.bench, "how fast this is, beside what people use today")
    )

    sub = verb("app", verbs.app, lambda result: None, "serve the app on this machine")
    sub.add_argument("--port", type=int, default=8501)
    sub.add_argument(
        "--address",
        default="127.0.0.1",
        help="address to listen on; any but this machine's own needs the token (127.0.0.1)",
    )
    sub.add_argument(
        "--token",
        action="store_true",
        help="ask for a token, which the address that is printed holds, on this machine too",
    )


def _add_bench(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--only", action="append", default=[], metavar="ID", help="one row (repeatable; all rows)"
    )
    sub.add_argument("--repeats", type=int, default=5, help="times that each side is measured (5)")
    sub.add_argument(
        "--markdown",
        dest="show",
        action="store_const",
        const=show.bench_markdown,
        help="print the table as Markdown",
    )
    sub.add_argument(
        "--record", action="store_true", help="keep the ratios that tests hold later ones against"
    )


def _corpora() -> str:
    return f"{', '.join(BUILT_IN)}, hf:org/name, or a text file"


def _add_model(sub: argparse.ArgumentParser, required: bool = True) -> None:
    sub.add_argument(
        "--model",
        required=required,
        help="demo, a Hugging Face id, a local folder, or an imported model"
        if required
        else "where the full-precision model is now (where it was)",
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
    _add_plan_details(sub)


def _add_plan_details(sub: argparse.ArgumentParser) -> None:
    """What a plan depends on beside its method and size."""
    sub.add_argument("--boost-stop", type=int, default=2, help="stops a flagged layer gains (2)")
    sub.add_argument("--top-m", type=int, default=0, help="outliers to keep, 0 for all (0)")
    sub.add_argument("--calibration", help=f"calibration text: {_corpora()} (stdlib)")
    sub.add_argument(
        "--metric",
        default="sensitivity",
        help="what SensiBoost reads: sensitivity (by part) or sensitivity_module",
    )
    sub.add_argument(
        "--profile-quantizer", help=f"quantizer of the profile: {', '.join(MATRIX_WISE)} (hqq)"
    )
    sub.add_argument("--seed", type=int, default=0, help="seed of the ablations (0)")
    sub.add_argument(
        "--exact", action="store_true", help="solve a knapsack to the optimum, with its gap"
    )
    rows = "of high-impact"
    sub.add_argument(
        "--low-bits", type=int, default=2, help=f"bits of most rows, {rows}: 2 or 3 (2)"
    )
    sub.add_argument(
        "--high-bits",
        type=int,
        default=3,
        help=f"bits of the rows that matter, {rows}: 3, 4, 16 (3)",
    )
    sub.add_argument("--group-size", type=int, default=128, help=f"{rows}: 128, 64 or 32 (128)")
    sub.add_argument(
        "--loss",
        default="block",
        help=f"what ratios are measured by, {rows}: block (its own output), or model (all "
        "blocks from there on; many times dearer) (block)",
    )
    sub.add_argument(
        "--ratios",
        default="full",
        help=f"{rows}: uniform, diagonal (each matrix for itself), or full (a block's together)",
    )
    sub.add_argument(
        "--clip",
        action="store_true",
        help=f"{rows}: without the negative eigenvalues of each block's interactions",
    )
    sub.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="PATTERN=CONFIG",
        help="fix modules to a configuration or range: '*.layers.0.*=b8g64' (repeatable)",
    )
    _add_profile(sub)


def _add_hybrid(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--hybrid",
        action="store_true",
        help="the same as --quantizer hybrid: rounding learned for high-impact rows and clipping "
        f"for the rest, {QUANTIZERS['hybrid'].steps:,} steps a block; --quantizer hybrid-500 "
        "takes fewer",
    )


def _add_evaluation(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--corpus", default="stdlib", help=f"evaluation text: {_corpora()}")
    _add_protocol(sub)


def _add_protocol(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--protocol", default="strided", help="strided or blocks (strided)")
    sub.add_argument("--max-tokens", type=int, help="evaluate on at most so many tokens")
