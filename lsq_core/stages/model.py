"""An open model: its files, weights and tokenizer, each loaded once."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from lsq_core.corpus.registry import load_corpus
from lsq_core.corpus.tokens import build_token_stream
from lsq_core.errors import InputError, translate_resource_errors
from lsq_core.evaluation.protocol import EvaluationRequest
from lsq_core.model.dtypes import config_dtype, torch_name
from lsq_core.model.identity import ModelIdentity, compute_identity, identify, with_source
from lsq_core.model.info import ModelInfo
from lsq_core.model.source import BUILT_IN, ModelSource, find_model, read_demo_description
from lsq_core.planning.problem import Problem
from lsq_core.profiling.settings import PUBLISHED_SETTINGS, ProfileSettings
from lsq_core.progress import Clock, ProgressCallback, ignore_progress, timed
from lsq_core.provenance import (
    DeviceAndDtype,
    device_kind,
)
from lsq_core.store.models import PUBLISHED
from lsq_core.store.store import Store
from lsq_core.units import GIB

if TYPE_CHECKING:
    from lsq_core.corpus.tokens import TokenStream
    from lsq_core.model.loading import LoadedModel
    from lsq_core.profiling.profile import Profile
    from lsq_core.quantization.cache import PackedMatrixCache

#: Default size of the cache of quantized matrices for later plans, in bytes.
DEFAULT_CACHE_BYTES = GIB


@dataclass(eq=False)
class OpenModel:
    """A model and its description, with weights loaded when they are first needed.

    ``source`` may be a name or folder, and ``store`` the path of a database (None for the default
    one). A job gives a ``checkpoint_folder`` for intermediate results, from which it resumes if
    interrupted and restarted. Matrices quantized for one plan are cached for later plans, up to
    ``cache_bytes``, on the model's device.
    """

    source: ModelSource | str | Path = "demo"
    store: Store | str | Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    report: ProgressCallback = ignore_progress
    checkpoint_folder: Path | None = None
    cache_bytes: int = DEFAULT_CACHE_BYTES
    clock: Clock = field(default_factory=Clock, init=False)
    #: Whether all weights are in memory.
    is_loaded: bool = field(default=False, init=False)
    problems: dict[object, Problem] = field(default_factory=dict, init=False)
    profiles: dict[ProfileSettings, Profile] = field(default_factory=dict, init=False)
    _streams: dict[EvaluationRequest, TokenStream] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.source, ModelSource):
            self.source = ModelSource(str(self.source))
        if not isinstance(self.store, Store):
            self.store = Store(self.store)

    @cached_property
    def published(self) -> ModelInfo | None:
        """The published model named by the source, without weights, or None."""
        return find_published(self.source, self.store)

    @property
    def default_settings(self) -> ProfileSettings:
        """The profile settings used if none are given.

        For a built-in model they are those of its shipped profile, if it was imported, and for a
        published model those of the published measurements.
        """
        if self.published:
            return PUBLISHED_SETTINGS
        if self.source.name in BUILT_IN:
            for settings in self.store.shipped_profiles(self.info.fingerprint).values():
                return ProfileSettings(**settings)
        return ProfileSettings()

    def fits_in_memory(self, more_bytes: int = 0) -> bool:
        """Return whether the model and ``more_bytes`` fit in free memory; True once loaded."""
        if self.is_loaded:
            return True
        import torch

        from lsq_core.model.loading import free_bytes

        where = self.device_and_dtype
        size = self.info.parameters * getattr(torch, where["dtype"]).itemsize
        return size + more_bytes <= free_bytes(torch.device(where["device"]))

    def need_weights(self) -> None:
        """Raise :class:`InputError` for a published model, which has measurements only."""
        if self.published:
            raise InputError(
                f"{self.published.source} has published measurements but no weights, so it can "
                "only be planned for; give a model folder or a Hugging Face id."
            )

    @cached_property
    @timed("load")
    def folder(self) -> Path:
        """The model's local folder; a remote model is fetched."""
        self.need_weights()
        if self.source.is_gguf:
            self.report("load", 0, 1, f"dequantizing {self.source.name}")
        elif not self.source.is_local:
            self.report("load", 0, 1, f"fetching {self.source.name}")
        return find_model(self.source)

    @cached_property
    def config_info(self) -> ModelInfo:
        """The model's description from its config alone, to reject impossible requests early.

        For a remote model that is not known yet, only the config is fetched.
        """
        if self.published or self.source.is_local:
            return self.info
        from lsq_core.model.loading import inspect_model

        return find_model_info(self.source, self.store) or inspect_model(self.source)

    @cached_property
    @timed("load")
    def info(self) -> ModelInfo:
        """The model's description with its fingerprint; a remote model is fetched."""
        if self.published:
            return self.published
        identity = identify(self.source) if self.source.is_gguf else None
        identity = identity or compute_identity(self.folder, self.source.trust_remote_code)
        info = self.store.model(identity.fingerprint) or read_demo_description(self.source)
        if info is None:
            from lsq_core.model.loading import inspect_model

            info = inspect_model(self.source)
        info = replace(with_source(info, self.source, identity), fingerprint=identity.fingerprint)
        self.store.save_model(info)
        return info

    @cached_property
    @timed("load")
    def loaded(self) -> LoadedModel:
        """The model with its weights."""
        self.need_weights()
        from lsq_core.model.loading import load_model

        self.report("load", 0, 1, f"loading {self.source.name}")
        with translate_resource_errors(self.device):
            loaded = load_model(self.source, self.device, self.dtype)
        self.store.save_model(loaded.info)
        self.report("load", 1, 1, f"loaded on {loaded.device} in {loaded.dtype}")
        self._report_notes(loaded)
        self.is_loaded = True
        return loaded

    @cached_property
    @timed("load")
    def streamed(self) -> LoadedModel:
        """The model with its weights left in their files; loaded if it cannot be streamed."""
        self.need_weights()
        from lsq_core.model.streaming import NotStreamable, open_streamed

        try:
            with translate_resource_errors(self.device):
                streamed = open_streamed(self.source, self.device, self.dtype)
        except NotStreamable as reason:
            self.report("load", 0, 1, f"{reason}, so the whole model is loaded")
            return self.loaded
        self.store.save_model(streamed.info)
        where = f"on {streamed.device} in {streamed.dtype}"
        self.report("load", 1, 1, f"read one decoder block at a time, {where}")
        self._report_notes(streamed)
        return streamed

    def _report_notes(self, loaded: LoadedModel) -> None:
        from lsq_core.model.loading import slow_dtype_note

        slow = slow_dtype_note(loaded.device, loaded.dtype)
        for note in (*loaded.info.notes, *([slow] if slow else [])):
            self.report("note", 0, 1, note)

    @cached_property
    @timed("load")
    def device_and_dtype(self) -> dict[str, str]:
        """The device and dtype that the model computes with; needs no weights."""
        from lsq_core.model.loading import model_config, pick_device, pick_dtype

        device, config = pick_device(self.device), model_config(self.source, self.folder)
        dtype = torch_name(pick_dtype(self.dtype, device, config))
        return {"device": str(device), "dtype": dtype}

    @cached_property
    @timed("load")
    def tokenizer(self) -> object:
        """The model's tokenizer; needs no weights."""
        from lsq_core.model.loading import load_tokenizer

        return load_tokenizer(self.source, self.folder)

    @timed("read text")
    def stream(self, request: EvaluationRequest) -> TokenStream:
        """Return the tokens that a request evaluates on, loaded once."""
        if request not in self._streams:
            self.report("evaluate", 0, 1, f"reading {request.corpus}")
            self._streams[request] = load_tokens(request, self.tokenizer)
        return self._streams[request]

    def provide_stream(self, request: EvaluationRequest, stream: TokenStream) -> None:
        """Use these tokens for a request, which were already read from its corpus."""
        self._streams.setdefault(request, stream)

    def unload(self) -> None:
        """Release the weights; they are loaded again when needed."""
        for name in ("loaded", "streamed", "matrix_cache"):
            vars(self).pop(name, None)
        self.is_loaded = False

    @cached_property
    def matrix_cache(self) -> PackedMatrixCache:
        """The matrices quantized so far."""
        from lsq_core.quantization.cache import PackedMatrixCache

        return PackedMatrixCache(self.cache_bytes)


def find_published(source: ModelSource, store: Store) -> ModelInfo | None:
    """Return the published model named by a source (``published:NAME`` or ``NAME``), or None.

    ``NAME`` alone refers to a local folder if one has that name.

    Raises
    ------
    InputError
        If ``published:NAME`` was never imported.
    """
    if source.is_local:
        return None
    name = source.name.removeprefix(PUBLISHED)
    known = store.model(PUBLISHED + name)
    if known is None and source.name.startswith(PUBLISHED):
        there = sorted(store.models(origin="published")["source"])
        raise InputError(
            f"{store.path} has no published measurements of '{name}'; "
            + (
                f"choose one of {', '.join(there)}."
                if there
                else "run import-reference to import them."
            )
        )
    return known


def known_identity(source: ModelSource, store: Store) -> ModelIdentity | None:
    """Return the identity of a source's model from its files, else from the store, or None.

    Raises as :func:`lsq_core.model.identity.identify`.
    """
    record = identify(source)
    if record is not None or source.is_local:
        return record
    named = store.find_model_by_name(source.name, source.revision)
    return None if named is None else ModelIdentity(*named)


def find_model_info(source: ModelSource, store: Store) -> ModelInfo | None:
    """Return the stored description of a source's model, with the source as its name, or None.

    If the model's files are not available, it is the model last seen under this name and revision.
    Raises as :func:`lsq_core.model.identity.identify`.
    """
    identity = known_identity(source, store)
    record = store.model(identity.fingerprint) if identity else None
    return None if record is None else with_source(record, source, identity)


def resolve_device_and_dtype(
    info: ModelInfo, device: str = "auto", dtype: str = "auto"
) -> DeviceAndDtype:
    """Return the kind of device and the dtype that loading chooses for a requested pair.

    torch is not imported if the answer is the CPU in its default dtype.
    """
    if device == "auto" and not _may_have_gpu():
        device = "cpu"
    if device_kind(device) == "cpu" and dtype == "auto":
        return DeviceAndDtype("cpu", "float32")
    from lsq_core.model.loading import pick_device, pick_dtype

    target = pick_device(device)
    chosen = pick_dtype(dtype, target, SimpleNamespace(dtype=config_dtype(info.config)))
    return DeviceAndDtype(target.type, torch_name(chosen))


def _may_have_gpu() -> bool:
    """Return whether there may be a GPU, so that importing torch to ask is worthwhile."""
    if "torch" in sys.modules or sys.platform != "linux":
        return True
    drivers = ("nvidia[0-9]*", "kfd", "dxg")
    return any(any(Path("/dev").glob(pattern)) for pattern in drivers)


def load_tokens(request: EvaluationRequest, tokenizer: object) -> TokenStream:
    """Load the tokens that a request evaluates on."""
    return build_token_stream(
        load_corpus(request.corpus, request.split), tokenizer, request.max_tokens
    )
