"""Published plans and runs: the request, the bits chosen and the results."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lsq_core.bits import LADDER, QuantConfig, find_stop
from lsq_core.errors import InputError
from lsq_core.jsontext import json_text
from lsq_core.model.info import ModelInfo
from lsq_core.planning.plan import Plan
from lsq_core.planning.request import PlanRequest
from lsq_core.profiling.settings import PUBLISHED_SETTINGS
from lsq_core.provenance import now
from lsq_core.reference.checkout import (
    OBJECTIVE_COLUMNS,
    OBJECTIVES,
    PERPLEXITIES,
    PLAN_COLUMNS,
    PLANS,
    RUN_COLUMNS,
    RUNS,
    Checkout,
    config_names,
)
from lsq_core.reference.models import PublishedModel, module_name, profile_key
from lsq_core.store.models import PUBLISHED
from lsq_core.units import GIB

#: This project's method names by the toolkit's.
_METHODS = {
    "sensi-boost": "sensiboost",
    "kurt-boost": "kurtboost",
    "sensi-abl": "sensiboost-ablation",
    "kurt-abl": "kurtboost-ablation",
}
#: The dtype that "fp16" means; the quantized runs computed in it too.
_DTYPE = "float16"


@dataclass(frozen=True)
class _Setting:
    """A request in the toolkit's terms: the algorithm, its variant, and the bits as labelled.

    ``attempt`` is the folder of a plan (``sensi-boost-2-0``, ``mxq1``), or '' if there is none.
    """

    model: str
    algo: str
    config: str
    attempt: str
    bits: float

    @property
    def label(self) -> str:
        """The bits with two decimals: ``3.13``."""
        return f"{self.bits:.2f}"

    @property
    def request(self) -> PlanRequest:
        """The request in this project's terms; methods it doesn't know keep their own names."""
        boost = re.fullmatch(r"(\w+-\w+)-(\d+)-(\d+)", self.attempt)
        if boost and boost[1] in _METHODS:
            stop, top = int(boost[2]), int(boost[3])
            return PlanRequest(_METHODS[boost[1]], self.label, boost_stop=stop, top_m=top)
        if self.algo == "mxq":
            plain = self.attempt.rstrip("0123456789") in ("", "mxq")
            budget = f"{self.bits:g}bpp"
            if find_stop(budget):  # here the toolkit's number, not the stop's size
                budget = f"{self.bits:.3f}bpp"
            return PlanRequest("mxq" if plain else self.attempt, budget=budget)
        return PlanRequest("uniform" if self.algo == "hqq" else self.algo, self.label)

    @property
    def id(self) -> str:
        """An identifier of 12 hexadecimal digits, the same at every import."""
        return _hash(self.model, self.algo, self.config, self.attempt, repr(self.bits))


def _hash(*words: str) -> str:
    return hashlib.sha256("/".join(words).encode()).hexdigest()[:12]


def read_plans(checkout: Checkout) -> tuple[pd.DataFrame, dict[str, int]]:
    """Read every published plan, one row per module, and each model's number of parameters.

    The columns include ``attempt, label, model, layer, module, config, path``; the index is the
    row in the file.
    """
    tables, sizes = [], {}
    for path in checkout.list_files(PLANS, "*/*.csv"):
        where, table = checkout.root / path, checkout.table(path, PLAN_COLUMNS)
        table["config"] = config_names(where, table, ("b1", "g1", "b2", "g2"))
        table["label"] = table["bit_budget"].map("{:.2f}".format)
        tables.append(table.assign(attempt=Path(path).parent.name, path=path))
        for row in table.dropna(subset="params_all_tot").drop_duplicates("model").itertuples():
            size = int(row.params_all_tot)
            if sizes.setdefault(row.model, size) != size:
                raise InputError(
                    f"{where}, row {row.Index}: {row.model} has {size} parameters in "
                    f"params_all_tot and {sizes[row.model]} in another plan; correct one of them, "
                    "or fetch the files again."
                )
    if not tables:
        raise InputError(f"{checkout.root / PLANS} holds no plans; fetch the checkout again.")
    return pd.concat(tables), sizes


def _read_runs(checkout: Checkout) -> pd.DataFrame:
    """Read the table of runs, with each run's :class:`_Setting` in a column."""
    table = checkout.table(RUNS, RUN_COLUMNS)
    settings = zip(*(table[c] for c in ("model", "algo", "config", "attempt", "bpp")), strict=True)
    return table.assign(setting=[_Setting(*words) for words in settings])


def _read_objectives(checkout: Checkout) -> dict[tuple[str, str], float]:
    """Read MXQ's optimal objective, the summed Frobenius error, by model and budget label."""
    table = checkout.table(OBJECTIVES, OBJECTIVE_COLUMNS)
    labels = table["bpp"].map("{:.2f}".format)
    return dict(zip(zip(table["model"], labels, strict=True), table["fnorm"], strict=True))


def _choices(
    checkout: Checkout, models: dict[str, PublishedModel], plans: pd.DataFrame
) -> dict[tuple[str, str, str], dict[str, str]]:
    """Return each plan's configurations by module name, keyed by model, attempt and label."""
    choices = {}
    for (model, attempt, label), rows in plans.groupby(["model", "attempt", "label"]):
        if model not in models:
            continue
        names = map(module_name, rows["layer"], rows["module"])
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
    """Return a run's configurations: uniform for plain HQQ, else as published; None if unknown."""
    if setting.algo == "hqq" and setting.config in {c.name for c in LADDER}:
        return dict.fromkeys((m.name for m in info.matrices), setting.config)
    return choices.get((setting.model, setting.attempt, setting.label))


#: Columns of the table of plans with a plan's size.
_ACCOUNTS = ("bits_per_param", "nominal_bytes", "planned_bytes", "model_bytes")


def _content(setting: _Setting, info: ModelInfo, choice: dict[str, str] | None) -> dict:
    """Return a plan in the form of :meth:`lsq_core.planning.plan.Plan.to_json`.

    If the authors published no plan, it has no modules, and its only size is the bits that it was
    reported under.
    """
    request = setting.request
    if choice is None:
        note = "No plan was published; the bits are the label it was reported under."
        known = {"method": request.method, "base": request.base, "request": request.to_json()}
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
    """Return a sentence if a boost puts modules below its base, which it should only raise.

    One published plan does: ``sensi-boost-3-3``, Llama-2-7b-hf at 3.13, contains an MXQ plan.
    """
    stops = [config.stop_name for config in LADDER]
    if request.method not in _METHODS.values() or request.base not in stops:
        return ()
    base = stops.index(request.base)
    below = sum(LADDER.index(QuantConfig.parse(name)) < base for name in choice.values())
    if not below:
        return ()
    return (
        f"Flawed as published: {below} modules are below the base {request.base}, which a boost "
        "never does, so this is another method's plan.",
    )


def _plan_row(
    setting: _Setting, info: ModelInfo, choice: dict[str, str] | None, published: dict
) -> dict:
    """Return a row of the table ``plans``, with ``published`` in its content under that name."""
    content = _content(setting, info, choice)
    words = {"attempt": setting.attempt or None, "algo": setting.algo, "config": setting.config}
    words |= {"bits_label": setting.bits, "bits_exact": choice is not None}
    calibrated = setting.algo == "mxq"  # the toolkit's name for all mixed plans
    return {
        "id": setting.id,
        "name": "",
        "fingerprint": info.fingerprint,
        "profile": profile_key(info, PUBLISHED_SETTINGS) if calibrated else None,
        "method": content["method"],
        "content": json_text(content | {"published": words | published}),
    } | {account: content[account] for account in _ACCOUNTS}


def _run_row(run: tuple, info: ModelInfo) -> dict:
    """Return a row of the table ``runs``, none of it measured here.

    The only known size is ``model_bytes``, that of the entire model on disk, published in GiB with
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
    """Yield rows of the table ``evaluations``, one per corpus; those of fp16 belong to no run."""
    setting = run.setting
    provenance = _provenance(checkout, run) | {"origin": "published", "dtype": _DTYPE}
    for column, corpus in PERPLEXITIES.items():
        perplexity = getattr(run, column)
        if np.isnan(perplexity):
            name = f"{setting.model} {setting.attempt or setting.algo} at {setting.label}"
            checkout.missing.append(f"{RUNS}, row {run.Index}: {name} has no {column}.")
            continue
        yield {
            "id": _hash(setting.id, corpus),
            "run": None if run.algo == "fp16" else setting.id,
            "fingerprint": info.fingerprint,
            "corpus": corpus,
            # No hash is published; a prefixed name replaces it, which matches no measured one.
            "corpus_sha256": PUBLISHED + corpus,
            "corpus_source": "as published; neither its hash nor its tokens are known",
            "protocol": "strided",
            "perplexity": perplexity,
            "provenance": json_text(provenance),
        }


def _provenance(checkout: Checkout, run: tuple) -> dict:
    return {"file": RUNS, "sha256": checkout.files[RUNS], "row": run.Index}


def outcomes(
    checkout: Checkout, models: dict[str, PublishedModel], plans: pd.DataFrame
) -> dict[str, pd.DataFrame]:
    """Return the rows of the tables ``plans``, ``runs`` and ``evaluations``."""
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
        published[run.setting] = _provenance(checkout, run) | words
    frames = {
        "plans": _plan_frame(checkout, models, plans, published),
        "runs": pd.DataFrame(runs).astype({"model_bytes": "Int64"}),
        "evaluations": pd.DataFrame(evaluations),
    }
    return {name: frame.assign(created=now()) for name, frame in frames.items()}


def _plan_frame(
    checkout: Checkout,
    models: dict[str, PublishedModel],
    plans: pd.DataFrame,
    published: dict[_Setting, dict],
) -> pd.DataFrame:
    """Return the plan of every run, and the plans that were never run."""
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
