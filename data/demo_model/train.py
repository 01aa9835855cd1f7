"""Train the demo model from scratch, on a CPU or a GPU.

    python data/demo_model/train.py --out data/demo_model/training

The text is what the machine already has: the docstrings of the standard library and of the
installed packages named in ``PACKAGES``, without those that are held out for evaluation. A run
that was stopped goes on with ``--resume`` and ends with the very weights that it would have had;
the README beside this file tells what such a model is for.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import math
import os
import pickle
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lsq_core.corpus import docstrings_under, is_held_out, stdlib_docstrings
from lsq_core.errors import InputError, LsqError
from lsq_core.model import ModelSource, write_description
from lsq_core.model.loading import inspect_model

PACKAGES = (
    *("numpy", "scipy", "pandas", "torch", "transformers", "datasets"),
    *("streamlit", "plotly", "sympy", "networkx", "duckdb", "accelerate"),
)
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
POSITIONS = 512
HEAD_WIDTH = 32
WINDOW = 256
HELD_OUT_WINDOWS = 96
PEAK_RATE, FINAL_RATE = 4e-3, 0.03 * 4e-3
WARM_UP_STEPS = 150


@dataclass(frozen=True)
class Recipe:
    """What decides the weights that a run ends with, besides the text."""

    steps: int = 1810
    batch: int = 32
    layers: int = 24
    width: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """How and where a recipe is carried out."""

    out: Path
    device: str = "cpu"
    compiled: bool = False
    checkpoint_every: int = 100
    resume: bool = False
    force: bool = False

    @property
    def checkpoint(self) -> Path:
        """The file that a stopped run goes on from."""
        return self.out / "checkpoint.pt"


# --- Text and tokens -----------------------------------------------------------------------


def collect_texts(text_root: Path | None = None) -> tuple[list[str], list[str]]:
    """Docstrings to train on and docstrings held out, each once.

    From the Python files below ``text_root``; without one, from the installed packages and the
    standard library, and then those held out are the standard library's alone.

    Raises
    ------
    InputError
        If a package isn't installed or there is too little text to train on.
    """
    if text_root is not None:
        texts = list(dict.fromkeys(docstrings_under(text_root)))
        held_out = [text for text in texts if is_held_out(text)]
    else:
        folders = [_package_folder(name) for name in PACKAGES]
        packaged = (text for folder in folders for text in docstrings_under(folder))
        texts = list(dict.fromkeys([*stdlib_docstrings(held_out=False), *packaged]))
        held_out = stdlib_docstrings(held_out=True)
    kept = [text for text in texts if not is_held_out(text)]
    if not kept or not held_out:
        raise InputError(f"Too few docstrings are below {text_root}; give a folder with more.")
    return kept, held_out


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise InputError(f"The package '{name}' is not installed; install it or use --text-root.")
    return Path(spec.origin).parent


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``VOCABULARY`` tokens, the end of a text being token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=POSITIONS,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All texts as one int64 stream [tokens], an end-of-text token after each.

    Raises
    ------
    InputError
        If the stream isn't longer than one window.
    """
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    stream = np.concatenate([np.array([*row, end], dtype=np.int64) for row in rows])
    if len(stream) <= WINDOW:
        raise InputError(f"{len(stream)} tokens don't fill a window of {WINDOW}; give more text.")
    return stream


def batch_at(tokens: np.ndarray, step: int, recipe: Recipe) -> torch.Tensor:
    """The windows of one step, int64 [batch, WINDOW + 1].

    They depend on nothing but the seed and the step, so a run can begin in the middle.
    """
    starts = np.random.default_rng((recipe.seed, step)).integers(
        0, len(tokens) - WINDOW, size=recipe.batch
    )
    return torch.from_numpy(np.stack([tokens[s : s + WINDOW + 1] for s in starts]))


# --- Model and optimizer -------------------------------------------------------------------


def make_model(recipe: Recipe) -> LlamaForCausalLM:
    """A Llama of the recipe's size in float32, freshly initialised from its seed.

    Both projections of a block that write to the residual stream start smaller by
    ``sqrt(2 · layers)``, so that the stream's variance does not grow with depth (as in GPT-2).

    Raises
    ------
    InputError
        If the width isn't made of whole heads.
    """
    if recipe.width % HEAD_WIDTH:
        raise InputError(f"A width of {recipe.width} isn't a multiple of {HEAD_WIDTH}; round it.")
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=recipe.width,
        intermediate_size=3 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.width // HEAD_WIDTH,
        num_key_value_heads=recipe.width // HEAD_WIDTH,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight /= math.sqrt(2 * recipe.layers)
    return model


def make_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95) with a decay of 0.1 on matrices; norms are left free."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to 3 %; a short run warms up for a tenth of itself."""
    warm_up = min(WARM_UP_STEPS, max(1, steps // 10))
    if step < warm_up:
        return PEAK_RATE * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return FINAL_RATE + (PEAK_RATE - FINAL_RATE) * (1 + math.cos(math.pi * done)) / 2


def loss_of(model: Callable[..., object], windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (nats) of each window's tokens given those before; bf16 autocast."""
    with autocast(windows.device.type):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def autocast(device_type: str) -> AbstractContextManager:
    """bf16 for the matrix products, float32 for the rest."""
    return torch.autocast(device_type, dtype=torch.bfloat16)


@torch.no_grad()
def held_out_loss(model: Callable[..., object], tokens: np.ndarray, run: Run, batch: int) -> float:
    """Mean loss (nats per token) over the first windows of the held-out stream."""
    count = min(HELD_OUT_WINDOWS, (len(tokens) - 1) // WINDOW)
    windows = torch.from_numpy(
        np.stack([tokens[i * WINDOW : (i + 1) * WINDOW + 1] for i in range(count)])
    ).to(run.device)
    losses = [loss_of(model, part).item() * len(part) for part in windows.split(batch)]
    return sum(losses) / count


class Trainer:
    """A model under training; its whole state is the weights, AdamW's moments and the step."""

    def __init__(self, recipe: Recipe, run: Run, tokens: np.ndarray) -> None:
        self.recipe, self.run, self.tokens = recipe, run, tokens
        self.model = make_model(recipe).to(run.device)
        self.forward = torch.compile(self.model) if run.compiled else self.model
        self.optimizer = make_optimizer(self.model)
        self.step = 0

    @property
    def identity(self) -> str:
        """SHA-256 over the recipe and the training tokens: what a checkpoint belongs to."""
        digest = hashlib.sha256(repr(self.recipe).encode())
        digest.update(self.tokens.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def steps_to_checkpoint(self) -> int:
        """Steps from here to the next multiple of ``checkpoint_every``, or to the end."""
        every = self.run.checkpoint_every
        return min(every - self.step % every, self.recipe.steps - self.step)

    def advance(self) -> float:
        """Take one step and return the loss (nats per token) of its batch before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.recipe.steps)
        windows = batch_at(self.tokens, self.step, self.recipe).to(self.run.device)
        loss = loss_of(self.forward, windows)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, error_if_nonfinite=True)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def state(self) -> dict[str, object]:
        """What :meth:`restore` needs to go on as if nothing had happened."""
        return {
            "identity": self.identity,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, object]) -> None:
        """Take over the state of another trainer of the same recipe and text."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


# --- Checkpoints ---------------------------------------------------------------------------


def save_checkpoint(path: Path, content: dict[str, object]) -> None:
    """Write a checkpoint beside the last one, then put it in its place in one move."""
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def load_checkpoint(run: Run, belongs_to: str) -> dict[str, object]:
    """The checkpoint of a run, tensors on the CPU; nothing in it is executed.

    Raises
    ------
    InputError
        If there is none, it is damaged, or it is another recipe's or another text's.
    """
    if not run.checkpoint.is_file():
        raise InputError(f"There is no checkpoint in {run.out}; leave out --resume.")
    try:
        content = torch.load(run.checkpoint, map_location="cpu", weights_only=True)
        same_run = content["identity"] == belongs_to
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as cause:
        raise InputError(
            f"{run.checkpoint} is no checkpoint of this script, or is damaged; begin anew with "
            "--force, without --resume."
        ) from cause
    if not same_run:
        raise InputError(
            f"The checkpoint in {run.out} is of another recipe or text; repeat the arguments it "
            "was made with, or give --force without --resume to begin anew."
        )
    return content


# --- Training ------------------------------------------------------------------------------


def check_out(run: Run) -> None:
    """Raise :class:`InputError` where a run would overwrite what is worth keeping."""
    if run.force:
        return
    if (run.out / "model.safetensors").exists() or (run.out / "config.json").exists():
        raise InputError(f"{run.out} has a model in it; give another --out, or --force.")
    if run.checkpoint.exists() and not run.resume:
        raise InputError(
            f"{run.out} has a checkpoint in it; give --resume to go on, or --force to begin anew."
        )


def train(
    recipe: Recipe, run: Run, text_root: Path | None = None, report: Callable[[str], None] = print
) -> LlamaForCausalLM:
    """Train; save the model (as bf16) and its tokenizer to ``run.out``; return it in float32.

    Every ``checkpoint_every`` steps the state is kept and the held-out loss reported.

    Raises
    ------
    InputError
        For too little text, a folder that has a model in it, or a checkpoint of another run.
    """
    check_out(run)
    run.out.mkdir(parents=True, exist_ok=True)
    kept, held_out = collect_texts(text_root)
    tokenizer = train_tokenizer(kept)
    tokens, held_out_tokens = encode(tokenizer, kept), encode(tokenizer, held_out)
    report(f"{len(tokens):,} tokens to train on, {len(held_out_tokens):,} held out")

    trainer = Trainer(recipe, run, tokens)
    if run.resume:
        trainer.restore(load_checkpoint(run, trainer.identity))
        report(f"going on after step {trainer.step}")
    while trainer.step < recipe.steps:
        started, first = time.perf_counter(), trainer.step
        losses = [trainer.advance() for _ in range(trainer.steps_to_checkpoint)]
        speed = (trainer.step - first) * recipe.batch * WINDOW / (time.perf_counter() - started)
        save_checkpoint(run.checkpoint, trainer.state())
        loss = held_out_loss(trainer.forward, held_out_tokens, run, recipe.batch)
        report(
            f"step {trainer.step}/{recipe.steps}: loss {losses[-1]:.4f}, held out {loss:.4f} "
            f"(perplexity {math.exp(loss):.2f}), {speed:,.0f} tokens/s"
        )
    copy.deepcopy(trainer.model).to(torch.bfloat16).save_pretrained(run.out)
    tokenizer.save_pretrained(run.out)
    write_description(replace(inspect_model(ModelSource(str(run.out))), source="demo"), run.out)
    run.checkpoint.unlink()
    return trainer.model


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    recipe = Recipe(options.steps, options.batch, options.layers, options.width, options.seed)
    run = Run(
        out=options.out,
        device=device,
        compiled=options.compile,
        checkpoint_every=options.checkpoint_every,
        resume=options.resume,
        force=options.force,
    )
    try:
        train(recipe, run, options.text_root, lambda line: print(line, flush=True))
    except LsqError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train the demo model from scratch.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "training")
    for name, default in asdict(Recipe()).items():
        kind = int if name == "seed" else _positive
        parser.add_argument(f"--{name}", type=kind, default=default, help="default: %(default)s")
    parser.add_argument("--device", help="cpu, cuda, …; default: a GPU if there is one")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--checkpoint-every", type=_positive, default=Run.checkpoint_every)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--force", action="store_true", help="overwrite what is in --out")
    parser.add_argument("--text-root", type=Path, help="train on the Python files below this")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
