"""Row scores ([C]; method §7): the diagonal Fisher information of each output row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lsq_core.files import DamagedFileError, read_arrays, write_arrays
from lsq_core.model.architecture import is_transposed, locate_parameter
from lsq_core.model.info import Matrix
from lsq_core.model.loading import LoadedModel, last_logits
from lsq_core.progress import Progress, no_progress

#: Number of sequences between two writes of the checkpoint.
_CHECKPOINT_SEQUENCES = 16
#: Checkpoint entry with the number of sequences read.
_DONE = "done"


def measure_row_scores(
    loaded: LoadedModel,
    ids: Tensor,
    progress: Progress = no_progress,
    checkpoint: Path | None = None,
) -> dict[str, np.ndarray]:
    """Measure the mean squared gradient of each output row, float64 (out,) by matrix name.

    The loss is the language modeling loss, averaged over the tokens of a sequence. Gradients are
    computed for one sequence of ``ids`` (sequences, tokens) at a time, since the square of a
    batch's mean gradient is not the Fisher information. Their squares, in float32, are averaged
    over each row and over the sequences. ``checkpoint`` is a file to write to and resume from.
    """
    scores = _RowScores(loaded)
    done = scores.read(checkpoint, len(ids), progress)
    with torch.inference_mode(False), torch.enable_grad(), scores.collect_gradients():
        for number in range(done, len(ids)):
            progress(number, len(ids), f"row scores, sequence {number + 1} of {len(ids)}")
            sequence = ids[number : number + 1].clone()
            logits = last_logits(loaded.model, sequence, sequence.shape[1])
            cross_entropy(logits[0, :-1].float(), sequence[0, 1:]).backward()
            if checkpoint is not None and (number + 1) % _CHECKPOINT_SEQUENCES == 0:
                scores.write(checkpoint, number + 1)
    progress(len(ids), len(ids), "row scores")
    return {matrix.name: total / len(ids) for matrix, total in scores.sums.items()}


class _RowScores:
    """Sums squared gradients, freeing each gradient as soon as it is computed."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.sums = {m: np.zeros(m.out_features) for m in loaded.info.matrices}
        self.matrices_by_parameter: dict[nn.Parameter, tuple[bool, list[Matrix]]] = {}
        for matrix in loaded.info.matrices:
            holder, name = locate_parameter(loaded.model, matrix)
            entry = self.matrices_by_parameter.setdefault(
                getattr(holder, name), (is_transposed(holder), [])
            )
            entry[1].append(matrix)

    def collect_gradients(self) -> _GradientCollection:
        """Collect the gradients of the planned weights alone within a ``with`` block."""
        return _GradientCollection(self)

    def add(self, parameter: nn.Parameter) -> None:
        transposed, matrices = self.matrices_by_parameter[parameter]
        squares = parameter.grad.float().square()
        parameter.grad = None
        for matrix in matrices:
            own = squares if matrix.expert is None else squares[matrix.expert]
            self.sums[matrix] += own.mean(0 if transposed else 1).double().cpu().numpy()

    def read(self, checkpoint: Path | None, sequences: int, progress: Progress) -> int:
        """Load a checkpoint and return the number of sequences that it covers.

        A damaged checkpoint is deleted, and its sequences are read again.
        """
        if checkpoint is None:
            return 0
        expected = {m.name: total for m, total in self.sums.items()} | {
            _DONE: np.zeros((), np.int64)
        }
        try:
            saved = read_arrays(checkpoint, expected)
            if saved is not None and not 0 < saved[_DONE] <= sequences:
                raise DamagedFileError(
                    f"{checkpoint} is damaged: it covers {saved[_DONE]} sequences."
                )
        except DamagedFileError as error:
            progress(0, sequences, f"{error} Its sequences will be read again.")
            checkpoint.unlink(missing_ok=True)
            return 0
        if saved is None:
            return 0
        self.sums = {matrix: saved[matrix.name] for matrix in self.sums}
        return int(saved[_DONE])

    def write(self, checkpoint: Path, done: int) -> None:
        sums = {m.name: total for m, total in self.sums.items()}
        write_arrays(checkpoint, sums | {_DONE: np.array(done, np.int64)})


class _GradientCollection:
    def __init__(self, scores: _RowScores) -> None:
        self.scores = scores

    def __enter__(self) -> None:
        self.handles = []
        for parameter in self.scores.matrices_by_parameter:
            parameter.requires_grad_(True)
            self.handles.append(parameter.register_post_accumulate_grad_hook(self.scores.add))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        for parameter in self.scores.matrices_by_parameter:
            parameter.requires_grad_(False)
            parameter.grad = None
