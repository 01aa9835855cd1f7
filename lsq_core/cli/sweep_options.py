"""Options specific to ``sweep``, and those for Ray."""

from __future__ import annotations

import argparse

from lsq_core.cli.plan_options import BUDGET_HELP
from lsq_core.planning.methods import PLANNERS
from lsq_core.quantization.registry import QUANTIZERS


def add(sub: argparse.ArgumentParser, corpus_choices: str) -> None:
    """Add the options for what is combined, the cache of matrices, and Ray."""
    for option, text in {
        "--method": f"one of {', '.join(PLANNERS)}, or all (repeatable)",
        "--base": "base configuration, such as 3.13 or b3g128 (repeatable)",
        "--budget": f"{BUDGET_HELP}; repeatable",
        "--quantizer": f"one of {', '.join(QUANTIZERS)} (hqq; repeatable)",
        "--baseline": "also run uniform plans with this quantizer, or all (repeatable)",
        "--corpus": f"evaluation corpus: {corpus_choices} (stdlib; repeatable)",
    }.items():
        sub.add_argument(option, action="append", default=[], help=text)
    sub.add_argument(
        "--cache-size",
        "--remember",
        dest="remember",
        default="1GiB",
        metavar="BYTES",
        help="memory for quantized matrices reused by later plans (1GiB); formerly --remember",
    )
    add_ray_options(sub)


def add_ray_options(sub: argparse.ArgumentParser) -> None:
    """Add the options for work on several devices."""
    sub.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="measure on every device of this machine or, with HOST:PORT or auto, of a Ray cluster",
    )
    sub.add_argument(
        "--actor-cores",
        type=int,
        metavar="N",
        help="with --ray on CPUs: cores of each actor (a quarter of the machine's)",
    )
    sub.add_argument(
        "--actors",
        type=int,
        metavar="N",
        help="with --ray: maximum number of actors (default: one per device)",
    )
