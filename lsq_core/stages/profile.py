"""Load profiles from the store, or measure and save them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from lsq_core.bits import EXTENDED, PAPER
from lsq_core.corpus.registry import corpus_identity
from lsq_core.errors import InputError, translate_resource_errors
from lsq_core.model.info import ModelInfo
from lsq_core.profiling.metrics import METRICS, get_metric, weight_metrics
from lsq_core.profiling.profile import Profile, missing_metrics
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.progress import timed
from lsq_core.provenance import (
    DeviceAndDtype,
    profile_dependencies,
    versions,
)
from lsq_core.quantization.registry import (
    arithmetic_packages,
    quantizer_spec,
)
from lsq_core.stages.model import OpenModel, resolve_device_and_dtype
from lsq_core.store.store import Store


def profile_key(
    info: ModelInfo, settings: ProfileSettings, device_and_dtype: DeviceAndDtype | None = None
) -> str:
    """Return the identity of a model's profile under given settings, whether or not it exists.

    ``device_and_dtype`` is where it is measured, by default this machine's choice.

    Raises
    ------
    InputError
        If the calibration corpus is unknown.
    """
    corpus, required_packages = (
        corpus_identity(settings.calibration),
        arithmetic_packages(settings.quantizer),
    )
    device_and_dtype = device_and_dtype or resolve_device_and_dtype(info)
    made_with = profile_dependencies(
        device_and_dtype, versions(*required_packages), required_packages
    )
    return settings.key(info.fingerprint, corpus, info.tokenizer, info.code, made_with)


def find_profile_key(
    store: Store,
    info: ModelInfo,
    settings: ProfileSettings,
    device_and_dtype: DeviceAndDtype | None = None,
) -> str:
    """Return :func:`profile_key` after migrating a profile stored under its older identity.

    The older identity did not include place and versions; its profile is moved to the new one only
    if the recorded provenance matches this place and these versions. If the calibration text is not
    available, return the key of the shipped profile with these settings.
    """
    device_and_dtype = device_and_dtype or resolve_device_and_dtype(info)
    try:
        key = profile_key(info, settings, device_and_dtype)
    except InputError:
        shipped = store.find_shipped_profile(info.fingerprint, settings.to_json())
        if shipped is None:
            raise
        return shipped
    required_packages = arithmetic_packages(settings.quantizer)
    wanted = profile_dependencies(device_and_dtype, versions(*required_packages), required_packages)

    def same(recorded: dict) -> bool:
        made_by = recorded.get("versions") or {}
        return (
            profile_dependencies(DeviceAndDtype.from_record(recorded), made_by, required_packages)
            == wanted
        )

    older = settings.key(info.fingerprint, corpus_identity(settings.calibration))
    store.rekey_profile(older, key, same)
    return key


def model_profile_key(model: OpenModel, settings: ProfileSettings) -> str:
    """Return the identity of this model's profile under these settings."""
    device_and_dtype = resolve_device_and_dtype(model.info, model.device, model.dtype)
    return find_profile_key(model.store, model.info, settings, device_and_dtype)


def find_profile(model: OpenModel, settings: ProfileSettings) -> Profile | None:
    """Return the stored or published profile with these settings, or None."""
    if model.published:
        kept = model.store.profiles(model.published.fingerprint)
        same = [ProfileSettings(**json.loads(text)) == settings for text in kept["settings"]]
        return model.store.profile(kept["id"][same.index(True)]) if any(same) else None
    return model.store.profile(model_profile_key(model, settings))


def measure_here(
    model: OpenModel, settings: ProfileSettings, metrics: Sequence[str]
) -> Iterator[Profile]:
    """Measure metrics in this process, starting with those that depend on weights alone."""
    key = model_profile_key(model, settings)
    alone = [metric for metric in metrics if metric in weight_metrics()]
    others = [metric for metric in metrics if metric not in alone]
    for stage, part in (("weights", alone), ("profile", others)):
        if part:
            yield measure_metrics(model, settings, key, part, stage)


#: Measures metrics that a profile lacks, and yields each part when it is done.
Measurer = Callable[[OpenModel, ProfileSettings, Sequence[str]], Iterable[Profile]]


@timed("profile")
def profile_model(
    model: OpenModel,
    settings: ProfileSettings,
    metrics: Sequence[str] = (),
    measure: Measurer = measure_here,
) -> Profile:
    """Return the profile with the default and given metrics, measuring and saving missing ones.

    Each part yielded by ``measure`` is saved at once, so that it can be viewed while the rest is
    measured. If the profile exists, only its missing metrics are measured, so an interrupted one is
    completed; a published profile is returned as it is.

    Raises
    ------
    InputError, LsqError
        If a metric is unknown, the model or the calibration corpus is not available, or a
        weight is not finite.
    """
    for name in metrics:
        _check_measurable(name, settings.quantizer)
    found = find_profile(model, settings)
    if model.published:
        if found is None:
            raise InputError(_missing_profile_message(model.published, settings, model.store))
        return found
    missing = missing_metrics(found, metrics)
    if not missing:
        model.report("profile", 1, 1, "already stored")
        return found
    for measured in measure(model, settings, missing):
        merge_profile(model, measured)
    return find_profile(model, settings)


def planning_profile(
    model: OpenModel,
    settings: ProfileSettings,
    metrics: Sequence[str],
    measure: Measurer = measure_here,
) -> Profile:
    """Return a stored profile with these metrics to plan from; else as :func:`profile_model`.

    If the stored one has them, default metrics that the plan doesn't use are not measured.
    """
    found = find_planning_profile(model, settings, metrics)
    if found is None:
        return profile_model(model, settings, metrics, measure)
    model.report("profile", 1, 1, "already stored")
    return found


def find_planning_profile(
    model: OpenModel, settings: ProfileSettings, metrics: Sequence[str] = ()
) -> Profile | None:
    """Return the stored profile to plan from if one has these metrics, else None.

    A profile of the extended ladder includes the scores of the paper's ladder. A session with an
    explicit dtype falls back on the profile in the default dtype (float32 on a CPU) if that in its
    own is missing or lacks metrics: the dtype changes scores only by rounding, and a profile takes
    much longer than the evaluation that the dtype is meant to speed up. The plan records the
    profile, and the run its own dtype.
    """
    found = find_profile(model, settings)
    if found is None and settings.ladder == PAPER and not model.published:
        found = find_profile(model, replace(settings, ladder=EXTENDED))
    if found is not None and set(metrics) <= set(found.metrics):
        return found
    usual = resolve_device_and_dtype(model.info, model.device)
    if model.published or resolve_device_and_dtype(model.info, model.device, model.dtype) == usual:
        return None
    kept = model.store.profile(find_profile_key(model.store, model.info, settings, usual))
    return kept if kept is not None and set(metrics) <= set(kept.metrics) else None


def _check_measurable(name: str, quantizer: str) -> None:
    """Raise :class:`InputError` if a metric is unknown or the quantizer lacks its configuration."""
    metric, spec = get_metric(name), quantizer_spec(quantizer)
    absent = [] if metric.by_config else [c for c in metric.configs if c not in spec.configs]
    if absent:
        raise InputError(
            f"{metric.title} is measured at {absent[0].name}, which {spec.title} doesn't have; "
            "plan with a profile by hqq or rtn (--profile-quantizer)."
        )


def merge_profile(model: OpenModel, measured: Profile) -> None:
    """Add metrics to the stored profile, or save a new profile."""
    model.store.merge_profile(measured)
    model.profiles.clear()  # cached ones may lack metrics, or be of another dtype
    names = ", ".join(measured.metrics)
    model.report("store", 1, 1, f"{names} stored in profile {measured.id}")


def measure_metrics(
    model: OpenModel,
    settings: ProfileSettings,
    key: str,
    metrics: Sequence[str],
    stage: str,
    layers: Collection[int] | None = None,
) -> Profile:
    """Measure a profile with only these metrics, without saving it.

    ``key`` is the profile's id, and ``layers`` the layers to score, by default all.
    """
    from lsq_core.profiling.measure import measure_profile

    whole = model.is_loaded or any(METRICS[m].needs_full_model for m in metrics)
    loaded = model.loaded if whole else model.streamed
    for metric in metrics:
        if note := METRICS[metric].cost_note(loaded.info, settings.block_tokens):
            model.report("note", 1, 1, note)
    with translate_resource_errors(loaded.device):
        return measure_profile(
            loaded,
            settings,
            key,
            lambda done, total, message: model.report(stage, done, total, message),
            metrics,
            layers,
        )


def _missing_profile_message(info: ModelInfo, settings: ProfileSettings, store: Store) -> str:
    """Return an error message listing the profiles that a published model has instead."""
    kept = [ProfileSettings(**json.loads(s)) for s in store.profiles(info.fingerprint)["settings"]]
    there = sorted({f"{s.calibration} ({s.quantizer}, axis {s.axis})" for s in kept})
    if settings.ladder != PAPER:
        return (
            f"The measurements of {info.source} were published for the paper's ladder alone; plan "
            "without --ladder."
        )
    return (
        f"{info.source} has no published profile on {settings.calibration} ({settings.quantizer}, "
        f"axis {settings.axis}, {settings.metadata} metadata, {settings.samples} samples of "
        f"{settings.block_tokens} tokens); choose one of {', '.join(there)}, and leave the other "
        "settings out."
    )
