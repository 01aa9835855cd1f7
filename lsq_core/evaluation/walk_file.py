"""A file of hidden states from which a killed walk resumes at the block that was last saved."""

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

#: Minimum seconds between saves; the interval is longer if saving is slow.
SAVE_INTERVAL_S = 20.0
#: Maximum share of the time spent on saving.
_MAX_SAVING_SHARE = 0.1


class WalkFile:
    """The file of one group of windows; ``identity`` identifies its models and windows.

    It contains the hidden states of each branch and batch after some block, and is replaced
    atomically. A file that is damaged, or of other models or windows, is not used.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path, self.identity = path, identity
        self.saved_at, self.saving_seconds = time.monotonic(), 0.0

    def restore(self, walk: Walk) -> str:
        """Restore a walk from the file if it exists; return why the file is unusable, or ''."""
        if self.path is None or not self.path.is_file():
            return ""
        try:
            if not self._restore(walk):
                return f"{self.path} belongs to other models or windows."
        except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
            return f"{self.path} is damaged: {exception_reason(error)}."
        return ""

    def _restore(self, walk: Walk) -> bool:
        """Restore the walk; return False if the file belongs to another walk."""
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
        """Write the states if the last save was long enough ago."""
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
        """Delete the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _checked_branch(members: tuple[int, ...], hidden: list[Tensor], start: Branch) -> Branch:
    """Return a branch with saved states, checking their shapes and dtypes against the start's."""
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
