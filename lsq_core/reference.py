"""Published measurements: what the authors of [A] and [B] measured, beside what is measured here.

:func:`import_reference` reads a checkout of their toolkit (github.com/schnell18/lm-quant-toolkit)
into the store. A model comes without weights, as ``published:NAME``: it can be looked at, planned
for and compared, never run. Every figure keeps the file it came from; where a file lacks
something, the import says so and offers nothing in its place.
"""

from __future__ import annotations

import hashlib
import io
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from math import isqrt
from pathlib import Path

import numpy as np
import pandas as pd

from lsq_core.config import DETECTION_CONFIG, GIB, LADDER, QuantConfig
from lsq_core.corpus import BUILT_IN, corpus_identity
from lsq_core.errors import InputError
from lsq_core.jsontext import json_text
from lsq_core.model import Matrix, ModelInfo
from lsq_core.pipeline import PUBLISHED_SETTINGS, Report, silent
from lsq_core.plan import Plan, PlanRequest
from lsq_core.profile import Profile, ProfileSettings
from lsq_core.provenance import now
from lsq_core.quantize import QUANTIZERS
from lsq_core.store import PUBLISHED, Store

#: Where the toolkit keeps what is read, under the checkout.
_ERRORS = "src/data"
_STATISTICS = "data-vis/data/wdist"
_OBJECTIVES = "data-vis/data/mxq-objectives.csv"
_PLANS = "data-vis/endeavors/boost/data/allot/mxq"
_RUNS = "data-vis/endeavors/boost/data/combined.csv"
#: Sensitivities by part; of two files with the same key the first is the reference.
_SENSITIVITIES = (
    "data-vis/data/llama-sensitivity.csv",
    "data-vis/data/qnt-mtd-sensi.csv",
    "data-vis/data/variant-sensi.csv",
)
#: Those without a column for the quantizer, which was HQQ.
_BY_HQQ = (_SENSITIVITIES[0], _SENSITIVITIES[2])

#: Fine-tuned variants of which only sensitivities are published: the model of the same shapes.
_VARIANTS = {
    "Llama-2-7b-chat-hf": "Llama-2-7b-hf",
    "meditron-7b": "Llama-2-7b-hf",
    "Meta-Llama-3-8B-Instruct": "Meta-Llama-3-8B",
}

_Q, _K, _V, _O = (f"self_attn.{name}_proj" for name in "qkvo")
_GATE, _UP, _DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
#: Module types in the order of the computation.
_TYPES = (_Q, _K, _V, _O, _GATE, _UP, _DOWN)
#: The module types that share a part's score (method §2).
_PARTS = {
    "attn_in": (_Q, _K, _V),
    "attn_out": (_O,),
    "mlp_gate": (_GATE, _UP),
    "mlp_down": (_DOWN,),
}

#: The toolkit's words for what this project has a word for.
_METHODS = {
    "sensi-boost": "sensiboost",
    "kurt-boost": "kurtboost",
    "sensi-abl": "sensiboost-ablation",
    "kurt-abl": "kurtboost-ablation",
}
_CORPORA = {"wikitext": "wikitext2"}
#: What "fp16" stands for; the quantized runs computed in it too.
_DTYPE = "float16"
_PERPLEXITIES = {"ppl_wikitext": "wikitext2", "ppl_c4": "c4"}


# --- CSV files ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """What a CSV file must have: text, and whole and real numbers from 0 up.

    Cells of ``sparse`` (numbers) and ``sparse_text`` may be empty; a column of ``optional`` numbers
    may be missing altogether. Rows of one ``key`` have one content; the same row twice counts once.
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
        """The columns that a file cannot be without."""
        return self.text + self.whole + self.real + self.sparse + self.sparse_text


_CONFIG = ("nbit1", "gsize1", "nbit2", "gsize2")
_ERROR_COLUMNS = Columns(
    key=("layer", "module", *_CONFIG),
    text=("module",),
    whole=("layer", *_CONFIG, "params"),
    real=("fnorm",),
    optional=("kurtosis", "sensitivity"),
)
_STATISTICS_COLUMNS = Columns(("module", "layer"), ("module",), ("layer",), ("kurtosis",))
_SENSITIVITY_COLUMNS = Columns(
    key=("quant_method", "dataset", "part", "model", "nbits", "group_size", "layer"),
    text=("quant_method", "dataset", "part", "model"),
    whole=("nbits", "group_size", "layer"),
    real=("sensitivity",),
)
_OBJECTIVE_COLUMNS = Columns(("model", "bpp"), ("model",), (), ("bpp", "fnorm"))
_PLAN_COLUMNS = Columns(
    key=("model", "bit_budget", "layer", "module"),
    text=("model", "module"),
    whole=("layer", "b1", "g1", "b2", "g2"),
    real=("bit_budget",),
    optional=("params_all_tot",),
)
_RUN_COLUMNS = Columns(
    key=("model", "algo", "config", "bpp", "attempt"),
    text=("model", "algo", "config"),
    real=("bpp",),
    sparse=(*_PERPLEXITIES, "load_mem_allot", "model_storage_size", "quant_duration"),
    sparse_text=("attempt",),
)


@dataclass
class Checkout:
    """A folder of the toolkit, the hash of every file read from it, and what it turned out to lack.

    Raises
    ------
    InputError
        When the folder has not the toolkit's layout.
    """

    root: Path
    #: Path under the root to SHA-256.
    files: dict[str, str] = field(default_factory=dict)
    #: Sentences for the person, in the order they came up.
    missing: list[str] = field(default_factory=list)
    flawed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        wanted = [_ERRORS, _STATISTICS, *_SENSITIVITIES, _OBJECTIVES, _PLANS, _RUNS]
        absent = [path for path in wanted if not (self.root / path).exists()]
        if absent or not self.under(_ERRORS, "fnorm-*.csv"):
            raise InputError(
                f"{self.root} is not a checkout of lm-quant-toolkit: it has no "
                f"{absent[0] if absent else _ERRORS + '/fnorm-*.csv'}; give the folder that holds "
                "src and data-vis."
            )

    def under(self, folder: str, pattern: str) -> list[str]:
        """The files of a folder that match, as paths under the root, in name order."""
        found = sorted((self.root / folder).glob(pattern))
        return [path.relative_to(self.root).as_posix() for path in found]

    def raw(self, path: str) -> pd.DataFrame:
        """A file's cells as text; the index is the row in the file, the header being row 1."""
        try:
            content = (self.root / path).read_bytes()
            frame = pd.read_csv(io.BytesIO(content), dtype=str, skip_blank_lines=False)
        except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
            reason = " ".join(str(error).split())
            raise InputError(
                f"{self.root / path} cannot be read as CSV ({reason}); fetch it again."
            ) from error
        if not isinstance(frame.index, pd.RangeIndex) or frame.empty:
            what = "no rows" if frame.empty else "rows of more cells than its header"
            raise InputError(f"{self.root / path} has {what}; fetch it again.")
        self.files[path] = hashlib.sha256(content).hexdigest()
        frame.index += 2
        return frame.dropna(how="all")

    def table(self, path: str, columns: Columns, raw: pd.DataFrame | None = None) -> pd.DataFrame:
        """A file's columns in their types, checked; the index as in :meth:`raw`.

        Raises
        ------
        InputError
            Naming the file, the row and what to do, for a column that is missing, text where a
            number belongs, a required cell that is empty, or two rows that contradict each other.
        """
        raw = self.raw(path) if raw is None else raw
        where = self.root / path
        absent = [name for name in columns.needed if name not in raw]
        if absent:
            raise InputError(
                f"{where} has no column {', '.join(absent)} (row 1 names {', '.join(raw)}); "
                "rename the column, or fetch the file again."
            )
        cells = {name: _filled(where, raw[name]) for name in columns.text}
        cells |= {name: raw[name].fillna("") for name in columns.sparse_text}
        for name in columns.whole + columns.real:
            cells[name] = _numbers(where, raw[name], whole=name in columns.whole)
        for name in columns.sparse + columns.optional:
            cells[name] = _numbers(where, raw[name], required=False) if name in raw else np.nan
        return distinct(where, pd.DataFrame(cells, index=raw.index), columns.key)


def _filled(where: Path, column: pd.Series) -> pd.Series:
    if column.isna().any():
        row = column.isna().idxmax()
        raise InputError(f"{where}, row {row}: {column.name} is empty; fill it or fetch it again.")
    return column


def _numbers(
    where: Path, column: pd.Series, *, required: bool = True, whole: bool = False
) -> pd.Series:
    """Text as numbers from 0 up; where they aren't required, an empty or infinite one is NaN."""
    numbers = pd.to_numeric(column, errors="coerce").astype(float)
    wrong = (numbers.isna() & column.notna()) | (numbers < 0)
    if required:
        wrong |= ~np.isfinite(numbers)
    if whole:
        wrong |= numbers != numbers.round()
    if wrong.any():
        row = wrong.idxmax()
        found = "empty or NaN" if pd.isna(column[row]) else f"'{column[row]}'"
        kind = "whole number" if whole else "number"
        raise InputError(
            f"{where}, row {row}: {column.name} is {found} where a {kind} from 0 up belongs; "
            "mend the cell, or fetch the file again."
        )
    return numbers.astype("int64") if whole else numbers.where(np.isfinite(numbers))


def distinct(where: Path, frame: pd.DataFrame, key: Sequence[str]) -> pd.DataFrame:
    """The rows without repetition.

    Raises
    ------
    InputError
        When two rows of the same key differ.
    """
    frame, key = frame.drop_duplicates(), list(key)
    again = frame.duplicated(key)
    if again.any():
        row = again.idxmax()
        first = (frame[key] == frame.loc[row, key]).all(axis=1).idxmax()
        raise InputError(
            f"{where}, row {row}: the same {', '.join(key)} as row {first} but other values; "
            "delete the wrong one of the two, or fetch the file again."
        )
    return frame


def _config_names(where: Path, frame: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    """The ladder's names (``b3g128``) of configurations in two or four columns."""
    stops = {tuple(asdict(config).values())[: len(columns)]: config.name for config in LADDER}
    names = pd.Series(
        [stops.get(cells, "") for cells in zip(*(frame[c] for c in columns), strict=True)],
        index=frame.index,
    )
    if (names == "").any():
        row = (names == "").idxmax()
        cells = ", ".join(str(frame.loc[row, c]) for c in columns)
        raise InputError(
            f"{where}, row {row}: {', '.join(columns)} = {cells} is no stop of the ladder; "
            "mend the row, or fetch the file again."
        )
    return names


# --- models ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Model:
    """A published model: what it is, and what of it depends on no calibration text."""

    name: str
    info: ModelInfo
    #: Rows of scores: kurtosis, weight error, and the sensitivity its published plans came from.
    scores: pd.DataFrame
    files: tuple[str, ...] = ()


_SCORES = ("module", "layer", "type", "metric", "config", "part", "value")


def _read_models(checkout: Checkout, sizes: dict[str, int]) -> dict[str, _Model]:
    """A model for each file of weight errors."""
    models = {}
    for path in checkout.under(_ERRORS, "fnorm-*.csv"):
        raw, name = checkout.raw(path), Path(path).stem.removeprefix("fnorm-")
        if "model_type" in raw:
            checkout.missing.append(f"{path} is of a vision model, not of a language model.")
            continue
        models[name] = _read_model(checkout, path, name, raw, sizes.get(name))
    return models


def _read_model(
    checkout: Checkout, path: str, name: str, raw: pd.DataFrame, size: int | None
) -> _Model:
    where, table = checkout.root / path, checkout.table(path, _ERROR_COLUMNS, raw)
    table["config"] = _config_names(where, table, _CONFIG)
    once = ["layer", "module", "params", "kurtosis", "sensitivity"]
    modules = distinct(where, table[once], ("layer", "module"))
    _check_whole(where, table, modules)
    rank = {kind: i for i, kind in enumerate(_TYPES)}
    modules = modules.assign(rank=modules["module"].map(rank).fillna(len(rank)))
    modules = modules.sort_values(["layer", "rank", "module"]).rename(columns={"module": "type"})
    table = table.rename(columns={"module": "type"})
    files = [path]
    if modules["kurtosis"].isna().any():
        files += _add_kurtosis(checkout, name, modules)
    info = _info(name, _matrices(where, modules), size)
    if size is None:
        checkout.missing.append(
            f"{info.source}: no plan file tells the whole model's size, so embeddings, norms and "
            "head are left unknown, and its parameters and model bytes count linear weights only."
        )
    scores = _own_scores(checkout, path, info, table, modules)
    return _Model(name, info, scores, tuple(files))


def _own_scores(
    checkout: Checkout, path: str, info: ModelInfo, table: pd.DataFrame, modules: pd.DataFrame
) -> pd.DataFrame:
    """Weight error, and kurtosis and sensitivity where every module has them."""
    scores = [_rows(table, "weight_error", table["fnorm"], table["config"])]
    if modules["kurtosis"].notna().all():
        scores.append(_rows(modules, "kurtosis", modules["kurtosis"]))
    known = modules["sensitivity"].notna()
    if known.all():
        parts, config = _parts_of(info, modules["type"]), DETECTION_CONFIG.name
        scores.append(_rows(modules, "sensitivity", modules["sensitivity"], config, parts))
    else:
        checkout.missing.append(
            f"{path} has the sensitivity of {known.sum()} of {len(known)} modules, so what the "
            "model's published plans would be made from is not told."
        )
    return pd.concat(scores, ignore_index=True)


def _check_whole(where: Path, table: pd.DataFrame, modules: pd.DataFrame) -> None:
    """Raise :class:`InputError` when a module lacks configurations that others have."""
    counts = table.groupby(["layer", "module"])["config"].transform("size")
    short = counts < counts.max()
    if short.any():
        row = short.idxmax()
        raise InputError(
            f"{where}, row {row}: {table.loc[row, 'module']} of layer {table.loc[row, 'layer']} "
            f"has {counts[row]} configurations where others have {counts.max()}; the file is cut "
            "off or damaged, fetch it again."
        )
    empty = (modules["params"] == 0) | (modules["params"] % 128 != 0)
    if empty.any():
        row = empty.idxmax()
        raise InputError(
            f"{where}, row {row}: params is {modules.loc[row, 'params']}, which is no multiple of "
            "128; mend the cell, or fetch the file again."
        )


def _add_kurtosis(checkout: Checkout, name: str, modules: pd.DataFrame) -> list[str]:
    """Fill the kurtosis in from the weight statistics; gives the file it came from, if any."""
    path = f"{_STATISTICS}/wdist-{name}.csv"
    if not (checkout.root / path).is_file():
        return []
    table = checkout.table(path, _STATISTICS_COLUMNS).set_index(["layer", "module"])["kurtosis"]
    there = pd.MultiIndex.from_frame(modules[["layer", "type"]])
    modules["kurtosis"] = table.reindex(there).to_numpy()
    return [path]


def _matrices(where: Path, modules: pd.DataFrame) -> tuple[Matrix, ...]:
    """The matrices with their shapes, which the files tell only through their products.

    Where q and o have hidden² weights, every other matrix has the hidden size on one side. Else
    a matrix is taken for rows of 128: its size is right, and its shape is not known.
    """
    by_type = {kind: set(rows) for kind, rows in modules.groupby("type")["params"]}
    square = by_type.get(_Q) == by_type.get(_O) and len(by_type.get(_Q, ())) == 1
    params = next(iter(by_type[_Q])) if square else 0
    hidden = isqrt(params) if isqrt(params) ** 2 == params else 0

    def shape(kind: str, numel: int) -> tuple[int, int]:
        if not hidden or kind not in _TYPES or numel % hidden:
            return numel // 128, 128
        return (hidden, numel // hidden) if kind in (_O, _DOWN) else (numel // hidden, hidden)

    return tuple(
        Matrix(_module(row.layer, row.type), row.layer, row.type, *shape(row.type, row.params))
        for row in modules.itertuples()
    )


def _module(layer: int, kind: str) -> str:
    return f"model.layers.{layer}.{kind}"


def _info(name: str, matrices: tuple[Matrix, ...], size: int | None) -> ModelInfo:
    """What the files tell of a model; 0 stands for what they don't."""
    linear = sum(m.numel for m in matrices)
    return ModelInfo(
        source=PUBLISHED + name,
        revision=None,
        architecture="published measurements",
        layers=1 + max(m.layer for m in matrices),
        context=0,
        parameters=size or linear,
        # The published full precision has 16 bits.
        file_bytes=2 * size if size else 0,
        matrices=matrices,
        other_bytes=2 * (size - linear) if size else 0,
        fingerprint=PUBLISHED + name,
        config={"unknown": ["context"] + ([] if size else ["parameters beside the linear ones"])},
    )


def _rows(
    table: pd.DataFrame,
    metric: str,
    value: pd.Series,
    config: pd.Series | str = "",
    part: pd.Series | str = "",
) -> pd.DataFrame:
    """Scores in the columns of a profile; ``table`` has ``layer`` and ``type``."""
    module = "model.layers." + table["layer"].astype(str) + "." + table["type"]
    rows = table[["layer", "type"]].assign(module=module, metric=metric, config=config, part=part)
    return rows.assign(value=value)[list(_SCORES)]


def _parts_of(info: ModelInfo, types: pd.Series) -> pd.Series:
    """The part that a type's score is of: under grouped queries ``o`` has that of q, k and v."""
    part_of = {kind: part for part, kinds in _PARTS.items() for kind in kinds}
    numel = {m.type: m.numel for m in info.matrices}
    if numel.get(_K) != numel.get(_Q):
        part_of[_O] = "attn_in"
    return types.map(part_of).fillna("")


# --- sensitivities and profiles ---------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Sensitivities:
    """The part scores of one model, calibration text and quantizer in one file."""

    path: str
    model: str
    dataset: str
    quantizer: str
    #: Columns ``part, layer, config, sensitivity``.
    rows: pd.DataFrame


def _read_sensitivities(checkout: Checkout) -> Iterator[_Sensitivities]:
    for path in _SENSITIVITIES:
        raw = checkout.raw(path)
        if path in _BY_HQQ:
            raw = raw.assign(quant_method="hqq")
        table = checkout.table(path, _SENSITIVITY_COLUMNS, raw)
        table["config"] = _config_names(checkout.root / path, table, ("nbits", "group_size"))
        strange = ~table["part"].isin(_PARTS)
        if strange.any():
            row = strange.idxmax()
            raise InputError(
                f"{checkout.root / path}, row {row}: '{table.loc[row, 'part']}' is not a part; "
                f"it has to be one of {', '.join(_PARTS)}."
            )
        for (model, dataset, method), rows in table.groupby(["model", "dataset", "quant_method"]):
            corpus = _CORPORA.get(dataset, dataset)
            yield _Sensitivities(path, model, corpus, method, rows)


def _read_profiles(checkout: Checkout, models: dict[str, _Model]) -> list[Profile]:
    """Every profile; variants are added to ``models``."""
    found: dict[tuple[str, str, str], _Sensitivities | None] = {
        (name, PUBLISHED_SETTINGS.calibration, PUBLISHED_SETTINGS.quantizer): None
        for name in models
    }
    for group in _read_sensitivities(checkout):
        if group.model not in models and _VARIANTS.get(group.model) in models:
            models[group.model] = _variant(checkout, group.model, models[_VARIANTS[group.model]])
        if group.model not in models or group.quantizer not in QUANTIZERS:
            stranger = group.quantizer if group.model in models else f"the shape of {group.model}"
            checkout.missing.append(
                f"{group.path}: {group.model} on {group.dataset} with {group.quantizer} is left "
                f"out, since {stranger} is not known here."
            )
            continue
        # Files that disagree on a key stay apart: the reference has the plain name.
        key = (group.model, group.dataset, group.quantizer)
        apart = f"{group.dataset}@{Path(group.path).stem}"
        found[key if found.get(key) is None else (group.model, apart, group.quantizer)] = group
    return [
        _profile(checkout, models[model], calibration, quantizer, group)
        for (model, calibration, quantizer), group in found.items()
    ]


def _variant(checkout: Checkout, name: str, base: _Model) -> _Model:
    """A fine-tuned model of which only sensitivities are known; tuning keeps the shapes."""
    info = _info(name, base.info.matrices, None)
    checkout.missing.append(
        f"{info.source}: only sensitivities are published; its shapes are those of {base.name}, "
        "and embeddings, norms and head are left unknown."
    )
    return _Model(name, info, base.scores.iloc[:0])


def _profile(
    checkout: Checkout,
    model: _Model,
    calibration: str,
    quantizer: str,
    group: _Sensitivities | None,
) -> Profile:
    """A profile of what is published under one calibration text and quantizer."""
    settings = replace(PUBLISHED_SETTINGS, calibration=calibration, quantizer=quantizer)
    main = settings == PUBLISHED_SETTINGS
    own, missing, files = model.scores, [], list(model.files)
    metrics = {"kurtosis"} | ({"weight_error"} if quantizer == "hqq" else set())
    own = own[own["metric"].isin(metrics | ({"sensitivity"} if main else set()))]
    values = own
    if group is not None:
        files.append(group.path)
        scores, missing = _part_scores(model.info, group)
        taken = set(own.loc[own["metric"] == "sensitivity", "config"])
        # What the published plans were made from wins over the same figure in another file.
        values = pd.concat([own, scores[~scores["config"].isin(taken)]], ignore_index=True)
    missing += _lacks(model.info.source, settings, values)
    checkout.missing += missing
    return Profile(
        id=_key(model.info, settings),
        fingerprint=model.info.fingerprint,
        settings=settings,
        matrices=model.info.matrices,
        values=values,
        provenance={
            "origin": "published",
            "corpus": calibration.partition("@")[0],
            "corpus_source": "as published; neither its texts nor its tokens are told",
            "settings": asdict(settings),
            "files": {path: checkout.files[path] for path in files},
            "missing": missing,
        },
    )


def _key(info: ModelInfo, settings: ProfileSettings) -> str:
    """A profile's identity, found as a measured one's is where the corpus is known here."""
    known = settings.calibration in BUILT_IN
    corpus = corpus_identity(settings.calibration) if known else settings.calibration
    return settings.key(info.fingerprint, corpus)


def _part_scores(info: ModelInfo, group: _Sensitivities) -> tuple[pd.DataFrame, list[str]]:
    """Part scores as scores of modules, and sentences about configurations left out."""
    kinds = pd.DataFrame([(p, k) for p, ks in _PARTS.items() for k in ks], columns=["part", "type"])
    rows = group.rows.merge(kinds, on="part")
    # Under grouped queries the authors skip attn_out and give o the score of attn_in.
    with_out = rows.loc[rows["part"] == "attn_out", "config"].unique()
    shared = group.rows[(group.rows["part"] == "attn_in") & ~group.rows["config"].isin(with_out)]
    rows = pd.concat([rows, shared.assign(type=_O)], ignore_index=True)
    scores = _rows(rows, "sensitivity", rows["sensitivity"], rows["config"], rows["part"])
    names = {m.name for m in info.matrices}
    missing = []
    for config, modules in scores.groupby("config")["module"]:
        if set(modules) != names:
            missing.append(
                f"{info.source}: {group.path} has the sensitivity on {group.dataset} at {config} "
                f"for {len(names & set(modules))} of {len(names)} modules; left out."
            )
            scores = scores[scores["config"] != config]
    return scores, missing


def _lacks(source: str, settings: ProfileSettings, values: pd.DataFrame) -> list[str]:
    """A sentence about what a profile has nowhere, or not at every configuration, if anything."""
    stops = [config.name for config in LADDER]
    lacks = []
    for metric, configs in (("kurtosis", [""]), ("weight_error", stops), ("sensitivity", stops)):
        there = set(values.loc[values["metric"] == metric, "config"])
        absent = [config for config in configs if config not in there]
        if absent:
            at = "" if len(absent) == len(configs) else f" at {', '.join(absent)}"
            lacks.append(f"no {metric}{at}")
    profile = f"{source} on {settings.calibration} with {settings.quantizer}"
    return [f"{profile} has {' and '.join(lacks)}."] if lacks else []


# --- plans and runs -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setting:
    """What was asked for, by the toolkit's words: which algorithm, variant, and bits as labelled.

    ``attempt`` is the folder of a plan (``sensi-boost-2-0``, ``mxq1``), or '' without one.
    """

    model: str
    algo: str
    config: str
    attempt: str
    bits: float

    @property
    def label(self) -> str:
        """The bits as people name them: ``3.13``."""
        return f"{self.bits:.2f}"

    @property
    def request(self) -> PlanRequest:
        """The same by this project's words; methods it doesn't know keep their own names."""
        boost = re.fullmatch(r"(\w+-\w+)-(\d+)-(\d+)", self.attempt)
        if boost and boost[1] in _METHODS:
            stop, top = int(boost[2]), int(boost[3])
            return PlanRequest(_METHODS[boost[1]], self.label, boost_stop=stop, top_m=top)
        if self.algo == "mxq":
            plain = self.attempt.rstrip("0123456789") in ("", "mxq")
            return PlanRequest("mxq" if plain else self.attempt, budget=f"{self.bits:g}bpp")
        return PlanRequest("uniform" if self.algo == "hqq" else self.algo, self.label)

    @property
    def id(self) -> str:
        """The same 12 hexadecimal digits at every import."""
        return _hash(self.model, self.algo, self.config, self.attempt, repr(self.bits))


def _hash(*words: str) -> str:
    return hashlib.sha256("/".join(words).encode()).hexdigest()[:12]


def _read_plans(checkout: Checkout) -> tuple[pd.DataFrame, dict[str, int]]:
    """Every published bit plan, a row a module, and each model's parameters.

    Columns ``attempt, label, model, layer, module, config, path``; ``index`` is the file's row.
    """
    tables, sizes = [], {}
    for path in checkout.under(_PLANS, "*/*.csv"):
        where, table = checkout.root / path, checkout.table(path, _PLAN_COLUMNS)
        table["config"] = _config_names(where, table, ("b1", "g1", "b2", "g2"))
        table["label"] = table["bit_budget"].map("{:.2f}".format)
        tables.append(table.assign(attempt=Path(path).parent.name, path=path))
        for row in table.dropna(subset="params_all_tot").drop_duplicates("model").itertuples():
            size = int(row.params_all_tot)
            if sizes.setdefault(row.model, size) != size:
                raise InputError(
                    f"{where}, row {row.Index}: {row.model} has {size} parameters in "
                    f"params_all_tot and {sizes[row.model]} in another plan; mend the wrong one, "
                    "or fetch the files again."
                )
    if not tables:
        raise InputError(f"{checkout.root / _PLANS} holds no plans; fetch the checkout again.")
    return pd.concat(tables), sizes


def _read_runs(checkout: Checkout) -> pd.DataFrame:
    """The table of runs with its :class:`_Setting` in a column."""
    table = checkout.table(_RUNS, _RUN_COLUMNS)
    settings = zip(*(table[c] for c in ("model", "algo", "config", "attempt", "bpp")), strict=True)
    return table.assign(setting=[_Setting(*words) for words in settings])


def _read_objectives(checkout: Checkout) -> dict[tuple[str, str], float]:
    """MXQ's optimal objective by model and budget label: the summed Frobenius error."""
    table = checkout.table(_OBJECTIVES, _OBJECTIVE_COLUMNS)
    labels = table["bpp"].map("{:.2f}".format)
    return dict(zip(zip(table["model"], labels, strict=True), table["fnorm"], strict=True))


def _choices(
    checkout: Checkout, models: dict[str, _Model], plans: pd.DataFrame
) -> dict[tuple[str, str, str], dict[str, str]]:
    """Model, attempt and label of each published plan to its configurations by module name."""
    choices = {}
    for (model, attempt, label), rows in plans.groupby(["model", "attempt", "label"]):
        if model not in models:
            continue
        names = map(_module, rows["layer"], rows["module"])
        choice = dict(zip(names, rows["config"], strict=True))
        known = {m.name for m in models[model].info.matrices}
        if choice.keys() != known or len(rows) != len(known):
            raise InputError(
                f"{checkout.root / rows['path'].iloc[0]}, row {rows.index[0]}: the plan of "
                f"{model} at {label} does not name each of the model's {len(known)} modules once; "
                "the file is cut off or damaged, fetch it again."
            )
        choices[model, attempt, label] = choice
    return choices


def _choice_of(
    setting: _Setting, info: ModelInfo, choices: dict[tuple[str, str, str], dict[str, str]]
) -> dict[str, str] | None:
    """The configurations of a run, where they are published or, with plain HQQ, all the same."""
    if setting.algo == "hqq" and setting.config in {c.name for c in LADDER}:
        return dict.fromkeys((m.name for m in info.matrices), setting.config)
    return choices.get((setting.model, setting.attempt, setting.label))


#: Accounts of a plan's size that the table of plans keeps.
_ACCOUNTS = ("bits_per_param", "nominal_bytes", "planned_bytes", "model_bytes")


def _content(setting: _Setting, info: ModelInfo, choice: dict[str, str] | None) -> dict:
    """A plan as :meth:`lsq_core.plan.Plan.to_json` gives it.

    Where the authors kept none it has no modules, and of its size only the bits it was reported
    under.
    """
    request = setting.request
    if choice is None:
        note = "No plan was published; the bits are the label it was reported under."
        known = {"method": request.method, "base": request.base, "request": asdict(request)}
        empty = {"modules": {}, "flagged": {}, "notes": [note], "metadata": None, "axis": None}
        return known | empty | dict.fromkeys(_ACCOUNTS) | {"bits_per_param": setting.bits}
    plan = Plan(
        request,
        info.matrices,
        tuple(QuantConfig.parse(choice[m.name]) for m in info.matrices),
        axis=PUBLISHED_SETTINGS.axis,
        base=request.base,
        notes=_flaws(request, choice),
        other_bytes=info.other_bytes,
    )
    return plan.to_json()


def _flaws(request: PlanRequest, choice: dict[str, str]) -> tuple[str, ...]:
    """A sentence where a boost lowers what it should only raise.

    One published plan does: ``sensi-boost-3-3``, Llama-2-7b-hf at 3.13, holds one of MXQ's.
    """
    stops = [config.stop_name for config in LADDER]
    if request.method not in _METHODS.values() or request.base not in stops:
        return ()
    base = stops.index(request.base)
    below = sum(LADDER.index(QuantConfig.parse(name)) < base for name in choice.values())
    if not below:
        return ()
    return (
        f"Flawed as published: {below} modules lie below the base {request.base}, which no boost "
        "does, so this is another method's plan.",
    )


def _plan_row(
    setting: _Setting, info: ModelInfo, choice: dict[str, str] | None, published: dict
) -> dict:
    """A row of the table ``plans``; ``published`` is kept in its content, under that name."""
    content = _content(setting, info, choice)
    words = {"attempt": setting.attempt or None, "algo": setting.algo, "config": setting.config}
    words |= {"bits_label": setting.bits, "bits_exact": choice is not None}
    calibrated = setting.algo == "mxq"  # what the toolkit calls every mixed plan
    return {
        "id": setting.id,
        "name": "",
        "fingerprint": info.fingerprint,
        "profile": _key(info, PUBLISHED_SETTINGS) if calibrated else None,
        "method": content["method"],
        "content": json_text(content | {"published": words | published}),
    } | {account: content[account] for account in _ACCOUNTS}


def _run_row(run: tuple, info: ModelInfo) -> dict:
    """A row of the table ``runs``: nothing of it was measured here.

    Of its bytes only ``model_bytes`` are known: the whole model's on disk, published in GiB with
    two decimals.
    """
    setting, algo, storage = run.setting, run.algo, run.model_storage_size
    return {
        "id": setting.id,
        "plan": setting.id,
        "fingerprint": info.fingerprint,
        "method": setting.request.method,
        "quantizer": "hqq" if algo in ("hqq", "mxq") else algo,
        "model_bytes": None if np.isnan(storage) else round(storage * GIB),
        "quantize_seconds": run.quant_duration,
        "dtype": _DTYPE,
        "origin": "published",
    }


def _evaluation_rows(checkout: Checkout, run: tuple, info: ModelInfo) -> Iterator[dict]:
    """Rows of the table ``evaluations``: one a corpus; fp16's are the model's own."""
    setting = run.setting
    provenance = _place(checkout, run) | {"origin": "published", "dtype": _DTYPE}
    for column, corpus in _PERPLEXITIES.items():
        perplexity = getattr(run, column)
        if np.isnan(perplexity):
            name = f"{setting.model} {setting.attempt or setting.algo} at {setting.label}"
            checkout.missing.append(f"{_RUNS}, row {run.Index}: {name} has no {column}.")
            continue
        yield {
            "id": _hash(setting.id, corpus),
            "run": None if run.algo == "fp16" else setting.id,
            "fingerprint": info.fingerprint,
            "corpus": corpus,
            # No hash is published: the name stands for it and meets no measured one.
            "corpus_sha256": PUBLISHED + corpus,
            "corpus_source": "as published; neither its hash nor its tokens are told",
            "protocol": "strided",
            "perplexity": perplexity,
            "provenance": json_text(provenance),
        }


def _place(checkout: Checkout, run: tuple) -> dict:
    return {"file": _RUNS, "sha256": checkout.files[_RUNS], "row": run.Index}


def _outcomes(
    checkout: Checkout, models: dict[str, _Model], plans: pd.DataFrame
) -> dict[str, pd.DataFrame]:
    """Rows of the tables ``plans``, ``runs`` and ``evaluations``."""
    table, objectives = _read_runs(checkout), _read_objectives(checkout)
    for name in sorted((set(table["model"]) | set(plans["model"])) - models.keys()):
        checkout.missing.append(f"{name}: no file gives its matrices; its runs are left out.")
    published: dict[_Setting, dict] = {}
    runs, evaluations = [], []
    for run in table[table["model"].isin(models)].itertuples():
        info = models[run.model].info
        evaluations += _evaluation_rows(checkout, run, info)
        if run.algo == "fp16":
            continue
        runs.append(_run_row(run, info))
        words = {"load_gib": run.load_mem_allot, "storage_gib": run.model_storage_size}
        if run.setting.request.method == "mxq":
            words["objective"] = objectives.get((run.model, run.setting.label))
        published[run.setting] = _place(checkout, run) | words
    frames = {
        "plans": _plan_frame(checkout, models, plans, published),
        "runs": pd.DataFrame(runs).astype({"model_bytes": "Int64"}),
        "evaluations": pd.DataFrame(evaluations),
    }
    return {name: frame.assign(created=now()) for name, frame in frames.items()}


def _plan_frame(
    checkout: Checkout,
    models: dict[str, _Model],
    plans: pd.DataFrame,
    published: dict[_Setting, dict],
) -> pd.DataFrame:
    """The plan of every run, and those that were never run."""
    choices = _choices(checkout, models, plans)
    settings = dict(published)
    for model, attempt, label in choices:
        config = label.replace(".", "_")  # as the table of runs writes it
        settings.setdefault(_Setting(model, "mxq", config, attempt, float(label)), {})
    rows = []
    for setting, words in settings.items():
        info = models[setting.model].info
        choice = _choice_of(setting, info, choices)
        rows.append(_plan_row(setting, info, choice, words))
        for flaw in _flaws(setting.request, choice or {}):
            where = f"{setting.model}, {setting.attempt} at {setting.label}"
            checkout.flawed.append(f"{where}: {flaw}")
    return pd.DataFrame(rows).astype({"planned_bytes": "Int64", "model_bytes": "Int64"})


# --- the import -----------------------------------------------------------------------------


def import_reference(folder: str | Path, store: Store, report: Report = silent) -> dict:
    """Read a checkout of lm-quant-toolkit and keep it in the place of an earlier import.

    Everything is checked before anything is kept, in one transaction.

    Returns
    -------
    dict
        ``source``; ``counts``, rows by table; ``models`` by name; ``missing``, sentences about
        what the files lack; ``flawed``, about plans that aren't what they claim; ``files``, the
        SHA-256 of each; ``seconds``.

    Raises
    ------
    InputError
        When the folder is no checkout, or a file is damaged: file, row and remedy are named.
    LsqError
        When the database cannot be written.
    """
    began = time.perf_counter()
    checkout = Checkout(Path(folder).expanduser().resolve())
    report("import", 0, 3, "reading plans")
    plans, sizes = _read_plans(checkout)
    report("import", 1, 3, "reading models and profiles")
    models = _read_models(checkout, sizes)
    profiles = _read_profiles(checkout, models)
    report("import", 2, 3, "reading runs")
    rows = _profile_frames(profiles) | _outcomes(checkout, models, plans)
    infos = [model.info for model in models.values()]
    store.replace_published(infos, rows)
    counts = {"models": len(infos), "matrices": sum(len(info.matrices) for info in infos)}
    counts |= {table: len(frame) for table, frame in rows.items()}
    report("import", 3, 3, f"{counts['runs']} runs and {counts['profiles']} profiles")
    return {
        "source": str(checkout.root),
        "counts": counts,
        "models": [info.source for info in infos],
        "missing": checkout.missing,
        "flawed": checkout.flawed,
        "files": checkout.files,
        "seconds": time.perf_counter() - began,
    }


def _profile_frames(profiles: list[Profile]) -> dict[str, pd.DataFrame]:
    """Rows of ``profiles`` and ``scores``; each model's main profile is its newest."""
    created, main = now(), PUBLISHED_SETTINGS
    rows = [
        {
            "id": profile.id,
            "fingerprint": profile.fingerprint,
            "settings": json_text(asdict(profile.settings)),
            "provenance": json_text(profile.provenance),
            "created": created - timedelta(microseconds=i),
            "origin": "published",
        }
        for i, profile in enumerate(sorted(profiles, key=lambda p: p.settings != main))
    ]
    scores = [profile.values.assign(profile=profile.id) for profile in profiles]
    return {"profiles": pd.DataFrame(rows), "scores": pd.concat(scores, ignore_index=True)}
