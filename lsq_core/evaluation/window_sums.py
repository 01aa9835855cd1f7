"""Sums by window of an evaluation: negative log-likelihood, KL divergence, agreement."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lsq_core.errors import LsqError
from lsq_core.files import DamagedFileError, read_arrays, write_arrays

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
from lsq_core.evaluation.result import Evaluation

#: Seconds between two times that an evaluation keeps what it has so far.
_CHECKPOINT_INTERVAL_S = 2.0
#: Logits of one model held at once, in numbers (256 MiB of them): batches are no larger than this.
_MAX_BATCH_LOGITS = 2**26


@dataclass(frozen=True, eq=False)
class PredictedTokens:
    """What a model predicts for a batch of passes.

    ``logs`` are log-probabilities (passes, scored, vocabulary), float32; ``nll`` is (passes,
    scored). ``seconds`` are those of the clock for each scored token; ``working_bytes`` what it
    took of a GPU's memory beyond what was there, None on a CPU.
    """

    log_probs: Tensor
    nll: np.ndarray
    seconds: float
    working_bytes: int | None

    @classmethod
    def by(cls, model: nn.Module, batch: Tensor, scored: int, what: str) -> PredictedTokens:
        """Run a batch (passes, tokens) through a model, ``what`` it is in words.

        Raises
        ------
        LsqError
            When a predicted token's probability is no finite number.
        """
        from lsq_core.model.loading import last_logits

        start_time, before = time.perf_counter(), _reset_peak_memory(batch.device)
        # The logits before a token predict it: one more is kept, and the very last is not used.
        log_probs = last_logits(model, batch, scored + 1)[:, :-1].float().log_softmax(-1)
        picked = -log_probs.gather(-1, batch[:, -scored:, None])[..., 0]
        nll = picked.double().cpu().numpy()
        if not np.isfinite(nll).all():
            raise LsqError(locate_not_finite(model, batch, what))
        working = None if before is None else _peak_memory(batch.device) - before
        return cls(log_probs, nll, (time.perf_counter() - start_time) / nll.size, working)

    def figures(self, expected: PredictedTokens | None = None) -> dict[str, np.ndarray]:
        """For each scored token (passes, scored), by the names of :class:`WindowSums`."""
        found = {"nll": self.nll, "seconds": np.full(self.nll.shape, self.seconds)}
        if expected is None:
            return found
        kl = (expected.log_probs.exp() * (expected.log_probs - self.log_probs)).sum(-1).double()
        agreed = self.log_probs.argmax(-1) == expected.log_probs.argmax(-1)
        return found | {"kl": kl.cpu().numpy(), "agreed": agreed.cpu().numpy()}


class WindowSums:
    """What one model predicts, summed over the scored tokens of each window (windows,)."""

    def __init__(self, windows: int) -> None:
        self.working_bytes: int | None = None
        self.counts = np.zeros(windows, dtype=np.int64)
        self.sums = {name: np.zeros(windows) for name in ("nll", "seconds", "kl", "agreed")}

    def record(self, window: int, scored: int, figures: dict[str, float]) -> None:
        """Set the figures of one window."""
        self.counts[window] = scored
        for name, value in figures.items():
            self.sums[name][window] = value

    def record_working_bytes(self, taken: int | None) -> None:
        """Take up what a batch took of a GPU's memory."""
        if taken is not None:
            self.working_bytes = max(taken, self.working_bytes or 0)

    @property
    def state(self) -> dict[str, np.ndarray]:
        """Every array by name."""
        return {"counts": self.counts} | self.sums

    def restore(self, saved: dict[str, np.ndarray]) -> None:
        """Take up a state."""
        self.counts = saved["counts"]
        self.sums = {name: saved[name] for name in self.sums}

    def finish(self, protocol: str, compared: bool = False) -> Evaluation:
        """The figures; KL and agreement only where it was compared."""
        tokens = self.counts.sum()
        return Evaluation(
            protocol=protocol,
            nll=self.sums["nll"],
            counts=self.counts,
            seconds=float(self.sums["seconds"].sum()),
            working_bytes=self.working_bytes,
            kl=float(self.sums["kl"].sum() / tokens) if compared else None,
            top1=float(self.sums["agreed"].sum() / tokens) if compared else None,
        )


class Checkpoint:
    """A file with the tallies so far, replaced whole, so that a killed process leaves a whole one.

    Windows come in an order of their own (:func:`_batches`), so a window is scored when it has a
    count.
    """

    def __init__(self, path: Path | None, model_totals: tuple[WindowSums, ...]) -> None:
        self.path, self.model_totals = path, model_totals
        self.written = time.monotonic()
        #: Why what the file held is of no use, '' where it is.
        self.damage = ""

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Every tally's arrays, by name and the tally's number."""
        return {
            f"{name}_{number}": array
            for number, totals in enumerate(self.model_totals)
            for name, array in totals.state.items()
        }

    def restore(self) -> None:
        """Take up what the file holds; one that is damaged is deleted, and costs what it held."""
        if self.path is None:
            return
        try:
            saved = read_arrays(self.path, self.arrays)
        except DamagedFileError as error:
            self.damage = str(error)
            self.path.unlink(missing_ok=True)
            return
        for number, totals in enumerate(self.model_totals if saved else ()):
            totals.restore({name: saved[f"{name}_{number}"] for name in totals.state})

    def save(self, last: bool) -> None:
        """Write the file every few seconds, and when the last window is scored."""
        if self.path is None or not (
            last or time.monotonic() - self.written > _CHECKPOINT_INTERVAL_S
        ):
            return
        write_arrays(self.path, self.arrays)
        self.written = time.monotonic()


def _reset_peak_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory taken now, from which on the most is counted; None on a CPU."""
    if device.type != "cuda":
        return None
    import torch

    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_memory(device: torch.device) -> int:
    import torch

    return torch.cuda.max_memory_allocated(device)


def locate_not_finite(model: nn.Module, batch: Tensor, what: str) -> str:
    """Which module is the first, in the order of computing, to put out NaN or infinity."""
    found: list[str] = []

    def make_hook(name: str) -> Callable:
        def hook(module: nn.Module, arguments: tuple, output: object) -> None:
            if not found and not _all_finite(output):
                found.append(name)

        return hook

    hooks = [m.register_forward_hook(make_hook(name)) for name, m in model.named_modules() if name]
    try:
        model(batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    first = f"the first not to be is that of {found[0]}" if found else "its logits are not"
    suggestion = "bfloat16 or float32" if dtype == "float16" else "another plan or dtype"
    return (
        f"{what} has no perplexity: its outputs in {dtype} are not finite numbers, and {first}; "
        f"try {suggestion}."
    )


def _all_finite(output: object) -> bool:
    """Whether every float of a module's output is finite, however it is wrapped."""
    import torch

    if isinstance(output, torch.Tensor):
        return not output.is_floating_point() or bool(torch.isfinite(output).all())
    if isinstance(output, dict):
        output = tuple(output.values())
    return all(map(_all_finite, output)) if isinstance(output, (tuple, list)) else True
