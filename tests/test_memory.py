"""Memory limits of containers: cgroups of both versions, nested, and those that set none."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from lsq_core import load, memory
from lsq_core.errors import LsqError
from tests.conftest import ROOT

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A place for cgroup files; ``put`` writes them, and what ``/proc`` says of them."""
    mount = tmp_path / "cgroup"

    def put(version: int, path: str, files: dict[str, str], root: str = "/") -> None:
        membership = {1: f"4:memory:{path}\n0::/other\n", 2: f"0::{path}\n"}[version]
        kind, options = {1: ("cgroup", "rw,memory"), 2: ("cgroup2", "rw")}[version]
        (tmp_path / "self").write_text(membership, "utf8")
        (tmp_path / "mounts").write_text(
            f"30 20 0:25 {root} {mount} rw,nosuid shared:9 - {kind} {kind} {options}\n", "utf8"
        )
        monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "self")
        monkeypatch.setattr(memory, "_MOUNTS", tmp_path / "mounts")
        for name, content in files.items():
            file = mount / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, "utf8")

    return put


def test_a_limit_of_version_2_is_what_is_left(machine):
    machine(
        2,
        "/box",
        {
            "box/memory.max": f"{GIB}\n",
            "box/memory.current": f"{GIB // 2}\n",
            "box/memory.stat": f"anon 5\ninactive_file {GIB // 4}\n",
            "box/memory.events": "low 0\noom 4\noom_kill 3\n",
        },
    )
    assert memory.available_memory() == 3 * GIB // 4
    assert memory.memory_limit() == GIB
    assert memory.oom_kills() == 3


def test_a_limit_of_version_1_is_what_is_left(machine):
    machine(
        1,
        "/box",
        {
            "box/memory.limit_in_bytes": f"{GIB}\n",
            "box/memory.usage_in_bytes": f"{GIB // 2}\n",
            "box/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 8}\n",
            "box/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        },
    )
    assert memory.available_memory() == 5 * GIB // 8
    assert memory.oom_kills() == 2


def test_the_nearest_limit_counts_wherever_it_is_set(machine):
    machine(
        2,
        "/outer/inner",
        {
            "outer/memory.max": f"{GIB}\n",
            "outer/memory.current": f"{GIB - 1000}\n",
            "outer/inner/memory.max": "max\n",
            "outer/inner/memory.current": "5\n",
        },
    )
    assert memory.available_memory() == 1000


def test_within_a_container_the_mount_is_its_own_group(machine):
    """The path in /proc/self/cgroup is of the machine; what is mounted begins at the container."""
    files = {"memory.limit_in_bytes": f"{GIB}", "memory.usage_in_bytes": "0"}
    machine(1, "/docker/abc", files, root="/docker/abc")
    assert memory.available_memory() == min(GIB, psutil.virtual_memory().available)
    machine(1, "/docker/abc", files, root="/")
    assert memory.memory_limit() == GIB


def test_without_a_limit_it_is_the_machines(machine, tmp_path, monkeypatch):
    machine(2, "/", {"memory.stat": "anon 1\n"})
    assert memory.memory_limit() == psutil.virtual_memory().total
    (tmp_path / "vmstat").write_text("nr_free_pages 9\noom_kill 7\n", "utf8")
    monkeypatch.setattr(memory, "_MACHINE", tmp_path / "vmstat")
    assert memory.oom_kills() == 7, "the machine's count"
    monkeypatch.setattr(memory, "_MACHINE", tmp_path / "none")
    assert memory.oom_kills() is None


def test_a_limit_of_version_1_that_is_none_is_none(machine):
    files = {"memory.limit_in_bytes": f"{2**63 - 4096}", "memory.usage_in_bytes": "5"}
    machine(1, "/", files)
    assert memory.memory_limit() == psutil.virtual_memory().total


def test_a_model_beyond_the_limit_is_refused(machine):
    machine(2, "/", {"memory.max": "4000", "memory.current": "0"})
    load.check_memory("small", 900, torch.device("cpu"), torch.float32)
    with pytest.raises(LsqError, match=r"needs .* and cpu has .*limit.*cgroup.*is 3.91 KiB"):
        load.check_memory("large", 1100, torch.device("cpu"), torch.float32)


#: Where a cgroup with a limit can be made for a test, by version.
_PLACES = {1: Path("/sys/fs/cgroup/memory"), 2: Path("/sys/fs/cgroup")}
ASK = """
import os, sys
from lsq_core import memory
before = memory.oom_kills()
print(memory.available_memory() <= 64 << 20, flush=True)
if os.fork() == 0:
    x = bytearray(200 << 20)
    os._exit(0)
print(os.wait()[1], memory.oom_kills() - before)
"""


@contextmanager
def limited(limit: int) -> Iterator[list[str]]:
    """What to put before a command so that it runs in a cgroup with a limit of so many bytes."""
    version = 1 if (_PLACES[1] / memory._FILES[1][0]).exists() else 2
    group = _PLACES[version] / f"lsq-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / memory._FILES[version][0]).write_text(str(limit))
    except OSError:
        if group.exists():
            group.rmdir()
        pytest.skip("making a cgroup needs root and the memory controller")
    try:
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """Delete a cgroup, once the last process in it is gone."""
    deadline = time.monotonic() + 30
    while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    group.rmdir()


def in_group(limit: int, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python script, run in a cgroup with a limit until all it started has ended."""
    with limited(limit) as join:
        command = [*join, sys.executable, "-c", script, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_in_a_real_cgroup_the_limit_is_known_and_a_kill_is_counted():
    """The kernel itself, where this process may make a cgroup."""
    found = in_group(64 << 20, ASK)
    assert found.stdout.split() == ["True", "9", "1"], found.stderr


#: A job whose process takes more than there is, by the worker's own way in.
JOB = """
import sys, time
from pathlib import Path
from lsq_core import jobs
real = jobs.subprocess.Popen
def hungry(command, **options):
    return real([sys.executable, "-c", "x = bytearray(2 << 30)"], **options)
jobs.subprocess.Popen = hungry
job = jobs.start(Path(sys.argv[1]), ["results"])
deadline = time.monotonic() + 60
while (job := jobs.read(job.folder)).active and time.monotonic() < deadline:
    time.sleep(0.05)
print(job.state, job.message)
"""


def test_a_job_killed_by_a_real_cgroup_says_that_it_was_for_memory(tmp_path):
    found = in_group(256 << 20, JOB, str(tmp_path / "jobs"))
    assert found.stdout.startswith("interrupted"), found.stderr
    assert "lack of memory" in found.stdout


def test_a_run_beyond_a_real_cgroups_limit_is_refused_and_the_limit_named():
    found = in_group(512 << 20, REFUSED)
    assert "cgroup's, is 512.00 MiB" in found.stdout, found.stderr


REFUSED = """
import torch
from lsq_core import load
try:
    load.check_memory("large", 10**9, torch.device("cpu"), torch.float32)
except load.LsqError as error:
    print(error)
"""
