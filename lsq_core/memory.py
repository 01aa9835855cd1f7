"""How much memory there is to take: of the machine, and of the container (cgroup) around us."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil

_MEMBERSHIP = Path("/proc/self/cgroup")
_MOUNTS = Path("/proc/self/mountinfo")
_VMSTAT = Path("/proc/vmstat")
#: By version of the hierarchy: limit, use, and the line of ``memory.stat`` with what the kernel
#: gives back by itself (pages of files that were not used of late).
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
#: By version: where the number of processes that the kernel killed for want of memory is.
_KILLS = {1: "memory.oom_control", 2: "memory.events"}


def available_memory() -> int:
    """Bytes that can be taken now: the machine's, or less where a cgroup's limit is nearer."""
    return min([psutil.virtual_memory().available, *_free_in_cgroups()])


def memory_limit() -> int:
    """Bytes that there are altogether: the machine's, or the smallest limit of our cgroups."""
    limits = (_read_number(group / _FILES[version][0]) for version, group in _cgroups())
    return min([psutil.virtual_memory().total, *(limit for limit in limits if limit is not None)])


def describe_memory_limit(format_bytes: Callable[[float], str]) -> str:
    """That our cgroup allows less than the machine has, and how much; '' where it doesn't."""
    limit = memory_limit()
    if limit >= psutil.virtual_memory().total:
        return ""
    return f"the memory limit of this container, its cgroup's, is {format_bytes(limit)}"


def oom_kills() -> int | None:
    """How many processes of our cgroup the kernel has killed for want of memory so far.

    Of the whole machine where we are in no cgroup that counts them; None where neither does. A
    difference of two readings tells of kills between them.
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
    """Version and folder of our memory cgroup and of each above it, our own first.

    Inside a container the folder named in ``/proc/self/cgroup`` may lie outside what is mounted;
    the root of the mount is our own then.
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
    """Version and path of the cgroups that may limit our memory: version 1 where it's in use."""
    try:
        lines = [line.split(":", 2) for line in _MEMBERSHIP.read_text("utf8").splitlines()]
    except OSError:
        return []
    first = [(1, path) for _, names, path in lines if "memory" in names.split(",")]
    return first or [(2, path) for number, names, path in lines if (number, names) == ("0", "")]


def _cgroup_mounts(version: int) -> list[tuple[str, Path]]:
    """Root within the hierarchy and mount point, of each mount of that version."""
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
    """The number in a file; None for ``max``, or where there is no such file."""
    try:
        text = path.read_text("utf8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _read_counter(path: Path, name: str) -> int | None:
    """The number after a name, in a file with one of each a line."""
    try:
        pairs = (line.split() for line in path.read_text("utf8").splitlines())
        return next((int(pair[1]) for pair in pairs if pair[0] == name), None)
    except (OSError, ValueError, IndexError):
        return None
