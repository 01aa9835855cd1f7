"""Stored final hidden states of the full-precision model, so that later plans need not run it.

These are the LM head's inputs for the scored tokens (one vector of the model's width per token),
in the compute dtype, so that applying the head again reproduces the original figures bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from safetensors import SafetensorError, safe_open

from lsq_core.errors import LsqError, exception_reason
from lsq_core.files import DamagedFileError, read_json, write_tensors
from lsq_core.jsontext import write_json
from lsq_core.units import GIB, format_bytes

if TYPE_CHECKING:
    from torch import Tensor

#: Limit on the bytes of all models' and texts' states; the least recently used are deleted first.
MAX_BYTES = 2 * GIB
#: The file that describes the folder of a model and text; its modification time is the last use.
ABOUT_FILE = "about.json"


class Passes(Protocol):
    """The parts of :class:`lsq_core.evaluation.text_pass.TextPass` used here."""

    pending: list[int]
    scored: int

    def shape(self, number: int) -> tuple[int, int]:
        """Return a pass's number of tokens, and how many of them it scores."""


class Group(Protocol):
    """The parts of :class:`lsq_core.evaluation.text_pass.WindowGroup` used here."""

    text_pass: Passes
    batches: tuple[tuple[int, ...], ...]
    scored: int


def states_folder(data_folder: Path) -> Path:
    """Return the folder of all stored states, which has a subfolder for each model and text."""
    return data_folder / "reference-states"


def list_kept(data_folder: Path) -> list[tuple[Path, str]]:
    """Return the folders with stored states, each with its title."""
    found = []
    for folder in sorted(states_folder(data_folder).glob("*/")):
        try:
            title = str((read_json(folder / ABOUT_FILE) or {}).get("title", ""))
        except DamagedFileError:
            title = ""
        found.append((folder, title))
    return found


@dataclass(eq=False)
class ReferenceStates:
    """The states of one model on one text, stored in ``folder``; ``title`` describes them to users.

    The folder's name is a digest of everything the states depend on: model, tokens, protocol,
    device, dtype, versions. Each file contains the states of some passes over windows (see
    :class:`lsq_core.evaluation.text_pass.TextPass`), (scored, features) under the pass's number.
    """

    folder: Path
    title: str
    max_bytes: int = MAX_BYTES
    #: An open file for each pass, so that files deleted by another process can still be read.
    _files: dict[int, object] = field(default_factory=dict, init=False)

    def covers(self, text_pass: Passes) -> bool:
        """Return whether the states of all pending passes are stored, and mark them as used."""
        self._open(text_pass)
        if not text_pass.pending or not set(text_pass.pending) <= self._files.keys():
            return False
        with suppress(OSError):  # the folder may be read-only
            (self.folder / ABOUT_FILE).touch()
        return True

    def _open(self, text_pass: Passes) -> None:
        """Open the files whose passes match the text's numbers of scored tokens; delete others."""
        self._files.clear()
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                self._files |= _open_passes(path, text_pass)
            except (SafetensorError, OSError, ValueError, LookupError, TypeError):
                path.unlink(missing_ok=True)

    def load(self, group: Group, device: object) -> tuple[list[Tensor], float]:
        """Return each batch's hidden states (passes, tokens, features), and the seconds they took.

        Tokens that are not scored are zero.
        """
        hidden, seconds = [], 0.0
        for batch in group.batches:
            length, scored = group.text_pass.shape(batch[0])
            stored = [self._files[number].get_tensor(str(number)) for number in batch]
            states = stored[0].new_zeros((len(batch), length, stored[0].shape[-1]))
            for row, own in zip(states, stored, strict=True):
                row[length - 1 - scored : length - 1] = own
            hidden.append(states.to(device))
            seconds += scored * sum(_seconds_per_token(self._files[n].metadata()) for n in batch)
        return hidden, seconds

    def save(self, group: Group, hidden: Sequence[Tensor], seconds: float) -> str:
        """Store a group's states that are not stored yet; return why that failed, '' if it didn't.

        ``hidden`` are each batch's states (passes, tokens, features); ``seconds`` is the time they
        took in total.
        """
        states = {
            str(number): row
            for number, row in _scored_states(group, hidden)
            if number not in self._files
        }
        if not states:
            return ""
        header = {"seconds_per_token": json.dumps(seconds / group.scored)}
        path = self.folder / f"{min(map(int, states)):06d}.safetensors"
        try:
            self._make_room(group.text_pass.scored * hidden[0][0, 0].nbytes)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / ABOUT_FILE, {"title": self.title})
            write_tensors(path, states, header)
        except (OSError, LsqError) as error:
            return f"full precision's hidden states are not stored: {exception_reason(error)}"
        return ""

    def _make_room(self, need: int) -> None:
        """Delete the least recently used states of other models and texts as needed.

        ``need`` is the bytes of all states of this one.
        """
        if need > self.max_bytes:
            most = format_bytes(self.max_bytes)
            raise LsqError(f"they would take {format_bytes(need)}, more than {most}")
        others = [own for own in self.folder.parent.glob("*/") if own != self.folder]
        sizes = {own: _folder_bytes(own) for own in others}
        for oldest in sorted(others, key=_last_used):
            if sum(sizes.values()) + need <= self.max_bytes:
                return
            shutil.rmtree(oldest, ignore_errors=True)
            sizes.pop(oldest)


def _open_passes(path: Path, text_pass: Passes) -> dict[int, object]:
    """Open a file and return it for each pass that it contains."""
    file = safe_open(path, "pt")
    _seconds_per_token(file.metadata())
    passes = {int(key): file for key in file.keys()}  # noqa: SIM118 - it is no dictionary
    for number in passes:
        rows, features = file.get_slice(str(number)).get_shape()
        if rows != text_pass.shape(number)[1] or not features:
            raise ValueError("its states are of other windows")
    return passes


def _seconds_per_token(header: Mapping[str, str] | None) -> float:
    return float((header or {})["seconds_per_token"])


def _scored_states(group: Group, hidden: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield each pass's number and the states whose predictions are scored."""
    for batch, states in zip(group.batches, hidden, strict=True):
        length, scored = group.text_pass.shape(batch[0])
        for number, row in zip(batch, states, strict=True):
            yield number, row[length - 1 - scored : length - 1]


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file())


def _last_used(folder: Path) -> float:
    try:
        return (folder / ABOUT_FILE).stat().st_mtime
    except OSError:
        return 0.0
