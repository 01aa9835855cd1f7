"""Find a model, identify it by its content, and describe it, all without importing torch.

Loading weights and inspecting modules is in :mod:`lsq_core.model.loading`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from lsq_core import hub, paths
from lsq_core.errors import InputError, LsqError, exception_reason
from lsq_core.files import cached_sha256, translate_disk_error, write_bytes
from lsq_core.model import gguf
from lsq_core.model.checkpoint import INDEX, check_not_quantized, read_entries, read_index
from lsq_core.model.info import Matrix, ModelInfo
from lsq_core.model.sizes import find_excessive_count
from lsq_core.untrusted import check_links, read_json_object

#: The model that ships with the project.
DEMO_FOLDER = paths.RESOURCES / "data" / "demo_model"

#: Models that are available by a short name.
BUILT_IN = (gguf.SMOLLM2, "demo")
#: Files downloaded from a repository: safetensors weights, and the small text files beside them.
_DOWNLOAD_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
#: Files that describe a model: its config, a quantizer's config, and the index of its weights.
_CONFIG_PATTERNS = ["config.json", "*quant*.json", INDEX]
#: Subfolders of a repository, and a second copy of the weights that some contain.
_IGNORE_PATTERNS = ["*/*", "consolidated*.safetensors"]
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
#: The file that marks a folder as a quantized model saved by this project.
MANIFEST_FILE = "lsq.json"
#: The file beside the demo model that stores its description, as
#: :func:`lsq_core.model.loading.inspect_model` would return it.
_DESCRIPTION_FILE = "description.json"
#: Longest model name that an error message quotes in full.
_MAX_SHOWN_CHARS = 120
#: Keys of config.json that don't affect what the model computes.
_VOLATILE_CONFIG_KEYS = ("_name_or_path", "transformers_version")


def built_in_models() -> list[str]:
    """Return the built-in models that are installed, SmolLM2 first."""
    return [name for name in BUILT_IN if name != gguf.SMOLLM2 or gguf.smollm2_file()]


def default_model() -> str:
    """Return the app's initial model: ``LSQ_MODEL``, else SmolLM2 if installed, else the demo."""
    return os.environ.get("LSQ_MODEL") or (gguf.SMOLLM2 if gguf.smollm2_file() else "demo")


@dataclass(frozen=True)
class ModelSource:
    """The source of a model.

    ``name`` is ``demo``, ``smollm2``, a local folder or GGUF file, or a Hugging Face id;
    ``revision`` is a branch, tag or commit of the latter. Paths are made absolute, so that they
    don't depend on the working directory. Remote code and pickled weights are off by default.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        path = self.local_path
        if path is not None and self.name not in BUILT_IN:
            object.__setattr__(self, "name", str(path))

    @property
    def is_gguf(self) -> bool:
        """Whether it names a GGUF file."""
        return gguf.is_gguf(self.name)

    @property
    def is_local(self) -> bool:
        """Whether it names a built-in model or a path rather than a Hugging Face id."""
        return self.local_path is not None

    @property
    def local_folder(self) -> Path | None:
        """The folder it names, resolved, or None for a Hugging Face id or a GGUF file."""
        return None if self.is_gguf else self.local_path

    @property
    def local_path(self) -> Path | None:
        """The folder or GGUF file it names, resolved, or None for a Hugging Face id.

        A path that is recognizable as such need not exist.
        """
        if self.name == "demo":
            return DEMO_FOLDER
        if self.name == gguf.SMOLLM2:
            return gguf.smollm2_file() or Path(gguf.SMOLLM2)
        looks_like_path = (
            self.is_gguf or self.name.startswith((".", "/", "~")) or self.name.count("/") > 1
        )
        try:
            path = Path(self.name).expanduser()
            return path.resolve() if looks_like_path or path.is_dir() else None
        except (OSError, ValueError, RuntimeError):
            return None  # not a path: too long, a null byte, an unknown user's home


def find_model(source: ModelSource) -> Path:
    """Return the folder with the model's files, downloading or dequantizing them if needed.

    Raises
    ------
    InputError
        If the model does not exist, is gated, or its folder has no usable weights.
    LsqError
        If the model can neither be downloaded nor found in the local cache.
    """
    if source.is_gguf:
        return gguf.dequantize(gguf.find_file(source.name))
    folder = source.local_folder
    if folder is None:
        patterns = _DOWNLOAD_PATTERNS + (["*.bin"] if source.allow_pickle else [])
        if source.trust_remote_code:
            patterns.append("*.py")
        folder = Path(
            _download_from_hub(
                source,
                "snapshot_download",
                allow_patterns=patterns,
                ignore_patterns=_IGNORE_PATTERNS,
            )
        )
    check_model_folder(folder, source)
    return folder


def find_config(source: ModelSource) -> Path:
    """Return the folder with the model's ``config.json``; remote weights are not downloaded.

    It also contains the small files that describe the weights, and the model's own code if that is
    trusted. Raises the same errors as :func:`find_model`.
    """
    if source.is_gguf:
        return find_model(source)
    folder = source.local_folder
    if folder is None:
        patterns = [*_CONFIG_PATTERNS, *(["*.py"] if source.trust_remote_code else [])]
        found = _download_from_hub(
            source, "snapshot_download", allow_patterns=patterns, ignore_patterns=_IGNORE_PATTERNS
        )
        folder = Path(found)
        if not (folder / "config.json").is_file():
            raise InputError(f"'{source.name}' has no config.json, so it is not a model to load.")
    check_config(folder)
    return folder


def cached_folder(source: ModelSource) -> Path | None:
    """Return the folder of a Hugging Face model in the local cache, None if it is incomplete."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source.name, "config.json", revision=source.revision)
    except HFValidationError:
        return None
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    try:
        check_model_folder(folder, source)
    except InputError:
        return None  # only its config was downloaded, or some of its weights are missing
    return folder


def remote_file_bytes(source: ModelSource) -> int:
    """Return the bytes of a Hugging Face model's safetensors files on the hub, 0 if unknown."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(
            source.name, revision=source.revision, files_metadata=True, timeout=hub.TIMEOUT_S
        )
    except Exception as error:
        if not hub.is_network_error(error):
            raise
        return 0
    names = [s for s in info.siblings or [] if s.rfilename.endswith(".safetensors")]
    return sum(s.size or 0 for s in names)


def _download_from_hub(source: ModelSource, function: str, **kwargs: object) -> str:
    """Call a download function of ``huggingface_hub`` and translate its errors."""
    import huggingface_hub
    from huggingface_hub import errors

    name = source.name if len(source.name) <= _MAX_SHOWN_CHARS else source.name[:60] + "…"
    where = f"'{name}'" + (f" at revision '{source.revision}'" if source.revision else "")
    if source.name.lower() == "demo":
        raise InputError(f"There is no model {where}; the built-in one is 'demo'.")
    try:
        kwargs["local_files_only"] = not hub.is_reachable(source.name, source.revision)
        return getattr(huggingface_hub, function)(source.name, revision=source.revision, **kwargs)
    except errors.HFValidationError as error:
        raise InputError(
            f"{where} is neither a local folder nor a Hugging Face id such as org/name."
        ) from error
    except errors.GatedRepoError as error:
        raise InputError(
            f"{where} is gated: accept its terms on its Hugging Face page, then set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{where} does not exist: the model has no such revision.") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{where} does not exist on Hugging Face, or is private: check the spelling, or set "
            "HF_TOKEN if it is yours."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise LsqError(
            f"{where} is not in the local cache and Hugging Face cannot be reached: check the "
            "network, or give a local folder or 'demo'."
        ) from error
    except errors.EntryNotFoundError as error:
        raise InputError(f"{where} has no config.json, so it is not a model to load.") from error
    except Exception as error:
        if not hub.is_network_error(error):
            raise
        reason = exception_reason(error)
        raise translate_disk_error(error) or LsqError(
            f"{where} could not be downloaded: {reason}."
        ) from error


def read_config(folder: Path) -> dict:
    """Read the folder's ``config.json``.

    Raises
    ------
    InputError
        If it cannot be read as a JSON object, or is implausibly large.
    """
    return read_json_object(folder / "config.json")


def check_config(folder: Path, saved: bool = False) -> None:
    """Raise :class:`InputError` unless the folder exists and describes an unquantized model.

    ``saved`` also accepts a quantized model saved by this project.
    """
    try:
        exists = folder.is_dir()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(folder)[:60]}… cannot be a model folder: {reason}.") from error
    if not exists:
        raise InputError(f"There is no folder {folder}; give a model folder or a Hugging Face id.")
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is not a model folder: it has no config.json.{_gguf_hint(folder)}"
        )
    if (folder / MANIFEST_FILE).is_file() and not saved:
        raise InputError(
            f"{folder} is a quantized model that LSQ Explorer saved; evaluate it with eval, or "
            "give the full-precision model it was made from."
        )
    check_links(folder)
    config = read_config(folder)
    if large := find_excessive_count(config):  # building it would take forever
        raise InputError(f"In {folder / 'config.json'} {large}, more than any model has.")
    check_not_quantized(folder, config)


def _gguf_hint(folder: Path) -> str:
    """Return a hint to give the file instead if a folder contains GGUF files, else ''."""
    files = sorted(folder.glob("*.gguf"))
    return f" Give the GGUF file itself: {files[0]}" if files else ""


def check_model_folder(folder: Path, source: ModelSource) -> None:
    """Raise :class:`InputError` unless the folder has a config and complete weight files."""
    check_config(folder)
    weights = weight_files(folder)
    if not weights:
        raise InputError(
            f"{folder} has no weights: no .safetensors file is in it.{_gguf_hint(folder)}"
        )
    if weights[0].suffix != ".safetensors":
        if not source.allow_pickle:
            raise InputError(
                f"{folder} holds only pickled weights ({weights[0].name}), which can run code "
                "when opened; convert them to safetensors, or allow pickle if you trust them."
            )
        return
    read_entries(folder, weights)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files under a folder, without following links."""
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file())


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a model's weights, in name order.

    These are the files in the index if there is one, else ``model.safetensors``, else all
    safetensors files, else pickled ones. (Some repositories contain the same weights twice.)

    Raises
    ------
    InputError
        If the index is damaged, or names a file that is missing or outside the folder.
    """
    named = read_index(folder)
    if named is not None:
        return sorted(folder / name for name in set(named.values()))
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    return sorted(folder.glob("*.safetensors")) or _pickled_files(folder)


def _pickled_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in _PICKLE_SUFFIXES)


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 of a model's config and the content of its weight files.

    It has 64 hexadecimal digits and does not depend on the folder's location.
    """
    config = {k: v for k, v in read_config(folder).items() if k not in _VOLATILE_CONFIG_KEYS}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in weight_files(folder):
        digest.update(f"{path.name}:{_file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _file_sha256(path: Path) -> str:
    """Return a file's content hash; blobs in a Hugging Face cache are already named by theirs."""
    target = path.resolve()
    if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name
    return cached_sha256(target)


# --- the demo model's description -------------------------------------------------------------


def write_description(info: ModelInfo, folder: Path) -> None:
    """Save a model's description beside its files, without config, tokenizer, code and notes."""
    content = asdict(info) | {"matrices": [list(asdict(m).values()) for m in info.matrices]}
    for name in ("config", "tokenizer", "code", "notes"):
        del content[name]
    text = json.dumps(content, separators=(",", ":"))
    write_bytes(folder / _DESCRIPTION_FILE, (text.replace("],", "],\n") + "\n").encode("utf8"))


def read_demo_description(source: ModelSource) -> ModelInfo | None:
    """Read the demo model's description; None for any other model, or if its files were changed.

    Building the model from its config would import torch, which the first page can't wait for.
    """
    path = DEMO_FOLDER / _DESCRIPTION_FILE
    if source.local_folder != DEMO_FOLDER or not path.is_file():
        return None
    content = json.loads(path.read_text("utf8"))
    content["matrices"] = tuple(Matrix(*fields) for fields in content["matrices"])
    content["left_out"] = tuple(content["left_out"])
    info = ModelInfo(**content | {"source": source.name, "config": read_config(DEMO_FOLDER)})
    return info if info.fingerprint == fingerprint(DEMO_FOLDER) else None
