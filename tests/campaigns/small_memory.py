"""Run models with little memory, and check how the jobs end.

``python -m tests.campaigns.small_memory`` creates a memory cgroup of 1.5 GiB (which needs root and
the memory controller, version 1 or 2; otherwise the exit status is 2). In it, jobs run on the demo
model, on a random model that fits, on one that doesn't, and on the demo model while another process
takes up the memory. Each job must complete, be refused in advance with a one-line message, or be
reported as killed for lack of memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.campaigns.harness import Tally, run_campaign
from tests.conftest import ROOT, save_random_model
from tests.test_memory import limited_cgroup

LIMIT = 3 << 29
PATIENCE_S = 600

#: Starts a job and, once it reaches a stage, another process that takes memory until the job's
#: process, marked as the kernel's first choice, is killed. Prints the final state of the job.
_JOB = """
import json, os, subprocess, sys, time
from pathlib import Path
from lsq_core import jobs

HUNGRY = '''
taken = []
while True:
    taken.append(bytearray(8 << 20))
'''
folder, stage, arguments = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
job, hungry = jobs.start(folder, arguments), None
pid = json.loads((job.folder / "process.json").read_text())["pid"]
Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
while (job := jobs.read(job.folder)).active:
    if stage and job.stage == stage and hungry is None:
        hungry = subprocess.Popen([sys.executable, "-c", HUNGRY])
    time.sleep(0.02)
if hungry is not None:
    hungry.kill()
    hungry.wait()
print(json.dumps([job.state, job.message, job.log_tail(1000)]))
"""

#: Text that a job's final message must contain, by final state.
_ENDS = {
    "done": "Done.",
    "failed": "memory",
    "interrupted": "lack of memory",
}


def large_model(folder: Path, hidden: int, layers: int) -> Path:
    """Save a random model whose blocks have about ``12 * hidden ** 2`` parameters each."""
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    return save_random_model(folder, "llama-gqa", num_attention_heads=8, **sizes)


def ended(folder: Path, arguments: list[str], stage: str) -> tuple[str, str, str]:
    """Run a job within the limit; return its state, message and log."""
    with limited_cgroup(LIMIT) as join:
        found = subprocess.run(
            [*join, sys.executable, "-c", _JOB, str(folder), stage, json.dumps(arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=PATIENCE_S,
            check=False,
        )
    if found.returncode:
        return "", f"exit {found.returncode}: {found.stderr[-300:]}", ""
    state, message, log = json.loads(found.stdout.splitlines()[-1])
    return state, message, log


def campaign(count: int, folder: Path, seed: int, log: Callable[[str], None]) -> Tally:
    """Return the tally of the cases, each with its permitted final states."""
    text = folder / "text.txt"
    text.write_text("\n".join(f"Return the {i}-th item of the list." for i in range(300)), "utf8")
    fits = str(large_model(folder / "fits", 1024, 8))
    beyond = str(large_model(folder / "beyond", 2048, 16))
    cases = {
        "demo": ("demo", "", {"done"}),
        "100 M parameters": (fits, "", {"done", "failed"}),
        "700 M parameters": (beyond, "", {"failed"}),
        "demo, memory taken meanwhile": ("demo", "evaluate", {"interrupted", "failed"}),
    }
    tally = Tally("runs within 1.5 GiB", len(cases))
    for name, (model, stage, states) in cases.items():
        arguments = ["run", "--model", model, "--device", "cpu", "--method", "uniform"]
        arguments += ["--base", "4.25", "--quantizer", "rtn", "--db", str(folder / "lsq.duckdb")]
        arguments += ["--max-tokens", "6000"] if stage else ["--max-tokens", "600"]
        arguments += [] if stage else ["--corpus", str(text)]
        state, message, output = ended(folder / "jobs", arguments, stage)
        log(f"{name}: {state}: {message}")
        if "Traceback" in output:
            tally.add(f"traceback {output.strip().splitlines()[-1]}", name)
        elif state not in states or _ENDS[state] not in message or "\n" in message:
            tally.add(f"{state or 'no end'}: {message}", name)
    return tally


def main() -> int:
    """Run the campaign if a cgroup can be created."""
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with limited_cgroup(LIMIT):
            pass
    except pytest.skip.Exception as reason:
        print(f"Not possible here: {reason}.")
        return 2
    return run_campaign(campaign, 4)


if __name__ == "__main__":
    sys.exit(main())
