"""Ties: modules of a layer that must share a configuration, e.g. because a server fuses them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from lsq_core.errors import InputError
from lsq_core.model.info import Matrix


@dataclass(frozen=True)
class Tie:
    """Names of modules that share a configuration wherever they have the same parent.

    A name is the end of a module's path in its block: ``q_proj`` or ``self_attn.q_proj``.
    """

    names: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Tie:
        """Parse ``q_proj,k_proj,v_proj``.

        Raises
        ------
        InputError
            If there are fewer than two different names.
        """
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        if len(names) < 2:
            raise InputError(
                f"'{text}' is not a tie; name two or more modules that should share a "
                "configuration, such as 'q_proj,k_proj,v_proj'."
            )
        return cls(names)

    def __str__(self) -> str:
        """Return the text that :meth:`parse` accepts."""
        return ",".join(self.names)

    def groups(self, matrices: Sequence[Matrix]) -> list[list[int]]:
        """Return groups of tied matrices, as indices, with the same layer, parent and expert."""
        found: dict[tuple, list[int]] = defaultdict(list)
        for i, matrix in enumerate(matrices):
            parents = (_parent(matrix.type, name) for name in self.names)
            parent = next((each for each in parents if each is not None), None)
            if parent is not None:
                found[matrix.layer, parent, matrix.expert].append(i)
        return [group for group in found.values() if len(group) > 1]

    def check(self, matrices: Sequence[Matrix]) -> None:
        """Raise :class:`InputError` if a name matches no module or the tie joins no modules."""
        types = list(dict.fromkeys(matrix.type for matrix in matrices))
        for name in self.names:
            if all(_parent(each, name) is None for each in types):
                raise InputError(
                    f"The tie '{self}' names {name}, but no module of this model is called that; "
                    f"its modules are {', '.join(types)}."
                )
        if not self.groups(matrices):
            raise InputError(
                f"The tie '{self}' joins nothing, because no two of its modules have the same "
                "parent; write out their paths, such as 'self_attn.o_proj,mlp.down_proj'."
            )


def _parent(kind: str, name: str) -> str | None:
    """Return the part of a type before a name: '' if they are equal, None if it doesn't match."""
    if kind == name:
        return ""
    return kind.removesuffix(f".{name}") if kind.endswith(f".{name}") else None


def merge_groups(groups: Iterable[Collection[int]]) -> tuple[tuple[int, ...], ...]:
    """Merge overlapping groups; each is sorted, and they are ordered by their first index.

    >>> merge_groups([[3, 4], [0, 1], [1, 2]])
    ((0, 1, 2), (3, 4))
    """
    parent: dict[int, int] = {}

    def root(i: int) -> int:
        while parent.setdefault(i, i) != i:
            parent[i] = i = parent[parent[i]]
        return i

    for group in groups:
        for other in group:
            parent[root(other)] = root(next(iter(group)))
    members: dict[int, list[int]] = defaultdict(list)
    for i in sorted(parent):
        members[root(i)].append(i)
    return tuple(sorted(map(tuple, members.values())))
