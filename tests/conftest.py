"""Shared fixtures and helpers: an isolated database, small random models, texts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from math import ceil
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

from lsq_core.bench.start import libraries_import_s
from lsq_core.bits import FP16_BITS, QuantConfig
from lsq_core.reference.importing import import_reference
from lsq_core.store.store import Store

# Keep tests off the network, whatever the machine has cached or is logged in to.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Parallel workers, and the processes that their tests start, use one thread each and wait
# passively, since spinning threads would take cores from the others. Benchmarks run alone, with
# the defaults.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Pages open with the same model on every machine.
os.environ["LSQ_MODEL"] = "demo"

# Examples are the same in every run; HYPOTHESIS_PROFILE=random tries others.
settings.register_profile("same", derandomize=True)
settings.register_profile("random", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT.parent / "shared" / "reference" / "lm-quant-toolkit"
#: Wall-clock seconds to import torch and transformers on the machine for which time limits were
#: set (the README's table; an idle machine, on which the import keeps one core busy throughout).
REFERENCE_IMPORT_S = 2.24
WIKITEXT = ROOT.parent / "shared" / "corpus" / "wikitext-2"


def packed_bytes(numel: int, config: QuantConfig, metadata: str = "8bit") -> int:
    """Compute the size of ``numel`` packed weights by formula: codes, scales, zeros, ranges.

    Two more bytes hold the power of two shared by a matrix's scales or fp16 weights. The 8-bit
    format stores a scale code and a zero code per group, and an fp16 pair for each of the two per
    metadata group; the last metadata group may be short.
    """
    groups = ceil(numel / config.group_size) if config.bits != FP16_BITS else 0
    codes = ceil(numel * config.bits / 8) + 2
    if metadata == "fp16":
        return codes + 4 * groups
    return codes + 2 * groups + 8 * ceil(groups / config.meta_group_size)


@pytest.fixture(autouse=True)
def _isolated_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test away from the user's own database."""
    monkeypatch.setenv("LSQ_DB", str(tmp_path / "lsq.duckdb"))


@pytest.fixture(scope="session")
def slowness() -> float:
    """How many times slower this machine is than the one for which time limits were set.

    At least 1, so that no limit is tightened. It holds for the pinned package versions: other
    versions may take a different time to import.
    """
    return max(1.0, libraries_import_s() / REFERENCE_IMPORT_S)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable], Path]:
    """A function that returns a named folder, filled by the first worker that asks for it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder = base / f"made-{name}"
        complete_marker = folder / "whole"
        with FileLock(base / f"made-{name}.lock"):
            if not complete_marker.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                complete_marker.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def published_database(shared_folder: Callable) -> Path:
    """A database with all published measurements, and the import's summary in ``said.json``.

    Copy it before opening it: only one process at a time can open a database.
    """
    if not REFERENCE.is_dir():
        pytest.skip(f"the published measurements are not at {REFERENCE}")

    def fill(folder: Path) -> None:
        summary = import_reference(REFERENCE, Store(folder / "lsq.duckdb"))
        (folder / "said.json").write_text(json.dumps(summary), "utf8")

    return shared_folder("published", fill) / "lsq.duckdb"


@pytest.fixture(scope="module")
def published(published_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A module's copy of :func:`published_database`, for reading only."""
    return Path(
        shutil.copy(published_database, tmp_path_factory.mktemp("published") / "lsq.duckdb")
    )


def _small_sizes(**overrides: object) -> dict:
    return {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 4096,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    } | overrides


def _config_factories() -> dict[str, Callable]:
    import transformers as t

    return {
        # grouped queries, tied embeddings
        "llama-gqa": lambda: t.LlamaConfig(
            **_small_sizes(num_key_value_heads=2, intermediate_size=256, tie_word_embeddings=True)
        ),
        # biases on q, k, v
        "qwen2-bias": lambda: t.Qwen2Config(
            **_small_sizes(num_key_value_heads=2, intermediate_size=256)
        ),
        # fused QKV, LayerNorm, parallel blocks, biases
        "gpt-neox-fused": lambda: t.GPTNeoXConfig(**_small_sizes(intermediate_size=512)),
        # fused QKV and fused gate/up
        "phi3-fused": lambda: t.Phi3Config(
            **_small_sizes(num_key_value_heads=4, intermediate_size=256)
        ),
        # linear modules directly in the block, learned positions
        "opt": lambda: t.OPTConfig(**_small_sizes(ffn_dim=512, word_embed_proj_dim=128)),
        # transposed Conv1D weights, tied embeddings
        "gpt2-conv1d": lambda: t.GPT2Config(
            n_embd=128,
            n_layer=2,
            n_head=4,
            vocab_size=4096,
            n_positions=256,
            bos_token_id=0,
            eos_token_id=0,
        ),
        # alternating sliding and full attention, four norms, soft-capped logits
        "gemma2": lambda: t.Gemma2Config(
            **_small_sizes(
                num_key_value_heads=2, intermediate_size=256, head_dim=32, sliding_window=64
            )
        ),
        # mixture of experts, stacked weights
        "mixtral-moe": lambda: t.MixtralConfig(
            **_small_sizes(num_key_value_heads=2, intermediate_size=128, num_local_experts=4)
        ),
        # experts with a shared expert, after a block without experts
        "qwen2-moe": lambda: t.Qwen2MoeConfig(
            **_small_sizes(
                num_key_value_heads=2,
                intermediate_size=256,
                moe_intermediate_size=128,
                shared_expert_intermediate_size=128,
                num_experts=4,
                num_experts_per_tok=2,
                mlp_only_layers=[0],
            )
        ),
        # experts with (in, out) weights and biases of their own
        "gpt-oss-moe": lambda: t.GptOssConfig(
            **_small_sizes(
                num_key_value_heads=2,
                intermediate_size=128,
                head_dim=32,
                num_local_experts=4,
                num_experts_per_tok=2,
                sliding_window=64,
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
    }


ARCHITECTURES = (
    "llama-gqa",
    "qwen2-bias",
    "gpt-neox-fused",
    "phi3-fused",
    "opt",
    "gpt2-conv1d",
    "gemma2",
    "mixtral-moe",
    "qwen2-moe",
    "gpt-oss-moe",
)


def save_random_model(folder: Path, architecture: str, seed: int = 0, **changes: object) -> Path:
    """Save a small random model with the demo model's tokenizer, as a user would have it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    config = _config_factories()[architecture]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.05)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "data" / "demo_model").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the folder of a small random model, created once each."""
    folders: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in folders:
            folder = tmp_path_factory.mktemp("models") / architecture
            folders[architecture] = save_random_model(folder, architecture)
        return folders[architecture]

    return make


@pytest.fixture
def model_copy(random_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a small random model's folder that a test may change."""
    return Path(shutil.copytree(random_model("llama-gqa"), tmp_path / "copy"))


@pytest.fixture
def other_text(tmp_path: Path) -> str:
    """The path of a text that differs from :func:`small_text`."""
    path = tmp_path / "other.txt"
    path.write_text("\n".join(f"{i} is followed by {i + 1}." for i in range(300)), "utf8")
    return str(path)


@pytest.fixture
def small_text(tmp_path: Path) -> Path:
    """A text file of a few thousand tokens, different on every line."""
    path = tmp_path / "text.txt"
    lines = [
        f"Return the {i}-th item of the list, or raise IndexError when fewer than {i} are there."
        for i in range(400)
    ]
    path.write_text("\n".join(lines), "utf8")
    return path
