"""Downloading published measurements from a local git server, intact or tampered with."""

from __future__ import annotations

import functools
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest

from lsq_core.bits import LADDER
from lsq_core.cli.program import main
from lsq_core.errors import InputError, LsqError
from lsq_core.reference import download as downloads
from lsq_core.reference.checkout import ERRORS, OBJECTIVES, PLANS, RUNS, SENSITIVITIES, STATISTICS
from lsq_core.reference.importing import import_download
from lsq_core.store.store import Store

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")

TYPES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
TYPES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NUMEL = 128 * 128


def write_toolkit(root: Path) -> None:
    """Write a made-up toolkit with one two-layer model, in the real toolkit's paths and columns."""
    modules = [(layer, kind) for layer in range(2) for kind in TYPES]
    errors = [
        (layer, kind, c.bits, c.group_size, 8, 128, 10 / c.nominal_bits, NUMEL, 3.5, 1e-6)
        for layer, kind in modules
        for c in LADDER
    ]
    names = ["layer", "module", "nbit1", "gsize1", "nbit2", "gsize2", "fnorm", "params"]
    names += ["kurtosis", "sensitivity"]
    plan = [("tiny", k, i, 3.13, 3, 128, 8, 128, 14 * NUMEL + 512) for i, k in modules]
    runs = [("tiny", "fp16", "base", 16.0, "", 5.0, 7.0, 1.0, 1.0, "")]
    runs += [("tiny", "hqq", "b3g128", 3.13, "", 6.0, 8.0, 1.0, 1.0, 2.0)]
    scores = [("pileval", "attn_in", "tiny", 4, 64, 0, 1e-6)]
    part = "dataset part model nbits group_size layer sensitivity"
    run = "model algo config bpp attempt ppl_wikitext ppl_c4 load_mem_allot model_storage_size"
    tables = {
        f"{ERRORS}/fnorm-tiny.csv": (errors, names),
        f"{STATISTICS}/wdist-tiny.csv": ([(0, TYPES[0], 3.5)], ["layer", "module", "kurtosis"]),
        OBJECTIVES: ([("tiny", 3.13, 44.0)], ["model", "bpp", "fnorm"]),
        f"{PLANS}/sensi-boost-2-0/allot.csv": (
            plan,
            ["model", "module", "layer", "bit_budget", "b1", "g1", "b2", "g2", "params_all_tot"],
        ),
        RUNS: (runs, [*run.split(), "quant_duration"]),
        **{path: (scores, part.split()) for path in SENSITIVITIES},
        SENSITIVITIES[1]: ([("hqq", *scores[0])], ["quant_method", *part.split()]),
        "data-vis/pdfs/large.csv": ([("not", "wanted")], ["a", "b"]),
    }
    for path, (rows, columns) in tables.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows, columns=columns).to_csv(root / path, index=False)
    (root / "LICENSE").write_text("MIT", "utf8")


def git(folder: Path, *words: str) -> str:
    plain = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    names = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    command = ["git", "-C", str(folder), *names, *words]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | plain
    )
    return done.stdout.strip()


@pytest.fixture
def toolkit(tmp_path: Path) -> tuple[Path, str]:
    """The made-up toolkit as a git repository, and its commit."""
    folder = tmp_path / "served" / "toolkit"
    write_toolkit(folder)
    git(folder, "init", "--quiet")
    for setting in ("uploadpack.allowFilter", "uploadpack.allowAnySHA1InWant"):
        git(folder, "config", setting, "true")
    return folder, commit_all(folder)


def commit_all(folder: Path) -> str:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "measurements")
    return git(folder, "rev-parse", "HEAD")


class GitServer:
    """Serves git repositories over HTTP; its answers can be tampered with."""

    def __init__(self, root: Path) -> None:
        self.tamper: Callable[[bytes], bytes] = lambda answer: answer
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(b"")

            def do_POST(self) -> None:
                self.answer(self.rfile.read(int(self.headers["Content-Length"])))

            def answer(self, body: bytes) -> None:
                path, _, query = self.path.partition("?")
                variables = {
                    "GIT_PROJECT_ROOT": str(root),
                    "GIT_HTTP_EXPORT_ALL": "1",
                    "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
                    "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
                    "CONTENT_TYPE": self.headers.get("Content-Type", ""),
                    "CONTENT_LENGTH": str(len(body)),
                    "REQUEST_METHOD": self.command,
                    "PATH_INFO": path,
                    "QUERY_STRING": query,
                    # trust the folder whoever owns it
                    "GIT_CONFIG_COUNT": "1",
                    "GIT_CONFIG_KEY_0": "safe.directory",
                    "GIT_CONFIG_VALUE_0": "*",
                }
                done = subprocess.run(
                    ["git", "http-backend"],
                    input=body,
                    env=os.environ | variables,
                    capture_output=True,
                    check=True,
                )
                head, _, content = done.stdout.partition(b"\r\n\r\n")
                fields = [line.split(": ", 1) for line in head.decode().splitlines()]
                status = next((v for k, v in fields if k == "Status"), "200 OK")
                self.send_response(int(status.split()[0]))
                for name, value in fields:
                    if name != "Status":
                        self.send_header(name, value)
                content = served.tamper(content)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Log nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/toolkit/.git"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(10)


@pytest.fixture
def host(toolkit: tuple[Path, str]) -> Iterator[GitServer]:
    served = GitServer(toolkit[0].parent)
    yield served
    served.close()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data" / "lsq.duckdb")


def nothing_imported(store: Store) -> bool:
    """Return whether nothing was imported and no checkout folder was left behind."""
    return store.models("published").empty and os.listdir(store.path.parent) == [store.path.name]


def test_import_download_pinned_commit(toolkit, host, store):
    updates = []
    result = import_download(store, lambda *words: updates.append(words), host.url, toolkit[1])
    assert result["source"] == f"{host.url} at {toolkit[1][:12]}"
    assert result["models"] == ["published:tiny"]
    assert store.results(origin="published")["perplexity"].tolist() == [6.0, 8.0]
    assert os.listdir(store.path.parent) == [store.path.name]
    assert [stage for stage, *_ in updates].count("import") == 4
    assert {"download", "import"} == {stage for stage, *_ in updates}


def test_download_fetches_only_needed_files(toolkit, host, tmp_path):
    folder = downloads.download(tmp_path / "data", url=host.url, commit=toolkit[1])
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    files = {name for name in files if not name.startswith(".git/")}
    assert {f"{ERRORS}/fnorm-tiny.csv", RUNS, "LICENSE"} <= files
    assert "data-vis/pdfs/large.csv" not in files
    for name in files:
        assert (folder / name).read_bytes() == (toolkit[0] / name).read_bytes()
    unwanted = git(toolkit[0], "rev-parse", "HEAD:data-vis/pdfs/large.csv")
    stored_objects = git(folder, "cat-file", "--batch-check", "--batch-all-objects")
    assert unwanted not in stored_objects


def test_import_download_corrupted_pack_raises(toolkit, host, store):
    """A flipped bit in a pack changes the content, so its hash is not the requested one."""

    def corrupt_pack(answer: bytes) -> bytes:
        at = answer.find(b"PACK")
        if at < 0:
            return answer
        changed = bytearray(answer)
        changed[at + 20] ^= 1
        return bytes(changed)

    host.tamper = corrupt_pack
    with pytest.raises(LsqError, match=f"{toolkit[1][:12]}.*nothing was imported"):
        import_download(store, url=host.url, commit=toolkit[1])
    assert nothing_imported(store)


def test_import_download_corrupted_source_raises(toolkit, host, store):
    name = git(toolkit[0], "rev-parse", f"HEAD:{RUNS}")
    blob = toolkit[0] / ".git" / "objects" / name[:2] / name[2:]
    blob.chmod(0o644)
    blob.write_bytes(b"something else")
    with pytest.raises(LsqError, match=toolkit[1][:12]):
        import_download(store, url=host.url, commit=toolkit[1])
    assert nothing_imported(store)


def test_import_download_pinned_commit_after_new_commits(toolkit, host, store):
    (toolkit[0] / RUNS).write_text("rewritten", "utf8")
    commit_all(toolkit[0])
    result = import_download(store, url=host.url, commit=toolkit[1])
    assert result["counts"]["runs"] == 1


def test_import_download_unknown_commit_raises(host, store):
    with pytest.raises(LsqError, match=r"\b0{12}\b"):
        import_download(store, url=host.url, commit="0" * 40)
    assert nothing_imported(store)


def test_import_download_missing_file_raises(toolkit, host, store):
    git(toolkit[0], "rm", "--quiet", RUNS)
    with pytest.raises(InputError, match=f"not a checkout .*{RUNS}"):
        import_download(store, url=host.url, commit=commit_all(toolkit[0]))
    assert nothing_imported(store)


def test_import_download_offline_raises(store):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/toolkit"
        with pytest.raises(LsqError) as caught:
            import_download(store, url=url)
    assert "cannot be reached" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert nothing_imported(store)


def test_import_download_without_git_raises(store, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LsqError, match=r"git.* not installed"):
        import_download(store)
    assert nothing_imported(store)


def test_download_url_and_commit_constants():
    assert downloads.URL.startswith("https://github.com/")
    assert len(downloads.COMMIT) == 40
    assert int(downloads.COMMIT, 16)


def test_cli_import_reference_download(toolkit, host, store, monkeypatch, capsys):
    pinned = functools.partial(import_download, url=host.url, commit=toolkit[1])
    monkeypatch.setattr("lsq_core.reference.importing.import_download", pinned)
    assert main(["import-reference", "--download", "--db", str(store.path)]) == 0
    assert f"{host.url} at {toolkit[1][:12]}: 1 models" in capsys.readouterr().out
    for words in ([], ["somewhere", "--download"]):
        with pytest.raises(SystemExit) as ended:
            main(["import-reference", *words])
        assert ended.value.code == 2
