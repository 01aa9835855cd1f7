"""Options for profiles and plans, shared by several verbs."""

from __future__ import annotations

import argparse
from pathlib import Path

from lsq_core.bits import EXTENDED, METADATA_FORMATS, PAPER
from lsq_core.corpus.registry import BUILT_IN_CORPORA
from lsq_core.planning.methods import PLANNERS
from lsq_core.planning.methods.refined import Refined
from lsq_core.planning.request import DEFAULT_START
from lsq_core.planning.servers import SERVERS
from lsq_core.quantization.registry import MATRIX_QUANTIZERS
from lsq_core.stages.refine import DEFAULT_MINUTES

BUDGET_HELP = "3.2bpp (nominal bits per parameter) or 9MiB (planned bytes of the linear weights)"


def corpus_choices() -> str:
    """Return the corpora that an option accepts, in words."""
    return f"{', '.join(BUILT_IN_CORPORA)}, hf:org/name, or a text file"


def add_profile_options(sub: argparse.ArgumentParser) -> None:
    """Add the options for measuring a profile; an imported model has its own defaults."""
    sub.add_argument("--axis", type=int, help="grouping axis, 0 or 1 (1)")
    sub.add_argument(
        "--metadata",
        help=f"format of scales and zero points: {' or '.join(METADATA_FORMATS)} (8bit)",
    )
    sub.add_argument(
        "--ladder",
        help=f"configurations to choose from: {PAPER} (2, 3, 4 and 8 bits) or {EXTENDED} (1, 5 and "
        f"6 bits too) ({PAPER})",
    )
    sub.add_argument("--samples", type=int, help="number of calibration samples (128)")
    sub.add_argument("--block-tokens", type=int, help="tokens per calibration block (512)")


def add_plan_options(sub: argparse.ArgumentParser) -> None:
    """Add all options of a plan: its method, its size, and the rest."""
    sub.add_argument("--method", help=f"one of {', '.join(PLANNERS)}")
    sub.add_argument("--base", help="base configuration, such as 3.13 or b3g128")
    sub.add_argument("--budget", help=BUDGET_HELP)
    sub.add_argument(
        "--max-loss",
        metavar="PERCENT",
        help="instead of base and budget: the smallest plan whose predicted perplexity is at most "
        "this much above full precision, such as 1%%",
    )
    add_plan_details(sub)


def add_plan_details(sub: argparse.ArgumentParser) -> None:
    """Add the options of a plan other than its method and size."""
    sub.add_argument(
        "--boost-stop",
        type=int,
        default=2,
        help="configurations by which an outlier layer is promoted (2)",
    )
    sub.add_argument(
        "--top-m",
        type=int,
        default=0,
        help="outlier layers to promote per module type, 0 for all (0)",
    )
    sub.add_argument(
        "--metric",
        default="sensitivity",
        help="metric of SensiBoost: sensitivity (by part) or sensitivity_module",
    )
    sub.add_argument("--seed", type=int, default=0, help="seed of the ablations (0)")
    sub.add_argument(
        "--exact",
        action="store_true",
        help="solve a knapsack exactly and report the optimality gap",
    )
    add_start_option(sub)
    add_row_options(sub)
    add_restriction_options(sub)
    add_profile_options(sub)
    add_planning_profile_options(sub)


def add_planning_profile_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of a plan's profile that :func:`add_profile_options` does not add."""
    sub.add_argument("--calibration", help=f"calibration corpus: {corpus_choices()} (stdlib)")
    sub.add_argument(
        "--profile-quantizer",
        help=f"quantizer of the profile: {', '.join(MATRIX_QUANTIZERS)} (hqq)",
    )


def add_restriction_options(sub: argparse.ArgumentParser) -> None:
    """Add the options that restrict the configuration of each module."""
    sub.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="PATTERN=CONFIG",
        help="pin modules to a configuration or range: '*.layers.0.*=b8g64' (repeatable)",
    )
    sub.add_argument(
        "--tie",
        action="append",
        default=[],
        metavar="NAME,NAME,…",
        help="give modules of a layer the same configuration: 'q_proj,k_proj,v_proj' (repeatable)",
    )
    sub.add_argument(
        "--serve",
        metavar="SERVER",
        help=f"make a plan that a server or tool can run: {', '.join(SERVERS)} (ties what it "
        "fuses, and uses only configurations that it has)",
    )


def add_row_options(sub: argparse.ArgumentParser) -> None:
    """Add the options for plans of high-impact rows."""
    rows = "high-impact rows"
    sub.add_argument(
        "--low-bits", type=int, default=2, help=f"{rows}: bits of the other rows, 2 or 3 (2)"
    )
    sub.add_argument(
        "--high-bits",
        type=int,
        default=3,
        help=f"{rows}: their bits, 3, 4 or 16 (3)",
    )
    sub.add_argument(
        "--group-size", type=int, default=128, help=f"{rows}: group size, 128, 64 or 32 (128)"
    )
    sub.add_argument(
        "--loss",
        default="block",
        help=f"{rows}: loss by which ratios are chosen, block (the block's output) or model (all "
        "later blocks; many times as expensive) (block)",
    )
    sub.add_argument(
        "--ratios",
        default="full",
        help=f"{rows}: ratios uniform, diagonal (per matrix) or full (jointly per block) (full)",
    )
    sub.add_argument(
        "--clip",
        action="store_true",
        help=f"{rows}: clip negative eigenvalues of each block's interaction matrix",
    )


def add_start_option(sub: argparse.ArgumentParser) -> None:
    """Add the option for the method whose plan is refined."""
    sub.add_argument(
        "--start",
        metavar="METHOD",
        help=f"refined: the method whose plan is refined ({DEFAULT_START})",
    )


def add_refine_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of a search that refines a plan."""
    sub.add_argument("--budget", required=True, help=BUDGET_HELP)
    add_start_option(sub)
    sub.add_argument(
        "--minutes",
        type=float,
        default=DEFAULT_MINUTES,
        help=f"start no new round after this many minutes ({DEFAULT_MINUTES:g}); a later call "
        "resumes from the last step",
    )
    sub.add_argument(
        "--text",
        help=f"corpus to search on: {corpus_choices()} (that of --calibration)",
    )
    sub.add_argument("--out", type=Path, help="write the plan to a file, for run --plan")
    add_restriction_options(sub)
    add_profile_options(sub)
    add_planning_profile_options(sub)
    sub.set_defaults(method=Refined.name, corpus=None, protocol=None, rank=False)
