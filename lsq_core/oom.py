"""How often the system killed a process for lack of memory, as Linux counts it."""

from __future__ import annotations

from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def oom_kills(cgroups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Processes killed for lack of memory so far in this process's container; None if unknown.

    Read from the memory controller of its control group (cgroup v2 ``memory.events``, v1
    ``memory.oom_control``), or of the whole machine where it has none (``/proc/vmstat``). A
    difference of two readings tells of kills between them.
    """
    for path in (*_event_files(cgroups, own), Path("/proc/vmstat")):
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        for line in lines:
            name, _, count = line.partition(" ")
            if name == "oom_kill" and count.strip().isdigit():
                return int(count)
    return None


def _event_files(cgroups: Path, own: Path) -> list[Path]:
    """Where this process's control group counts kills; in a container its root is the group."""
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except (OSError, UnicodeDecodeError):
        groups = []
    found = []
    for _, controllers, group in (parts for parts in groups if len(parts) == 3):
        if not controllers:
            found.append(cgroups / group.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            found.append(cgroups / "memory" / group.lstrip("/") / "memory.oom_control")
    roots = [cgroups / "memory.events", cgroups / "memory" / "memory.oom_control"]
    return [*found, *roots]
