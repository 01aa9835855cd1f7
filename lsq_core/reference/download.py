"""Download the published measurements from their public repository, at a pinned revision.

The pin is a git commit. Its name is a hash of its entire content, and git hashes what it receives,
so it can accept only what the authors committed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from lsq_core.errors import LsqError
from lsq_core.progress import ProgressCallback, ignore_progress
from lsq_core.reference.checkout import ERRORS, OBJECTIVES, PLANS, RUNS, SENSITIVITIES, STATISTICS

URL = "https://github.com/schnell18/lm-quant-toolkit"
#: From April 2026, going by the date of the measurements that it adds.
COMMIT = "d878f38ab0c2587ea97fcf83a205f2322474f818"
#: Files to fetch: those that an import reads, and their licence.
WANTED = (
    "/LICENSE",
    f"/{ERRORS}/fnorm-*.csv",
    f"/{STATISTICS}/wdist-*.csv",
    *(f"/{path}" for path in (*SENSITIVITIES, OBJECTIVES, RUNS)),
    f"/{PLANS}/*/*.csv",
)
#: Maximum seconds for one step, and for a connection that is nearly stalled.
STEP, STALL = 300, 20
#: Parts of git's messages if the repository cannot be reached, as opposed to being faulty.
_NO_NETWORK = ("Could not resolve", "Failed to connect", "Couldn't connect", "timed out", "unreach")


def download(
    folder: Path, report: ProgressCallback = ignore_progress, url: str = URL, commit: str = COMMIT
) -> Path:
    """Fetch the files that an import reads into a new folder under ``folder``, and return it.

    The caller deletes it. Needs git, and uses none of the user's settings except git's own (such
    as a proxy).

    Raises
    ------
    LsqError
        If git is missing, there is no network, or the pinned commit was not received intact;
        nothing is left behind.
    """
    if shutil.which("git") is None:
        raise LsqError(
            "Downloading needs git, which is not installed; install it, or give a folder with a "
            f"checkout of {url}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    checkout = Path(tempfile.mkdtemp(prefix="lm-quant-toolkit-", dir=folder))
    steps = (
        ("contacting the repository", ["init", "--quiet"]),
        ("contacting the repository", ["remote", "add", "origin", url]),
        ("finding the files", ["sparse-checkout", "set", "--no-cone", *WANTED]),
        # Fetch file names first, then only the wanted files, since the repository is large.
        ("finding the files", [*_FETCH, commit]),
        ("fetching the files", ["checkout", "--quiet", "--detach", commit]),
    )
    try:
        for done, (message, arguments) in enumerate(steps):
            report("download", done, len(steps), message)
            _git(checkout, arguments, url, commit)
    except BaseException:
        shutil.rmtree(checkout, ignore_errors=True)
        raise
    report("download", len(steps), len(steps), f"{url} at {commit[:12]}")
    return checkout


_FETCH = ["fetch", "--quiet", "--depth=1", "--no-tags", "--filter=blob:none", "origin"]
#: Disables symbolic links and hooks, and rejects malformed objects.
_SETTINGS = {
    "core.symlinks": "false",
    "core.hooksPath": os.devnull,
    "core.autocrlf": "false",
    "transfer.fsckObjects": "true",
    "http.lowSpeedLimit": "1000",
    "http.lowSpeedTime": str(STALL),
}


def _git(checkout: Path, arguments: list[str], url: str, commit: str) -> None:
    settings = [word for key, value in _SETTINGS.items() for word in ("-c", f"{key}={value}")]
    # Never prompt for a password, and allow only the URL's own protocol.
    scheme = url.partition(":")[0]
    quiet = {"GIT_TERMINAL_PROMPT": "0", "GIT_ALLOW_PROTOCOL": scheme, "LC_ALL": "C"}
    outer = {key: value for key, value in os.environ.items() if key not in _REPOSITORY}
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *settings, *arguments],
            env=outer | quiet,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=STEP,
        )
    except subprocess.TimeoutExpired as error:
        raise LsqError(_error_message(url, commit, "connection timed out")) from error
    if done.returncode:
        raise LsqError(_error_message(url, commit, done.stderr))


#: Variables that would point git at a repository it happens to run inside.
_REPOSITORY = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY"}


def _error_message(url: str, commit: str, stderr: str) -> str:
    """Return one sentence on what went wrong, from git's output."""
    lines = [line.partition(": ")[2] or line for line in stderr.strip().splitlines()]
    reason = next((line for line in lines if any(sign in line for sign in _NO_NETWORK)), None)
    if reason is not None:
        reason = reason.rpartition("': ")[2]  # git repeats the URL
        return (
            f"{url} cannot be reached ({reason}); try again with a network, or give a folder "
            "with a checkout of it."
        )
    reason = lines[0] if lines else "git said nothing"
    return (
        f"{url} did not deliver commit {commit[:12]} intact ({reason}), so nothing was imported; "
        "try again, or give a folder with a checkout of it."
    )
