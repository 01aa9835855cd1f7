"""Quantize a model by a plan, and save it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lsq_core.errors import InputError, LsqError, translate_resource_errors
from lsq_core.files import resolve_path
from lsq_core.jsontext import json_text
from lsq_core.planning.plan import Plan
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.progress import timed
from lsq_core.provenance import (
    machine,
    run_dependencies,
    versions,
)
from lsq_core.quantization.registry import (
    arithmetic_packages,
    check_choice,
    required_packages,
)
from lsq_core.quantized.manifest import RUN_KEYS, is_quantized_folder, read_manifest
from lsq_core.settings import GridSettings
from lsq_core.stages.evaluate import digest
from lsq_core.stages.model import OpenModel
from lsq_core.stages.plan import calibration_of_plan, plan_identity, with_quantizer
from lsq_core.store.connection import new_id
from lsq_core.table import short_table
from lsq_core.targets import check_folder_target
from lsq_core.units import format_bytes

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, eq=False)
class QuantizedRun:
    """A model quantized by a plan, with the id of its run and its row in the store."""

    run: str
    model: nn.Module
    plan: Plan
    row: dict
    original: OpenModel
    plan_name: str = ""

    def __repr__(self) -> str:
        return short_table(
            f"{self.original.source.name} quantized by {self.plan.quantizer}, run {self.run}",
            {
                "plan": f"{self.plan.method}, {self.plan.bits_per_param:.4f} bits per parameter",
                "linear weights": f"{format_bytes(self.row['measured_bytes'])} measured",
                "whole model": format_bytes(self.row["model_bytes"]),
                "quantized in": f"{self.row['quantize_seconds']:.1f} s",
                "saved to": self.row["saved_to"],
            },
        )

    def save(self, folder: Path | str) -> Path:
        """Save the model, its tokenizer and its plan; return the folder.

        Raises
        ------
        InputError, LsqError
            If the folder contains other files, cannot be written, or the disk is full.
        """
        folder = resolve_path(folder)
        if not _is_saved(folder, self.run):
            check_folder_target(folder)
            _save(self.original, self.model, self.plan, self.run, folder)
        self.row["saved_to"] = str(folder)
        self.original.store.set_saved_folder(self.run, folder)
        return folder


@dataclass(frozen=True)
class RunResult:
    """The result of an evaluation; ``record`` has all figures printed by the command line.

    ``perplexity_full``, ``increase`` and ``kl`` (nats per token) are relative to full precision on
    the same windows; they are None if full precision itself was evaluated.
    """

    record: dict = field(repr=False)

    @property
    def run(self) -> str | None:
        """The run's id in the store, or None for full precision."""
        return self.record.get("run")

    @property
    def perplexity(self) -> float:
        """Perplexity on the corpus with the protocol."""
        return self.record["perplexity"]

    @property
    def perplexity_full(self) -> float | None:
        """Perplexity of the full-precision model on the same windows."""
        return self.record.get("perplexity_full")

    @property
    def increase(self) -> dict | None:
        """Relative increase in perplexity with its 95 % interval."""
        return self.record.get("increase")

    @property
    def kl(self) -> float | None:
        """KL divergence from full precision in nats per token."""
        return self.record.get("kl")

    @property
    def bits_per_param(self) -> float | None:
        """Nominal bits per planned parameter."""
        return self.record.get("bits_per_param")

    @property
    def measured_bytes(self) -> int | None:
        """Bytes of the stored linear weights."""
        return self.record.get("measured_bytes")

    def to_dict(self) -> dict:
        """Return all figures by name, as printed by ``lsq run --json``."""
        return dict(self.record)

    def __repr__(self) -> str:
        increase = self.increase
        return short_table(
            f"Perplexity {self.perplexity:.4f} on {self.record['corpus']}",
            {
                "run": self.run,
                "protocol": f"{self.record['protocol']}, {self.record['tokens']:,} tokens",
                "full precision": self.perplexity_full and f"{self.perplexity_full:.4f}",
                "increase": increase and f"{100 * increase['relative']:+.2f} %",
                "KL divergence": self.kl and f"{self.kl:.5f} nats per token",
                "bits per parameter": self.bits_per_param and f"{self.bits_per_param:.4f} nominal",
                "linear weights": self.measured_bytes
                and f"{format_bytes(self.measured_bytes)} measured",
            },
        )


def quantize_plan(
    model: OpenModel,
    plan: Plan,
    quantizer: str,
    save: Path | str | None = None,
    plan_name: str = "",
    run: str | None = None,
    settings: ProfileSettings | None = None,
) -> QuantizedRun:
    """Quantize by a plan, and save the model to the folder ``save`` if one is given.

    ``run`` is the id of a stored run to which evaluations will be added; ``settings`` name the
    corpus for a calibrated quantizer.

    Raises
    ------
    InputError, LsqError
        If an input is invalid, the plan is for another model, the device has too little memory,
        or the disk is full.
    """
    plan = check_plan(model, plan, quantizer, settings)
    run = run or make_run_id(model, plan, quantizer)
    folder = None if save is None else resolve_path(save)
    if folder is not None and not _is_saved(folder, run):
        check_folder_target(folder)  # fail before the work, not after it
    from lsq_core.quantized.modules import measured_bytes

    quantized, seconds = _quantize(model, plan)
    row = make_run_row(model, plan, measured_bytes(quantized), seconds)
    made = QuantizedRun(run, quantized, plan, row, model, plan_name)
    if folder is not None:
        made.save(folder)
    return made


def check_plan(
    model: OpenModel, plan: Plan, quantizer: str, settings: ProfileSettings | None
) -> Plan:
    """Return the plan for the quantizer, after checking it against the model and quantizer.

    Raises
    ------
    InputError
        If the plan is for another model, or the quantizer cannot store it.
    """
    _check_plan_fits(model, plan)
    check_choice(quantizer, plan.choice, plan.axis)
    return with_quantizer(plan, quantizer, settings or model.default_settings)


def _check_plan_fits(model: OpenModel, plan: Plan) -> None:
    """Raise :class:`InputError` for a plan with matrices that the model does not have."""
    missing = set(plan.matrices) - set(model.info.matrices)
    if missing:
        first = min(matrix.name for matrix in missing)
        raise InputError(
            f"The plan is for another model: {model.source.name} has no matrix {first} of the "
            "plan's shape; make a plan for this model."
        )


def make_run_id(model: OpenModel, plan: Plan, quantizer: str) -> str:
    """Return an id for a new run; a resumed job assigns the same id to the same plan."""
    if model.checkpoint_folder is None:
        return new_id()
    return digest(model.checkpoint_folder.name, plan_identity(plan), quantizer)[:12]


def _is_saved(save: Path, run: str) -> bool:
    """Return whether this run already saved its model to this folder."""
    return is_quantized_folder(save) and read_manifest(save, RUN_KEYS)["run"] == run


@timed("quantize")
def _quantize(model: OpenModel, plan: Plan) -> tuple[nn.Module, float]:
    """Return the quantized model and its seconds, including those saved by cached matrices."""
    from lsq_core.quantization.registry import get_quantizer
    from lsq_core.quantization.task import QuantizationTask
    from lsq_core.quantized.convert import quantize_model
    from lsq_core.quantized.modules import measured_bytes

    loaded = model.loaded
    start_time, saved = time.perf_counter(), model.matrix_cache.saved_seconds
    with translate_resource_errors(loaded.device):
        task = QuantizationTask(
            loaded,
            plan.choice,
            GridSettings(plan.axis, plan.metadata),
            calibration_of_plan(plan),
            plan.rows,
            lambda done, total, name: model.report("quantize", done, total, name),
            model.matrix_cache,
            _quantizer_folder(model, plan),
        )
        quantized = quantize_model(task, get_quantizer(plan.quantizer))
    check_planned_bytes(plan, measured_bytes(quantized))
    seconds = time.perf_counter() - start_time + model.matrix_cache.saved_seconds - saved
    return quantized, seconds


def check_planned_bytes(plan: Plan, measured: int) -> None:
    """Raise :class:`LsqError` unless the measured bytes equal the planned bytes."""
    if measured != plan.planned_bytes:
        raise LsqError(
            f"The quantized model takes {measured} bytes, but {plan.planned_bytes} were planned; "
            "this is a bug in LSQ Explorer, please report it."
        )


def _quantizer_folder(model: OpenModel, plan: Plan) -> Path | None:
    """Return the folder for a quantizer's partial results of this plan, if there is one."""
    if model.checkpoint_folder is None:
        return None
    made_by = run_dependencies(versions(), arithmetic_packages(plan.quantizer))
    made_from = (*plan_identity(plan), plan.quantizer, model.device_and_dtype, made_by)
    return model.checkpoint_folder / f"quantized-{digest(model.info.fingerprint, *made_from)[:16]}"


@timed("save")
def _save(
    model: OpenModel,
    quantized: nn.Module,
    plan: Plan,
    run_id: str,
    folder: Path,
) -> None:
    from lsq_core.quantized.artifact import save_quantized

    model.report("save", 0, 1, f"saving to {folder}")
    manifest = make_manifest(model, plan, run_id)
    size = save_quantized(quantized, model.loaded.tokenizer, manifest, folder, model.loaded.folder)
    model.report("save", 1, 1, f"{format_bytes(size)} on disk")


def make_manifest(model: OpenModel, plan: Plan, run_id: str) -> dict:
    """Return the plan and provenance to save with a quantized model."""
    profile = model.store.profile(plan.profile) if plan.profile else None
    return plan.to_json() | {
        "run": run_id,
        "profile": plan.profile,
        "profile_provenance": profile.provenance if profile else None,
        "source": model.source.name,
        "revision": model.source.revision,
        "fingerprint": model.info.fingerprint,
        "device": model.loaded.device,
        "dtype": model.loaded.dtype,
        "versions": versions(*required_packages([plan.quantizer])),
    }


def make_run_row(model: OpenModel, plan: Plan, measured: int, seconds: float) -> dict:
    """Return a run's row for the store; ``measured`` are the bytes of its planned matrices."""
    where = model.device_and_dtype
    return {
        "fingerprint": model.info.fingerprint,
        "method": plan.method,
        "quantizer": plan.quantizer,
        "measured_bytes": measured,
        "model_bytes": measured + plan.other_bytes,
        "quantize_seconds": seconds,
        "saved_to": None,
        "device": where["device"],
        "machine": machine(where["device"]),
        "dtype": where["dtype"],
        "seed": plan.request.seed,
        "versions": json_text(versions(*required_packages([plan.quantizer]))),
    }
