"""A file of hidden states, from which a killed walk goes on at the block that it had reached."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lsq_core.errors import exception_reason
from lsq_core.evaluation.branches import Branch, Walk
from lsq_core.files import write_tensors

#: Seconds of work that are lost at most, as long as saving takes a small share of them.
SAVE_INTERVAL_S = 20.0
#: The share of the time that saving may take.
_MAX_SAVING_SHARE = 0.1


class WalkFile:
    """The file of one group of windows; ``identity`` says what it has to be of.

    It holds the hidden states of each branch and batch after some blocks, and is replaced
    atomically. A file that is damaged, or of other models or windows, is not used.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path, self.identity = path, identity
        self.saved_at, self.saving_seconds = time.monotonic(), 0.0

    def restore(self, walk: Walk) -> str:
        """Take a walk on to where the file has it; returns why it isn't used, '' if it is."""
        if self.path is None or not self.path.is_file():
            return ""
        try:
            if not self._restore(walk):
                return f"{self.path} is of other models or windows."
        except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
            return f"{self.path} is damaged: {exception_reason(error)}."
        return ""

    def _restore(self, walk: Walk) -> bool:
        """Restore the walk; False if the file is of another one."""
        with safe_open(self.path, "pt", str(walk.batches[0].device)) as saved:
            header = saved.metadata() or {}
            if header.get("identity") != self.identity:
                return False
            state = json.loads(header["state"])
            tensors = {key: saved.get_tensor(key) for key in saved.keys()}  # noqa: SIM118
        members = [tuple(own) for own in state["members"]]
        if sorted(sum(members, ())) != list(walk.members):
            raise ValueError("its branches are not those of the models")
        if not 0 < state["layer"] <= walk.layers or len(state["seconds"]) != len(walk.models):
            raise ValueError("its state is not one of these models")
        starts = {member: branch for branch in walk.branches for member in branch.members}
        branches = []
        for number, own in enumerate(members):
            hidden = [tensors[f"{number}.{batch}"] for batch in range(len(walk.batches))]
            branches.append(_checked_branch(own, hidden, starts[own[0]]))
        walk.restore(state["layer"], branches, state["seconds"])
        return True

    def save(self, walk: Walk) -> None:
        """Write the states if the last time is long ago."""
        interval = max(SAVE_INTERVAL_S, self.saving_seconds / _MAX_SAVING_SHARE)
        start_time = time.monotonic()
        if self.path is None or start_time - self.saved_at < interval:
            return
        state = {
            "layer": walk.layer,
            "members": [branch.members for branch in walk.branches],
            "seconds": walk.seconds.tolist(),
        }
        header = {"identity": self.identity, "state": json.dumps(state)}
        write_tensors(self.path, _tensors(walk), header)
        self.saved_at = time.monotonic()
        self.saving_seconds = self.saved_at - start_time

    def remove(self) -> None:
        """Delete the file, whose windows are scored or are walked from the start."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _checked_branch(members: tuple[int, ...], hidden: list[Tensor], start: Branch) -> Branch:
    """A branch with these states, if they have the shapes and dtypes of those it began with."""
    for found, expected in zip(hidden, start.hidden, strict=True):
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise ValueError("its hidden states have another shape or dtype")
    return Branch(members, hidden, start.calls)


def _tensors(walk: Walk) -> Mapping[str, Tensor]:
    return {
        f"{number}.{batch}": states
        for number, branch in enumerate(walk.branches)
        for batch, states in enumerate(branch.hidden)
    }
