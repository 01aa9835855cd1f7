"""Published models, with the weight error, kurtosis and sensitivity of each module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path

import pandas as pd

from lsq_core.bits import DETECTION_CONFIG, LADDER
from lsq_core.corpus.registry import BUILT_IN_CORPORA, corpus_identity
from lsq_core.errors import InputError
from lsq_core.model.info import Matrix, ModelInfo
from lsq_core.profiling.profile import Profile
from lsq_core.profiling.settings import PUBLISHED_SETTINGS, ProfileSettings
from lsq_core.quantization.registry import MATRIX_QUANTIZERS
from lsq_core.reference.checkout import (
    BY_HQQ,
    CONFIG_COLUMNS,
    ERROR_COLUMNS,
    ERRORS,
    SENSITIVITIES,
    SENSITIVITY_COLUMNS,
    STATISTICS,
    STATISTICS_COLUMNS,
    Checkout,
    config_names,
    drop_repeated_rows,
)
from lsq_core.store.models import PUBLISHED

#: Fine-tuned variants with only published sensitivities, and the model with the same shapes.
_VARIANTS = {
    "Llama-2-7b-chat-hf": "Llama-2-7b-hf",
    "meditron-7b": "Llama-2-7b-hf",
    "Meta-Llama-3-8B-Instruct": "Meta-Llama-3-8B",
}

_Q, _K, _V, _O = (f"self_attn.{name}_proj" for name in "qkvo")
_GATE, _UP, _DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
#: Module types in computation order.
_TYPES = (_Q, _K, _V, _O, _GATE, _UP, _DOWN)
#: Module types that share a part's score (method §2).
_PARTS = {
    "attn_in": (_Q, _K, _V),
    "attn_out": (_O,),
    "mlp_gate": (_GATE, _UP),
    "mlp_down": (_DOWN,),
}

#: This project's names of texts by the toolkit's, where they differ.
_CORPORA = {"wikitext": "wikitext2"}


# --- models ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PublishedModel:
    """A published model and its scores, except those in the files of sensitivities."""

    name: str
    info: ModelInfo
    #: Rows of scores: kurtosis, weight error, and the sensitivity behind its published plans.
    scores: pd.DataFrame
    files: tuple[str, ...] = ()


_SCORES = ("module", "layer", "type", "metric", "config", "part", "value")


def read_models(checkout: Checkout, sizes: dict[str, int]) -> dict[str, PublishedModel]:
    """Read a model from each file of weight errors."""
    models = {}
    for path in checkout.list_files(ERRORS, "fnorm-*.csv"):
        raw, name = checkout.raw(path), Path(path).stem.removeprefix("fnorm-")
        if "model_type" in raw:
            checkout.missing.append(f"{path} is of a vision model, not of a language model.")
            continue
        models[name] = _read_model(checkout, path, name, raw, sizes.get(name))
    return models


def _read_model(
    checkout: Checkout, path: str, name: str, raw: pd.DataFrame, size: int | None
) -> PublishedModel:
    where, table = checkout.root / path, checkout.table(path, ERROR_COLUMNS, raw)
    table["config"] = config_names(where, table, CONFIG_COLUMNS)
    once = ["layer", "module", "params", "kurtosis", "sensitivity"]
    modules = drop_repeated_rows(where, table[once], ("layer", "module"))
    _check_complete(where, table, modules)
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
            f"{info.source}: no plan file gives the model's total size, so embeddings, norms and "
            "head are left unknown, and its parameters and model bytes count linear weights only."
        )
    scores = _model_scores(checkout, path, info, table, modules)
    return PublishedModel(name, info, scores, tuple(files))


def _model_scores(
    checkout: Checkout, path: str, info: ModelInfo, table: pd.DataFrame, modules: pd.DataFrame
) -> pd.DataFrame:
    """Return weight errors, and kurtosis and sensitivity if every module has them."""
    scores = [_rows(table, "weight_error", table["fnorm"], table["config"])]
    if modules["kurtosis"].notna().all():
        scores.append(_rows(modules, "kurtosis", modules["kurtosis"]))
    known = modules["sensitivity"].notna()
    if known.all():
        parts, config = _parts_of(info, modules["type"]), DETECTION_CONFIG.name
        scores.append(_rows(modules, "sensitivity", modules["sensitivity"], config, parts))
    else:
        checkout.missing.append(
            f"{path} has the sensitivity of {known.sum()} of {len(known)} modules, so the "
            "scores behind the model's published plans are unknown."
        )
    return pd.concat(scores, ignore_index=True)


def _check_complete(where: Path, table: pd.DataFrame, modules: pd.DataFrame) -> None:
    """Raise :class:`InputError` if a module lacks configurations or has an impossible size."""
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
            f"{where}, row {row}: params is {modules.loc[row, 'params']}, which is not a multiple "
            "of 128; correct the cell, or fetch the file again."
        )


def _add_kurtosis(checkout: Checkout, name: str, modules: pd.DataFrame) -> list[str]:
    """Fill in the kurtosis from the weight statistics; return the file used, if any."""
    path = f"{STATISTICS}/wdist-{name}.csv"
    if not (checkout.root / path).is_file():
        return []
    table = checkout.table(path, STATISTICS_COLUMNS).set_index(["layer", "module"])["kurtosis"]
    there = pd.MultiIndex.from_frame(modules[["layer", "type"]])
    modules["kurtosis"] = table.reindex(there).to_numpy()
    return [path]


def _matrices(where: Path, modules: pd.DataFrame) -> tuple[Matrix, ...]:
    """Return the matrices with shapes inferred from their numbers of weights.

    If q and o have hidden² weights, every other matrix has the hidden size on one side. Otherwise a
    matrix is treated as rows of 128: its size is right, but its shape is not known.
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
        Matrix(module_name(row.layer, row.type), row.layer, row.type, *shape(row.type, row.params))
        for row in modules.itertuples()
    )


def module_name(layer: int, kind: str) -> str:
    return f"model.layers.{layer}.{kind}"


def _info(name: str, matrices: tuple[Matrix, ...], size: int | None) -> ModelInfo:
    """Return a model's info from the files; unknown numbers are 0."""
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
        config={
            "unknown": ["context"] + ([] if size else ["parameters other than the linear ones"])
        },
    )


def _rows(
    table: pd.DataFrame,
    metric: str,
    value: pd.Series,
    config: pd.Series | str = "",
    part: pd.Series | str = "",
) -> pd.DataFrame:
    """Return scores in the columns of a profile; ``table`` has ``layer`` and ``type``."""
    module = "model.layers." + table["layer"].astype(str) + "." + table["type"]
    rows = table[["layer", "type"]].assign(module=module, metric=metric, config=config, part=part)
    return rows.assign(value=value)[list(_SCORES)]


def _parts_of(info: ModelInfo, types: pd.Series) -> pd.Series:
    """Return the part of each type's score; with grouped queries, ``o`` joins q, k and v."""
    part_of = {kind: part for part, kinds in _PARTS.items() for kind in kinds}
    numel = {m.type: m.numel for m in info.matrices}
    if numel.get(_K) != numel.get(_Q):
        part_of[_O] = "attn_in"
    return types.map(part_of).fillna("")


# --- sensitivities and profiles ---------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Sensitivities:
    """One file's part scores for one model, calibration text and quantizer."""

    path: str
    model: str
    dataset: str
    quantizer: str
    #: Columns ``part, layer, config, sensitivity``.
    rows: pd.DataFrame


def _read_sensitivities(checkout: Checkout) -> Iterator[_Sensitivities]:
    for path in SENSITIVITIES:
        raw = checkout.raw(path)
        if path in BY_HQQ:
            raw = raw.assign(quant_method="hqq")
        table = checkout.table(path, SENSITIVITY_COLUMNS, raw)
        table["config"] = config_names(checkout.root / path, table, ("nbits", "group_size"))
        unknown = ~table["part"].isin(_PARTS)
        if unknown.any():
            row = unknown.idxmax()
            raise InputError(
                f"{checkout.root / path}, row {row}: '{table.loc[row, 'part']}' is not a part; "
                f"it has to be one of {', '.join(_PARTS)}."
            )
        for (model, dataset, method), rows in table.groupby(["model", "dataset", "quant_method"]):
            corpus = _CORPORA.get(dataset, dataset)
            yield _Sensitivities(path, model, corpus, method, rows)


def read_profiles(checkout: Checkout, models: dict[str, PublishedModel]) -> list[Profile]:
    """Return all profiles; variants are added to ``models``."""
    found: dict[tuple[str, str, str], _Sensitivities | None] = {
        (name, PUBLISHED_SETTINGS.calibration, PUBLISHED_SETTINGS.quantizer): None
        for name in models
    }
    for group in _read_sensitivities(checkout):
        if group.model not in models and _VARIANTS.get(group.model) in models:
            models[group.model] = _variant(checkout, group.model, models[_VARIANTS[group.model]])
        if group.model not in models or group.quantizer not in MATRIX_QUANTIZERS:
            unknown_name = (
                group.quantizer if group.model in models else f"the shape of {group.model}"
            )
            checkout.missing.append(
                f"{group.path}: {group.model} on {group.dataset} with {group.quantizer} is left "
                f"out, since {unknown_name} is not known here."
            )
            continue
        # Later files with the same key become separate profiles; the reference has the plain name.
        key = (group.model, group.dataset, group.quantizer)
        apart = f"{group.dataset}@{Path(group.path).stem}"
        found[key if found.get(key) is None else (group.model, apart, group.quantizer)] = group
    return [
        _profile(checkout, models[model], calibration, quantizer, group)
        for (model, calibration, quantizer), group in found.items()
    ]


def _variant(checkout: Checkout, name: str, base: PublishedModel) -> PublishedModel:
    """Return a fine-tuned model with no scores of its own; tuning keeps the shapes."""
    info = _info(name, base.info.matrices, None)
    checkout.missing.append(
        f"{info.source}: only sensitivities are published; its shapes are those of {base.name}, "
        "and embeddings, norms and head are left unknown."
    )
    return PublishedModel(name, info, base.scores.iloc[:0])


def _profile(
    checkout: Checkout,
    model: PublishedModel,
    calibration: str,
    quantizer: str,
    group: _Sensitivities | None,
) -> Profile:
    """Return the profile of what is published for one calibration text and quantizer."""
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
        # The figures behind the published plans take precedence over those in another file.
        values = pd.concat([own, scores[~scores["config"].isin(taken)]], ignore_index=True)
    missing += _describe_missing(model.info.source, settings, values)
    checkout.missing += missing
    return Profile(
        id=profile_key(model.info, settings),
        fingerprint=model.info.fingerprint,
        settings=settings,
        matrices=model.info.matrices,
        values=values,
        provenance={
            "origin": "published",
            "corpus": calibration.partition("@")[0],
            "corpus_source": "as published; neither its texts nor its tokens are known",
            "settings": settings.to_json(),
            "files": {path: checkout.files[path] for path in files},
            "missing": missing,
        },
    )


def profile_key(info: ModelInfo, settings: ProfileSettings) -> str:
    """Return a profile's key, computed as for measured profiles if the corpus is known here."""
    known = settings.calibration in BUILT_IN_CORPORA
    corpus = corpus_identity(settings.calibration) if known else settings.calibration
    return settings.key(info.fingerprint, corpus)


def _part_scores(info: ModelInfo, group: _Sensitivities) -> tuple[pd.DataFrame, list[str]]:
    """Return part scores as scores of modules, and sentences about configurations left out."""
    kinds = pd.DataFrame([(p, k) for p, ks in _PARTS.items() for k in ks], columns=["part", "type"])
    rows = group.rows.merge(kinds, on="part")
    # With grouped queries the authors skip attn_out and give o the score of attn_in.
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


def _describe_missing(source: str, settings: ProfileSettings, values: pd.DataFrame) -> list[str]:
    """Describe what a profile lacks, entirely or at some configurations, if anything."""
    stops = [config.name for config in LADDER]
    missing_parts = []
    for metric, configs in (("kurtosis", [""]), ("weight_error", stops), ("sensitivity", stops)):
        there = set(values.loc[values["metric"] == metric, "config"])
        absent = [config for config in configs if config not in there]
        if absent:
            at = "" if len(absent) == len(configs) else f" at {', '.join(absent)}"
            missing_parts.append(f"no {metric}{at}")
    profile = f"{source} on {settings.calibration} with {settings.quantizer}"
    return [f"{profile} has {' and '.join(missing_parts)}."] if missing_parts else []
