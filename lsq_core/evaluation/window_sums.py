"""Sums by window of an evaluation: negative log-likelihood, KL divergence, agreement."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lsq_core.errors import LsqError
from lsq_core.evaluation.result import Evaluation
from lsq_core.files import DamagedFileError, read_arrays, write_arrays
from lsq_core.model.dtypes import torch_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

#: Seconds between two checkpoints of an evaluation.
_CHECKPOINT_INTERVAL_S = 2.0
#: The most logits of one model in memory at a time (256 MiB in float32), which limits batches.
MAX_BATCH_LOGITS = 2**26


@dataclass(frozen=True, eq=False)
class PredictedTokens:
    """A model's predictions for a batch of passes.

    ``log_probs`` (passes, scored, vocabulary) is float32; ``nll`` (passes, scored) is float64, in
    nats. ``seconds`` is the wall-clock time per scored token; ``working_bytes`` the peak GPU
    memory above that allocated before, None on a CPU.
    """

    log_probs: Tensor
    nll: np.ndarray
    seconds: float
    working_bytes: int | None

    @classmethod
    def by(cls, model: nn.Module, batch: Tensor, scored: int, what: str) -> PredictedTokens:
        """Run a batch (passes, tokens) through a model; error messages begin with ``what``.

        Raises
        ------
        LsqError
            When a scored token's log-probability is not finite.
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
        """Return figures per scored token (passes, scored), by the names in :class:`WindowSums`."""
        found = {"nll": self.nll, "seconds": np.full(self.nll.shape, self.seconds)}
        if expected is None:
            return found
        kl = (expected.log_probs.exp() * (expected.log_probs - self.log_probs)).sum(-1).double()
        agreed = self.log_probs.argmax(-1) == expected.log_probs.argmax(-1)
        return found | {"kl": kl.cpu().numpy(), "agreed": agreed.cpu().numpy()}


class WindowSums:
    """One model's figures, summed over the scored tokens of each window (windows,)."""

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
        """Record the peak GPU memory of a batch, in bytes."""
        if taken is not None:
            self.working_bytes = max(taken, self.working_bytes or 0)

    @property
    def state(self) -> dict[str, np.ndarray]:
        """All arrays by name, to checkpoint."""
        return {"counts": self.counts} | self.sums

    def restore(self, saved: dict[str, np.ndarray]) -> None:
        """Restore a checkpointed state."""
        self.counts = saved["counts"]
        self.sums = {name: saved[name] for name in self.sums}

    def finish(self, protocol: str, compared: bool = False) -> Evaluation:
        """Return the evaluation; KL divergence and agreement only if it was compared."""
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
    """A file of the sums so far, replaced atomically so that a killed process leaves it intact.

    Windows are scored out of order (in batches of equal length), so a window is complete if its
    count is not zero.
    """

    def __init__(self, path: Path | None, model_totals: tuple[WindowSums, ...]) -> None:
        self.path, self.model_totals = path, model_totals
        self.written = time.monotonic()
        #: Why the file could not be restored, an empty string if it could.
        self.damage = ""

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of all sums, by name and number."""
        return {
            f"{name}_{number}": array
            for number, totals in enumerate(self.model_totals)
            for name, array in totals.state.items()
        }

    def restore(self) -> None:
        """Restore the sums from the file, if it exists; a damaged file is deleted."""
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
    """Reset the peak and return the GPU memory allocated now, in bytes; None on a CPU."""
    if device.type != "cuda":
        return None
    import torch

    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_memory(device: torch.device) -> int:
    import torch

    return torch.cuda.max_memory_allocated(device)


def locate_not_finite(model: nn.Module, batch: Tensor, what: str) -> str:
    """Explain which module is the first, in execution order, whose output is not finite."""
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
    dtype = torch_name(next(model.parameters()).dtype)
    first = f"the first not to be is that of {found[0]}" if found else "its logits are not"
    suggestion = "bfloat16 or float32" if dtype == "float16" else "another plan or dtype"
    return (
        f"{what} has no perplexity: its outputs in {dtype} are not finite numbers, and {first}; "
        f"try {suggestion}."
    )


def _all_finite(output: object) -> bool:
    """Whether every float of a module's output is finite, in nested tuples, lists or dicts."""
    import torch

    if isinstance(output, torch.Tensor):
        return not output.is_floating_point() or bool(torch.isfinite(output).all())
    if isinstance(output, dict):
        output = tuple(output.values())
    return all(map(_all_finite, output)) if isinstance(output, (tuple, list)) else True
