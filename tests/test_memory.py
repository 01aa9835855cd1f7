"""Memory limits of containers: cgroups of both versions, nested and unlimited."""

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

from lsq_core import memory
from lsq_core.errors import LsqError
from lsq_core.model import loading
from tests.conftest import ROOT

GIB = 1 << 30


@pytest.fixture
def write_cgroup(tmp_path, monkeypatch):
    """Return a function that writes cgroup files, and the ``/proc`` files that refer to them."""
    mount = tmp_path / "cgroup"

    def write_files(version: int, path: str, files: dict[str, str], root: str = "/") -> None:
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

    return write_files


def test_available_memory_cgroup_v2(write_cgroup):
    write_cgroup(
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


def test_available_memory_cgroup_v1(write_cgroup):
    write_cgroup(
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


def test_available_memory_uses_outer_cgroup_limit(write_cgroup):
    write_cgroup(
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


def test_memory_limit_container_mount_root(write_cgroup):
    """The path in /proc/self/cgroup is the machine's; the mount starts at the container."""
    files = {"memory.limit_in_bytes": f"{GIB}", "memory.usage_in_bytes": "0"}
    write_cgroup(1, "/docker/abc", files, root="/docker/abc")
    assert memory.available_memory() == min(GIB, psutil.virtual_memory().available)
    write_cgroup(1, "/docker/abc", files, root="/")
    assert memory.memory_limit() == GIB


def test_memory_limit_without_cgroup_limit(write_cgroup, tmp_path, monkeypatch):
    write_cgroup(2, "/", {"memory.stat": "anon 1\n"})
    assert memory.memory_limit() == psutil.virtual_memory().total
    (tmp_path / "vmstat").write_text("nr_free_pages 9\noom_kill 7\n", "utf8")
    monkeypatch.setattr(memory, "_VMSTAT", tmp_path / "vmstat")
    assert memory.oom_kills() == 7, "the machine's count"
    monkeypatch.setattr(memory, "_VMSTAT", tmp_path / "none")
    assert memory.oom_kills() is None


def test_memory_limit_cgroup_v1_unlimited(write_cgroup):
    files = {"memory.limit_in_bytes": f"{2**63 - 4096}", "memory.usage_in_bytes": "5"}
    write_cgroup(1, "/", files)
    assert memory.memory_limit() == psutil.virtual_memory().total


def test_check_memory_above_cgroup_limit_raises(write_cgroup):
    write_cgroup(2, "/", {"memory.max": "4000", "memory.current": "0"})
    loading.check_memory("small", 900, torch.device("cpu"), torch.float32)
    with pytest.raises(LsqError, match=r"needs .* and cpu has .*limit.*cgroup.*is 3.91 KiB"):
        loading.check_memory("large", 1100, torch.device("cpu"), torch.float32)


#: Folders where a test can create a cgroup with a limit, by version.
_PLACES = {1: Path("/sys/fs/cgroup/memory"), 2: Path("/sys/fs/cgroup")}
OOM_SCRIPT = """
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
def limited_cgroup(limit: int) -> Iterator[list[str]]:
    """Yield a command prefix that runs a command in a cgroup limited to ``limit`` bytes."""
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
    """Delete a cgroup once its last process has ended."""
    deadline = time.monotonic() + 30
    while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    group.rmdir()


def run_in_cgroup(limit: int, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python script in a cgroup with a limit, until all its processes have ended."""
    with limited_cgroup(limit) as join:
        command = [*join, sys.executable, "-c", script, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_real_cgroup_limit_and_oom_kill_count():
    """Uses a real cgroup; skipped if this process may not create one."""
    completed = run_in_cgroup(64 << 20, OOM_SCRIPT)
    assert completed.stdout.split() == ["True", "9", "1"], completed.stderr


#: Starts a job whose process is replaced by one that needs more memory than the limit.
JOB_SCRIPT = """
import sys, time
from pathlib import Path
from lsq_core import jobs
from lsq_core.jobs import control
real = control.subprocess.Popen
def hungry(command, **options):
    return real([sys.executable, "-c", "x = bytearray(2 << 30)"], **options)
control.subprocess.Popen = hungry
job = jobs.start(Path(sys.argv[1]), ["results"])
deadline = time.monotonic() + 60
while (job := jobs.read(job.folder)).active and time.monotonic() < deadline:
    time.sleep(0.05)
print(job.state, job.message)
"""


def test_real_cgroup_oom_killed_job_message(tmp_path):
    completed = run_in_cgroup(256 << 20, JOB_SCRIPT, str(tmp_path / "jobs"))
    assert completed.stdout.startswith("interrupted"), completed.stderr
    assert "lack of memory" in completed.stdout


def test_real_cgroup_check_memory_names_limit():
    completed = run_in_cgroup(512 << 20, CHECK_MEMORY_SCRIPT)
    assert "memory limit (cgroup) is 512.00 MiB" in completed.stdout, completed.stderr


CHECK_MEMORY_SCRIPT = """
import torch
from lsq_core.model import loading as load
try:
    load.check_memory("large", 10**9, torch.device("cpu"), torch.float32)
except load.LsqError as error:
    print(error)
"""
