"""Available memory and its limit: of the machine, and of this process's container (cgroup)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil

_MEMBERSHIP = Path("/proc/self/cgroup")
_MOUNTS = Path("/proc/self/mountinfo")
_VMSTAT = Path("/proc/vmstat")
#: By version of the hierarchy: files of limit and usage, and the line of ``memory.stat`` with the
#: memory that the kernel reclaims by itself (pages of files not used recently).
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
#: By version: the file with the number of processes killed for lack of memory.
_KILLS = {1: "memory.oom_control", 2: "memory.events"}


def available_memory() -> int:
    """Return the bytes available now: the machine's, or less if a cgroup's limit is closer."""
    return min([psutil.virtual_memory().available, *_free_in_cgroups()])


def memory_limit() -> int:
    """Return the machine's memory in bytes, or the smallest limit of our cgroups if lower."""
    limits = (_read_number(group / _FILES[version][0]) for version, group in _cgroups())
    return min([psutil.virtual_memory().total, *(limit for limit in limits if limit is not None)])


def describe_memory_limit(format_bytes: Callable[[float], str]) -> str:
    """Return a clause with our cgroup's memory limit, or '' if it is not below the machine's."""
    limit = memory_limit()
    if limit >= psutil.virtual_memory().total:
        return ""
    return f"this container's memory limit (cgroup) is {format_bytes(limit)}"


def oom_kills() -> int | None:
    """Return how many processes of our cgroup the kernel has killed so far for lack of memory.

    If our cgroup has no such count, it is that of the machine; None if that is missing too. The
    difference of two readings is the number of kills between them.
    """
    counts = [
        _read_counter(group / _KILLS[version], "oom_kill") for version, group in _cgroups()[:1]
    ]
    counted = counts[0] if counts else None
    return counted if counted is not None else _read_counter(_VMSTAT, "oom_kill")


def _free_in_cgroups() -> list[int]:
    entries = []
    for version, group in _cgroups():
        limit, use, reclaimable = _FILES[version]
        most, now = _read_number(group / limit), _read_number(group / use)
        if most is not None and now is not None:
            cache = _read_counter(group / "memory.stat", reclaimable) or 0
            entries.append(max(most - now + cache, 0))
    return entries


def _cgroups() -> list[tuple[int, Path]]:
    """Return version and folder of our memory cgroup and of its ancestors, our own first.

    Inside a container the folder named in ``/proc/self/cgroup`` may be outside the mounted
    hierarchy; in that case the nearest existing ancestor, at most the mount's root, is our own.
    """
    entries = []
    for version, path in _cgroup_memberships():
        for root, mount in _cgroup_mounts(version):
            inside = path.removeprefix(root.rstrip("/")).strip("/")
            folder = mount / inside
            while not (folder / _FILES[version][1]).exists() and folder != mount:
                folder = folder.parent
            entries += [
                (version, at) for at in (folder, *folder.parents) if at.is_relative_to(mount)
            ]
            break
    return entries


def _cgroup_memberships() -> list[tuple[int, str]]:
    """Return version and path of the cgroups that may limit our memory: version 1 if in use."""
    try:
        lines = [line.split(":", 2) for line in _MEMBERSHIP.read_text("utf8").splitlines()]
    except OSError:
        return []
    first = [(1, path) for _, names, path in lines if "memory" in names.split(",")]
    return first or [(2, path) for number, names, path in lines if (number, names) == ("0", "")]


def _cgroup_mounts(version: int) -> list[tuple[str, Path]]:
    """Return the root within the hierarchy and the mount point of each mount of a version."""
    try:
        lines = [line.split() for line in _MOUNTS.read_text("utf8").splitlines()]
    except OSError:
        return []
    entries = []
    for words in lines:
        kind, options = words[words.index("-") + 1], words[-1].split(",")
        if kind == {1: "cgroup", 2: "cgroup2"}[version] and (version == 2 or "memory" in options):
            entries.append((words[3], Path(words[4])))
    return entries


def _read_number(path: Path) -> int | None:
    """Return the number in a file, or None for ``max`` or a missing file."""
    try:
        text = path.read_text("utf8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _read_counter(path: Path, name: str) -> int | None:
    """Return the number after a name in a file with one name and number per line, or None."""
    try:
        pairs = (line.split() for line in path.read_text("utf8").splitlines())
        return next((int(pair[1]) for pair in pairs if pair[0] == name), None)
    except (OSError, ValueError, IndexError):
        return None
