"""Measure the memory that profiling and evaluation take, on random models of any size.

Each model is created, profiled (or evaluated at three plans) in a separate process while this one
watches its anonymous memory (RssAnon, which excludes mapped files), and deleted. The full size that
the limits apply to takes a long time on a small machine, so it is run by hand::

    python -m lsq_core.bench.memory 0.5 1 2 --folder /tmp        # kurtosis and weight error
    python -m lsq_core.bench.memory 0.5 --text                   # sensitivity as well
    python -m lsq_core.bench.memory 4 --evaluate 512             # three plans on 512 tokens
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lsq_core import paths
from lsq_core.model.source import DEMO_FOLDER, ModelSource
from lsq_core.profiling.metrics import default_metrics, weight_metrics
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.units import format_bytes

GIB = 2**30
#: Sizes of the three plans to evaluate: 2, 3 and 4 bits.
EVALUATED_BASES = ("2.13", "3.13", "4.13")
#: Number of calibration texts for profiling the demo model before memory is first read.
_WARM_UP_SAMPLES = 5
#: Seconds between two readings of the process's memory, less than a matrix takes.
_POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Peak:
    """Memory in bytes and processor time in seconds of one profile or evaluation.

    ``base`` is RssAnon before the model is opened, after a warm-up on the demo model: the memory of
    Python and the libraries, including the code and buffers that they retain.
    """

    weight_bytes: int
    base: int
    peak: int
    seconds: float


@dataclass(frozen=True)
class Options:
    """What to measure, and with which quantizer.

    If ``tokens`` is not 0, the evaluation of three plans on that many tokens. Otherwise a profile,
    on ``samples`` calibration texts and including sensitivity if ``text`` is set.
    """

    text: bool = False
    quantizer: str = "hqq"
    samples: int = 128
    tokens: int = 0


def random_config(weight_bytes: int, layers: int = 32, vocabulary: int = 32_000) -> object:
    """Return a Llama config whose decoder blocks take about ``weight_bytes`` in bfloat16."""
    from transformers import LlamaConfig

    # A block of width h with an MLP of 8h/3 has 4h² + 3·h·(8h/3) = 12 h² weights of two bytes.
    hidden = max(1, round((weight_bytes / layers / 24) ** 0.5 / 128)) * 128
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=round(hidden * 8 / 3 / 128) * 128,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
    )


def write_random_model(
    folder: Path, weight_bytes: int, layers: int = 32, vocabulary: int = 32_000
) -> int:
    """Write a random model in shards of one block each; return the bytes of its decoder blocks.

    At most one block is in memory at a time.
    """
    import torch
    from safetensors.torch import save_file

    from lsq_core.model.architecture import find_blocks
    from lsq_core.model.loading import build_meta_model

    folder.mkdir(parents=True)
    random_config(weight_bytes, layers, vocabulary).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_FOLDER / file, folder / file)
    model = build_meta_model(ModelSource(str(folder)), folder, dtype=torch.bfloat16)
    prefix = find_blocks(model)[0]
    shards: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        inside = name.startswith(f"{prefix}.")
        shard = name.removeprefix(f"{prefix}.").partition(".")[0] if inside else "other"
        shards.setdefault(f"model-{shard}.safetensors", {})[name] = parameter.shape
    generator = torch.Generator().manual_seed(0)
    where, block_bytes = {}, 0
    for file, shapes in shards.items():
        tensors = {name: _random(shape, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shapes, file)
        block_bytes += 0 if "other" in file else sum(t.nbytes for t in tensors.values())
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf8")
    return block_bytes


def _random(shape: Sequence[int], generator: object) -> object:
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def measure(folder: Path, weight_bytes: int, options: Options) -> Peak:
    """Profile or evaluate a model in a separate process and watch its memory.

    Raises
    ------
    RuntimeError
        If the process fails.
    """
    command = [sys.executable, "-m", "lsq_core.bench.memory", "--model", str(folder.resolve())]
    command += ["--quantizer", options.quantizer, "--samples", str(options.samples)]
    command += ["--evaluate", str(options.tokens)]
    command += ["--text"] if options.text else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=paths.IMPORT_FOLDER)
    peak = 0
    for now in _watch_rss_anon(process):
        peak = max(peak, now)
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"measuring {folder} failed; see above")
    report = json.loads(output)
    return Peak(weight_bytes, report["base"], max(peak, report["base"]), report["seconds"])


def _watch_rss_anon(process: subprocess.Popen) -> Iterator[int]:
    """Yield RssAnon of a process in bytes repeatedly until it ends."""
    while process.poll() is None:
        try:
            yield rss_anon(process.pid)
        except (OSError, StopIteration):
            return
        time.sleep(_POLL_SECONDS)


def rss_anon(pid: int | str = "self") -> int:
    """Return the bytes of resident anonymous memory of a process (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text("utf8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def profile(folder: Path, options: Options) -> dict[str, float]:
    """Profile a model in this process, streaming its blocks.

    Returns ``base``, the memory before it in bytes, and ``seconds`` of processor time.
    """
    warm_up = replace(options, samples=_WARM_UP_SAMPLES)
    return _report(lambda: _profile(DEMO_FOLDER, warm_up), lambda: _profile(folder, options))


def evaluate(folder: Path, options: Options) -> dict[str, float]:
    """Evaluate three uniform plans in this process, block by block; returns as :func:`profile`."""
    return _report(lambda: _evaluate(DEMO_FOLDER, options), lambda: _evaluate(folder, options))


def _report(warm_up: Callable[[], None], run: Callable[[], None]) -> dict[str, float]:
    warm_up()
    base, start_time = rss_anon(), time.process_time()
    run()
    return {"base": base, "seconds": time.process_time() - start_time}


def _profile(folder: Path, options: Options) -> None:
    from lsq_core.model.streaming import open_streamed
    from lsq_core.profiling.measure import measure_profile

    measure_profile(
        open_streamed(ModelSource(str(folder)), "cpu"),
        ProfileSettings(options.quantizer, samples=options.samples),
        "memory",
        metrics=default_metrics() if options.text else weight_metrics(),
    )


def _evaluate(folder: Path, options: Options) -> None:
    from lsq_core.evaluation.protocol import EvaluationRequest
    from lsq_core.session import Session

    with tempfile.TemporaryDirectory() as name:
        session = Session(folder, Path(name) / "lsq.duckdb", "cpu")
        plans = [session.plan("uniform", base=size) for size in EVALUATED_BASES]
        made = [session.quantize_streamed(plan, options.quantizer) for plan in plans]
        list(session.measure(made, [EvaluationRequest(max_tokens=options.tokens)]))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure models of the given sizes and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m lsq_core.bench.memory", description=__doc__)
    parser.add_argument("gib", nargs="*", type=float, help="GiB of weights in the decoder blocks")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--text", action="store_true", help="measure sensitivity as well")
    parser.add_argument("--quantizer", default="hqq", help="hqq, or rtn, which is faster")
    parser.add_argument("--samples", type=int, default=128, help="calibration texts")
    parser.add_argument(
        "--folder", help="folder for the models (default: the system's temporary folder)"
    )
    parser.add_argument(
        "--evaluate", type=int, default=0, metavar="TOKENS", help="evaluate on this many tokens"
    )
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    options = Options(args.text, args.quantizer, args.samples, args.evaluate)
    if args.model:
        run = evaluate if options.tokens else profile
        print(json.dumps(run(args.model, options)))
        return 0
    print("weights     RssAnon: before     peak   CPU seconds   s/GiB")
    for gib in args.gib:
        with tempfile.TemporaryDirectory(dir=args.folder) as made:
            folder = Path(made) / "model"
            block_bytes = write_random_model(folder, int(gib * GIB), args.layers)
            result = measure(folder, block_bytes, options)
        print(
            f"{format_bytes(block_bytes):>9} {format_bytes(result.base):>16} "
            f"{format_bytes(result.peak):>10} {result.seconds:>12.1f} "
            f"{result.seconds / block_bytes * GIB:>7.1f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
