"""Find a model, know it by its content, and describe it; none of this imports torch.

Loading weights and walking the modules is in :mod:`lsq_core.model.loading`.
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

#: The models that a name alone stands for.
BUILT_IN = (gguf.SMOLLM2, "demo")
#: What a repository is asked for: weights as safetensors, and the small text files beside them.
_DOWNLOAD_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
#: What says what a model is: its config, what a quantizer said of it, and the index of its weights.
_CONFIG_PATTERNS = ["config.json", "*quant*.json", INDEX]
#: Folders inside a repository, and a second copy of the weights that some carry.
_IGNORE_PATTERNS = ["*/*", "consolidated*.safetensors"]
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
#: The file that marks a folder as a quantized model saved by this project.
MANIFEST_FILE = "lsq.json"
#: The file beside the embedded model that says of it what
#: :func:`lsq_core.model.loading.inspect_model` does.
_DESCRIPTION_FILE = "description.json"
#: Characters of a model's name that a message quotes.
_MAX_SHOWN_CHARS = 120
#: Keys of config.json that say nothing about what the model computes.
_VOLATILE_CONFIG_KEYS = ("_name_or_path", "transformers_version")


def built_in_models() -> list[str]:
    """The built-in models that are here, the real one first."""
    return [name for name in BUILT_IN if name != gguf.SMOLLM2 or gguf.smollm2_file()]


def default_model() -> str:
    """The model that the app opens with: ``LSQ_MODEL``, else SmolLM2 where it is installed."""
    return os.environ.get("LSQ_MODEL") or (gguf.SMOLLM2 if gguf.smollm2_file() else "demo")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    ``name`` is ``demo``, ``smollm2``, a local folder or GGUF file, or a Hugging Face id;
    ``revision`` a branch, tag or commit of the latter. A path becomes absolute, so that it means
    the same from every working directory. Remote code and pickled weights are off unless turned on
    knowingly.
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

        A file need not be there, as a folder needn't.
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
            return None  # no path at all: too long, a null byte, the home of nobody


def find_model(source: ModelSource) -> Path:
    """The local folder with the model's files; a Hugging Face id is downloaded or found cached.

    Raises
    ------
    InputError
        When there is no such model, it is gated, or its folder holds no usable weights.
    LsqError
        When the network cannot be reached and the model is not in the local cache.
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
    """The folder with the model's ``config.json``; no weights of a remote model are fetched.

    Beside it are the small files that say what the weights are, and the model's own code where
    that is trusted. Raises as :func:`find_model`.
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
    """The folder of a Hugging Face model in the local cache, whole; None where it isn't."""
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
        return None  # only its config was fetched, or not all of its weights
    return folder


def remote_file_bytes(source: ModelSource) -> int:
    """Bytes of a Hugging Face model's weight files, from the hub's listing, or 0 if unknown."""
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
    """The folder's ``config.json``.

    Raises
    ------
    InputError
        When it cannot be read as a JSON object, or is larger than any.
    """
    return read_json_object(folder / "config.json")


def check_config(folder: Path, saved: bool = False) -> None:
    """Raise :class:`InputError` unless the folder is there and describes a model we can plan.

    With ``saved`` it is one that was quantized and saved here.
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
    if large := find_excessive_count(config):  # it would be built for ever
        raise InputError(f"In {folder / 'config.json'} {large}, more than any model has.")
    check_not_quantized(folder, config)


def _gguf_hint(folder: Path) -> str:
    """Which file to give instead of a folder that holds GGUF files."""
    files = sorted(folder.glob("*.gguf"))
    return f" Give the GGUF file itself: {files[0]}" if files else ""


def check_model_folder(folder: Path, source: ModelSource) -> None:
    """Raise :class:`InputError` unless the folder holds a config and whole weight files."""
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
    """Bytes of all files under a folder, what links point to not counted twice."""
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file())


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights, in name order.

    They are those that the index names, or ``model.safetensors``, or every safetensors file
    (some repositories carry the same weights a second time), or else pickled ones.

    Raises
    ------
    InputError
        When the index is damaged or names a file that is not there, or not in the folder.
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
    """SHA-256 over what the model computes: its config and the content of its weight files.

    The same weights have the same fingerprint wherever they lie. 64 hexadecimal digits.
    """
    config = {k: v for k, v in read_config(folder).items() if k not in _VOLATILE_CONFIG_KEYS}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in weight_files(folder):
        digest.update(f"{path.name}:{_file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _file_sha256(path: Path) -> str:
    """Content hash of a file; a Hugging Face cache already names its blobs by theirs."""
    target = path.resolve()
    if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name
    return cached_sha256(target)


# --- the embedded model's description ---------------------------------------------------------


def write_description(info: ModelInfo, folder: Path) -> None:
    """Keep what is known of a model beside its files, its config left out."""
    content = asdict(info) | {"matrices": [list(asdict(m).values()) for m in info.matrices]}
    for name in ("config", "tokenizer", "code", "notes"):
        del content[name]
    text = json.dumps(content, separators=(",", ":"))
    write_bytes(folder / _DESCRIPTION_FILE, (text.replace("],", "],\n") + "\n").encode("utf8"))


def read_demo_description(source: ModelSource) -> ModelInfo | None:
    """The embedded model as it was described; None for another, or when its files were changed.

    Building it from its config would import torch, for which the first page does not wait.
    """
    path = DEMO_FOLDER / _DESCRIPTION_FILE
    if source.local_folder != DEMO_FOLDER or not path.is_file():
        return None
    content = json.loads(path.read_text("utf8"))
    content["matrices"] = tuple(Matrix(*fields) for fields in content["matrices"])
    content["left_out"] = tuple(content["left_out"])
    info = ModelInfo(**content | {"source": source.name, "config": read_config(DEMO_FOLDER)})
    return info if info.fingerprint == fingerprint(DEMO_FOLDER) else None
