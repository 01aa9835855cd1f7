"""A checkout of lm-quant-toolkit: file locations, and reading and checking tables."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from lsq_core.bits import LADDER
from lsq_core.errors import InputError

#: Locations of the files that are read, relative to the checkout.
ERRORS = "src/data"
STATISTICS = "data-vis/data/wdist"
OBJECTIVES = "data-vis/data/mxq-objectives.csv"
PLANS = "data-vis/endeavors/boost/data/allot/mxq"
RUNS = "data-vis/endeavors/boost/data/combined.csv"
#: Sensitivities by part; for a key in several files, the first is the reference.
SENSITIVITIES = (
    "data-vis/data/llama-sensitivity.csv",
    "data-vis/data/qnt-mtd-sensi.csv",
    "data-vis/data/variant-sensi.csv",
)
#: Files without a quantizer column; the quantizer was HQQ.
BY_HQQ = (SENSITIVITIES[0], SENSITIVITIES[2])


@dataclass(frozen=True)
class Columns:
    """Columns that a CSV file must have: text, and non-negative integers and real numbers.

    Cells of ``sparse`` (numbers) and ``sparse_text`` may be empty; columns of ``optional`` numbers
    may be missing altogether. Rows with the same ``key`` must be equal; duplicates are dropped.
    """

    key: tuple[str, ...]
    text: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    real: tuple[str, ...] = ()
    sparse: tuple[str, ...] = ()
    sparse_text: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that a file must have."""
        return self.text + self.whole + self.real + self.sparse + self.sparse_text


CONFIG_COLUMNS = ("nbit1", "gsize1", "nbit2", "gsize2")
ERROR_COLUMNS = Columns(
    key=("layer", "module", *CONFIG_COLUMNS),
    text=("module",),
    whole=("layer", *CONFIG_COLUMNS, "params"),
    real=("fnorm",),
    optional=("kurtosis", "sensitivity"),
)
STATISTICS_COLUMNS = Columns(("module", "layer"), ("module",), ("layer",), ("kurtosis",))
SENSITIVITY_COLUMNS = Columns(
    key=("quant_method", "dataset", "part", "model", "nbits", "group_size", "layer"),
    text=("quant_method", "dataset", "part", "model"),
    whole=("nbits", "group_size", "layer"),
    real=("sensitivity",),
)
OBJECTIVE_COLUMNS = Columns(("model", "bpp"), ("model",), (), ("bpp", "fnorm"))
PLAN_COLUMNS = Columns(
    key=("model", "bit_budget", "layer", "module"),
    text=("model", "module"),
    whole=("layer", "b1", "g1", "b2", "g2"),
    real=("bit_budget",),
    optional=("params_all_tot",),
)
#: Perplexity columns, and this project's names for their texts.
PERPLEXITIES = {"ppl_wikitext": "wikitext2", "ppl_c4": "c4"}
RUN_COLUMNS = Columns(
    key=("model", "algo", "config", "bpp", "attempt"),
    text=("model", "algo", "config"),
    real=("bpp",),
    sparse=(*PERPLEXITIES, "load_mem_allot", "model_storage_size", "quant_duration"),
    sparse_text=("attempt",),
)


@dataclass
class Checkout:
    """A checkout of the toolkit, the hashes of the files read from it, and the problems found.

    Raises
    ------
    InputError
        If the folder does not have the toolkit's layout.
    """

    root: Path
    #: SHA-256 by path relative to the root.
    files: dict[str, str] = field(default_factory=dict)
    #: Sentences for the user on what is missing or flawed, in the order found.
    missing: list[str] = field(default_factory=list)
    flawed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        expected = [ERRORS, STATISTICS, *SENSITIVITIES, OBJECTIVES, PLANS, RUNS]
        absent = [path for path in expected if not (self.root / path).exists()]
        if absent or not self.list_files(ERRORS, "fnorm-*.csv"):
            raise InputError(
                f"{self.root} is not a checkout of lm-quant-toolkit: it has no "
                f"{absent[0] if absent else ERRORS + '/fnorm-*.csv'}; give the folder that holds "
                "src and data-vis."
            )

    def list_files(self, folder: str, pattern: str) -> list[str]:
        """Return the matching files of a folder as paths relative to the root, sorted by name."""
        value = sorted((self.root / folder).glob(pattern))
        return [path.relative_to(self.root).as_posix() for path in value]

    def raw(self, path: str) -> pd.DataFrame:
        """Read a file's cells as text, indexed by their row in the file (the header is row 1)."""
        try:
            content = (self.root / path).read_bytes()
            frame = pd.read_csv(io.BytesIO(content), dtype=str, skip_blank_lines=False)
        except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
            reason = " ".join(str(error).split())
            raise InputError(
                f"{self.root / path} cannot be read as CSV ({reason}); fetch it again."
            ) from error
        if not isinstance(frame.index, pd.RangeIndex) or frame.empty:
            what = "no rows" if frame.empty else "rows with more cells than the header"
            raise InputError(f"{self.root / path} has {what}; fetch it again.")
        self.files[path] = hashlib.sha256(content).hexdigest()
        frame.index += 2
        return frame.dropna(how="all")

    def table(self, path: str, columns: Columns, raw: pd.DataFrame | None = None) -> pd.DataFrame:
        """Check a file's columns and convert them to their types; the index is as in :meth:`raw`.

        Raises
        ------
        InputError
            If a column is missing, a numeric cell holds text, a required cell is empty, or two rows
            contradict each other. The message names the file, the row and the remedy.
        """
        raw = self.raw(path) if raw is None else raw
        where = self.root / path
        absent = [name for name in columns.needed if name not in raw]
        if absent:
            raise InputError(
                f"{where} has no column {', '.join(absent)} (row 1 names {', '.join(raw)}); "
                "rename the column, or fetch the file again."
            )
        cells = {name: _check_filled(where, raw[name]) for name in columns.text}
        cells |= {name: raw[name].fillna("") for name in columns.sparse_text}
        for name in columns.whole + columns.real:
            cells[name] = _numbers(where, raw[name], whole=name in columns.whole)
        for name in columns.sparse + columns.optional:
            cells[name] = _numbers(where, raw[name], required=False) if name in raw else np.nan
        return drop_repeated_rows(where, pd.DataFrame(cells, index=raw.index), columns.key)


def _check_filled(where: Path, column: pd.Series) -> pd.Series:
    if column.isna().any():
        row = column.isna().idxmax()
        raise InputError(f"{where}, row {row}: {column.name} is empty; fill it or fetch it again.")
    return column


def _numbers(
    where: Path, column: pd.Series, *, required: bool = True, whole: bool = False
) -> pd.Series:
    """Convert text to non-negative numbers; empty or infinite cells, if allowed, become NaN."""
    numbers = pd.to_numeric(column, errors="coerce").astype(float)
    wrong = (numbers.isna() & column.notna()) | (numbers < 0)
    if required:
        wrong |= ~np.isfinite(numbers)
    if whole:
        wrong |= numbers != numbers.round()
    if wrong.any():
        row = wrong.idxmax()
        value = "empty or NaN" if pd.isna(column[row]) else f"'{column[row]}'"
        kind = "whole number" if whole else "number"
        raise InputError(
            f"{where}, row {row}: {column.name} is {value} instead of a non-negative {kind}; "
            "correct the cell, or fetch the file again."
        )
    return numbers.astype("int64") if whole else numbers.where(np.isfinite(numbers))


def drop_repeated_rows(where: Path, frame: pd.DataFrame, key: Sequence[str]) -> pd.DataFrame:
    """Return the rows without duplicates.

    Raises
    ------
    InputError
        If two rows with the same key differ.
    """
    frame, key = frame.drop_duplicates(), list(key)
    repeated = frame.duplicated(key)
    if repeated.any():
        row = repeated.idxmax()
        first = (frame[key] == frame.loc[row, key]).all(axis=1).idxmax()
        raise InputError(
            f"{where}, row {row}: the same {', '.join(key)} as row {first} but other values; "
            "delete the wrong one of the two, or fetch the file again."
        )
    return frame


def config_names(where: Path, frame: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    """Return the ladder's names (``b3g128``) for configurations in two or four columns."""
    stops = {tuple(asdict(config).values())[: len(columns)]: config.name for config in LADDER}
    names = pd.Series(
        [stops.get(cells, "") for cells in zip(*(frame[c] for c in columns), strict=True)],
        index=frame.index,
    )
    if (names == "").any():
        row = (names == "").idxmax()
        cells = ", ".join(str(frame.loc[row, c]) for c in columns)
        raise InputError(
            f"{where}, row {row}: {', '.join(columns)} = {cells} is not a known configuration; "
            "correct the row, or fetch the file again."
        )
    return names
