"""Run random command lines of every verb and count the outcomes.

``python -m tests.campaigns.fuzzed_commands [COUNT] [SEED]`` makes COUNT (default 800) command lines
from the parser's own verbs and options, with values that are valid, borderline, absurd or hostile,
and runs each through the command line's entry point on a database with results. A command must
exit with status 0, or with 1 or 2 and a one-sentence message. It must not try to connect to another
host, and the database's original rows must be unchanged at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shlex
import shutil
import sqlite3
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.campaigns.harness import Connections, Tally, outcome, run_campaign

#: Processor-time limit of a command in seconds; some profile or quantize a model.
LIMIT_S = 40
#: Address-space limit of this process, so that an endless file raises an error.
_MEMORY = 16 << 30

#: Values at or beyond the limits of options.
_NUMBERS = (
    *("0", "1", "-1", "2", "7", "64", "1.5", "-0.0", "nan", "inf", "-inf", "1e308", "1e999"),
    *("2147483648", "9223372036854775808", "-9223372036854775809", "1" + "0" * 30, "9" * 5000),
    *("0x10", "1_000", " 4", "٣", "½", "1e3", "+5", "true", "None"),
)
_TEXTS = (
    *("", " ", "\t", "-", "--", "%s", "%(prog)s", "{}", "{0.__class__}", "*", "[", "\\", "null"),
    *(
        "a\nb",
        "\r\n",
        "\x1b[2J\x1b]0;title\x07",
        "\u202etxt.exe",
        "\ufeff",
        "\ud83d",
    ),
    *("\udcff\udcfe", "🦙", "é" * 300, "x" * 70_000, "'; DROP TABLE runs; --", "$(id)", "`id`"),
    *("<b>a</b>", "=1+1", "a=b", "a,b", "a;b", "a:b:c", "@", "#", "~", "~nobody/x", "~no-such/x"),
)
_PATHS = (
    *("no-such", "no/such/file.json", "/", ".", "..", "../..", "/no-such/x", "text.txt/inner"),
    *("empty", "folder", "folder/", "binary.bin", "utf16.txt", "list.json", "deep.json", "zip.zip"),
    *("foreign.sqlite", "foreign.duckdb", "cut.duckdb", "loop", "dangling", "pipe", "zero", "full"),
    *("locked", "locked/inner", "model/config.json", "model/model.safetensors", "saved/lsq.json"),
    *(
        "file:///etc/passwd",
        "C:\\x",
        "x" * 300 + ".csv",
        "new.csv",
        "new.html",
        "new.bib",
        "a\nb.csv",
    ),
)
_NAMES = (
    *("org/model", "hf:org/name", "hf:org/name:config@revision#split", "hf:", "hf:a", "hf:a/b#x"),
    *("http://host.invalid/x", "https://host.invalid/org/model", "s3://bucket/x", "published:x"),
    *("demo", "stdlib", "wikitext2", "auto", "cpu", "cpu:7", "cuda", "cuda:99", "meta", "mps"),
    *("float32", "float16", "float8", "complex64", "strided", "blocks", "all", "block", "full"),
    *("b4g64", "b9g7", "3.51", "99999bpp", "-3bpp", "nanbpp", "1e400GiB", "3.2bpp", "1MiB", "-1%"),
    *("0%", "1%", "1e999%", "*=b4g64", "*=b9g1", "[=b4g64", "=", "*.layers.0.*=b2g64:b8g32"),
)
_PLANNERS = "uniform sensiboost kurtboost mxq kurt-scaled sensi-milp sensi-knapsack high-impact"
#: Valid values of options by their name in the parsed arguments, without the slowest quantizers,
#: which would take minutes.
_VALID = {
    "model": ("model", "model", "model", "saved"),
    "corpus": ("text.txt",),
    "calibration": ("text.txt",),
    "method": (*_PLANNERS.split(), "loss-aware"),
    "base": ("3.51", "4.25", "2.13", "b4g64"),
    "budget": ("3.2bpp", "4bpp", "100KiB", "1MiB"),
    "max_loss": ("1%", "50%"),
    "quantizer": ("rtn", "hqq", "nf4"),
    "profile_quantizer": ("rtn", "hqq"),
    "baseline": ("rtn", "nf4"),
    "metric": ("sensitivity", "sensitivity_module", "kurtosis"),
    "device": ("cpu", "auto"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "protocol": ("strided", "blocks"),
    "metadata": ("8bit", "fp16"),
    "max_tokens": ("100", "300"),
    "samples": ("2", "4"),
    "block_tokens": ("32", "64"),
    "max_new_tokens": ("1", "4"),
    "temperature": ("0", "0.7"),
    "prompt": ("Return the", ""),
    "plan": ("plan.json", "list.json"),
    "save": ("new-model",),
    "out": ("new.json", "new.csv", "new.parquet", "new.html", "new.bib"),
    "saved": ("saved",),
    "run": ("RUN",),
    "target": ("saved", "RUN"),
    "database": ("cut.duckdb", "lsq.duckdb", "foreign.duckdb"),
    "db": ("lsq.duckdb", "lsq.duckdb", "new.duckdb"),
    "cancel": ("20260101-000000-aaaaaa",),
    "id": ("20260101-000000-aaaaaa",),
    "prune": ("20260101-000000-aaaaaa", "saved", "database"),
    "folder": ("folder", "published"),
    "pin": ("*.layers.0.*=b8g64",),
    "tie": ("q_proj,k_proj,v_proj", "q_proj"),
    "serve": ("vllm", "gptqmodel"),
    "ratios": ("uniform", "diagonal", "full"),
    "loss": ("block",),
    "remember": ("1MiB", "0"),
}
#: Options that each verb needs to do anything; each is occasionally left out.
_NEEDED = {
    "inspect": ("model",),
    "profile": ("model", "corpus", "samples", "block_tokens", "quantizer"),
    "plan": ("model", "method", "budget", "calibration", "samples", "block_tokens"),
    "run": ("model", "method", "base", "corpus", "max_tokens", "calibration", "samples"),
    "eval": ("model", "corpus", "max_tokens"),
    "sweep": ("model", "method", "base", "corpus", "max_tokens", "calibration", "samples"),
    "audit": ("target",),
    "generate": ("prompt", "run", "max_new_tokens"),
    "export": ("out",),
    "import-reference": ("folder",),
    "repair": ("database",),
}
#: Options left out: help is inserted separately, and hybrid takes minutes.
_LEFT_OUT = ("help", "hybrid")
#: Invalid options for verbs that would otherwise take minutes or run until stopped.
_ONLY_BAD = {
    "app": ["--port", "99999"],
    "bench": ["--only", "no-such-row"],
}


# --- test folder ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A folder with a database, models and foreign files, and the id of a run in the database."""

    folder: Path
    run: str


def make_place(folder: Path) -> Place:
    """Fill a folder with files for the commands, our own ones made by commands."""
    from tests.campaigns.hostile_models import make_model
    from tests.campaigns.hostile_saved import make_saved
    from tests.test_job_folders import make_finished_job

    make_saved(make_model(folder / "model"), folder / "saved", folder)
    run = json.loads((folder / "saved" / "lsq.json").read_text("utf8"))["run"]
    plan = ["--method", "uniform", "--base", "4.25", "--out", str(folder / "plan.json")]
    status = outcome(["plan", "--model", str(folder / "model"), *plan, "--db", _database(folder)])
    if status != "exit 0":
        raise RuntimeError(f"the plan could not be made: {status}")
    home = make_finished_job(folder / "jobs", "20260101-000000-aaaaaa")
    (home / "progress.json").write_text('{"state": "interrupted"}', "utf8")
    make_finished_job(folder / "jobs", "20260102-000000-bbbbbb")
    _foreign_files(folder)
    return Place(folder, run)


def _database(folder: Path) -> str:
    return str(folder / "lsq.duckdb")


def _foreign_files(folder: Path) -> None:
    """Write foreign and damaged files, folders, links, a pipe and devices."""
    import duckdb

    content = (folder / "lsq.duckdb").read_bytes()
    files = {
        "empty": b"",
        "binary.bin": random.Random(0).randbytes(4096),
        "utf16.txt": "Return the item.".encode("utf16"),
        "list.json": b"[1, 2]",
        "deep.json": b"[" * 200_000,
        "zip.zip": b"PK\x03\x04" + bytes(100),
        "cut.duckdb": content[: len(content) // 2],
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "folder" / "inner").mkdir(parents=True)
    (folder / "published" / "src").mkdir(parents=True)
    (folder / "published" / "data-vis").mkdir()
    with sqlite3.connect(folder / "foreign.sqlite") as connection:
        connection.execute("CREATE TABLE runs (id)")
    with duckdb.connect(str(folder / "foreign.duckdb")) as connection:
        connection.execute("CREATE TABLE schema_version (version VARCHAR)")
        connection.execute("CREATE VIEW runs AS SELECT * FROM read_text('/etc/hostname')")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to(folder / "no-such-target")
    os.mkfifo(folder / "pipe")
    (folder / "locked").mkdir(mode=0)
    for name, minor in (("zero", 5), ("full", 7)):
        with suppress(PermissionError):  # only root makes devices
            os.mknod(folder / name, 0o666 | stat.S_IFCHR, os.makedev(1, minor))


# --- command lines ----------------------------------------------------------------------------


def _verbs() -> dict[str, list[argparse.Action]]:
    """Return the options of every verb, from its parser."""
    from lsq_core.cli.parser import build_parser

    (choices,) = (a.choices for a in build_parser()._actions if isinstance(a.choices, dict))
    return {
        verb: [a for a in parser._actions if a.dest not in _LEFT_OUT]
        for verb, parser in choices.items()
    }


def _value(action: argparse.Action, place: Place, rng: random.Random, valid: float) -> str:
    """Return a value for an option, a valid one with probability ``valid`` or more."""
    meant = _VALID.get(action.dest, _NUMBERS[:8])
    others = (_NUMBERS,) if action.type in (int, float) else (_NUMBERS, _PATHS, _NAMES, meant)
    pool = meant if rng.random() < valid else rng.choice([*others, *others, _TEXTS])
    value = rng.choice(pool)
    return place.run if value == "RUN" else value


def command_line(
    verbs: dict[str, list[argparse.Action]], place: Place, rng: random.Random
) -> list[str]:
    """Return a random command line."""
    verb = rng.choice(sorted(verbs))
    actions = {action.dest: action for action in verbs[verb]}
    bad = rng.choice([0, 1, 1, 2, 5])
    needed = [name for name in _NEEDED.get(verb, ()) if rng.random() < 0.95]
    more = rng.sample(sorted(actions), min(rng.choice([0, 0, 1, 2, 3]), len(actions)))
    chosen = dict.fromkeys([*needed, *more, *rng.choices(["db", "device"], k=1)])
    spoiled = set(rng.sample(sorted(chosen), min(bad, len(chosen))))
    words: list[str] = []
    for name in chosen:
        action = actions.get(name)
        if action is None:
            continue
        value = _value(action, place, rng, 0.1 if name in spoiled else 1)
        if not action.option_strings:
            words.append(value)
        elif action.nargs == 0:
            words.append(action.option_strings[-1])
        else:
            words += rng.choice(
                [[action.option_strings[-1], value]] * 3 + [[_joined(action, value)]]
            )
    words += _ONLY_BAD.get(verb, [])
    if rng.random() < 0.06:
        words.insert(rng.randrange(len(words) + 1), rng.choice([*_TEXTS, "--no-such"]))
    if rng.random() < 0.02:
        words.insert(rng.randrange(len(words) + 1), "--help")
    if rng.random() < 0.03:
        verb = rng.choice([*_TEXTS, "no-such", "job", verb.upper(), verb[:3]])
    if "--db" not in " ".join(words):
        words += ["--db", "lsq.duckdb"]
    return [verb, *words, *rng.choice([["--json"], []])]


def _joined(action: argparse.Action, value: str) -> str:
    return f"{action.option_strings[-1]}={value}"


# --- campaign ---------------------------------------------------------------------------------


def read_rows(database: Path) -> dict[str, list]:
    """Return every row of a database's main tables, as text, by table."""
    from lsq_core.store.store import Store

    store = Store(database)
    tables = ("models", "matrices", "profiles", "scores", "plans", "runs", "evaluations")
    rows = {table: store.query(f"SELECT t::VARCHAR AS row FROM {table} t") for table in tables}
    return {table: sorted(frame["row"]) for table, frame in rows.items()}


def tables_missing_rows(before: dict[str, list], after: dict[str, list]) -> list[str]:
    """Return the tables that lost a row or whose rows changed."""
    return [table for table, rows in before.items() if set(rows) - set(after[table])]


def campaign(count: int, folder: Path, seed: int, log: Callable[[str], None]) -> Tally:
    """Run ``count`` random command lines and return the campaign's row."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.RLIM_INFINITY))
    tally, connections = Tally("fuzzed commands", count), Connections()
    place = make_place(folder / "place")
    before = read_rows(place.folder / "lsq.duckdb")
    whole = folder / "whole"
    shutil.copytree(place.folder / "saved", whole)
    connections.watch()
    verbs = _verbs()
    for number in range(count):
        rng = random.Random(f"{seed}-{number}")
        os.chdir(place.folder)  # the server changes the working directory
        _tidy(place.folder, whole)
        words = command_line(verbs, place, rng)
        kind = outcome(words, LIMIT_S)
        case = f"{number:4} {shlex.join(words)[:200].encode('unicode_escape').decode()}"
        log(f"{case}: {kind}")
        if kind not in ("exit 0", "exit 1", "exit 2", "usage 0", "usage 2"):
            tally.add(kind, case)
        fetched = connections.take()
        for connection in fetched if words[0] != "app" else []:  # it binds to the host it is given
            tally.add(f"fetch: {connection}", case)
    for table in tables_missing_rows(before, read_rows(place.folder / "lsq.duckdb")):
        tally.add(f"lost: rows of {table}")
    return tally


def _tidy(folder: Path, saved: Path) -> None:
    """Restore what a command may have deleted and delete what it may have written."""
    for path in folder.glob("new*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not (folder / "saved").exists():
        shutil.copytree(saved, folder / "saved")


def main() -> int:
    """Run the campaign with its own home, cache and database, and without a network."""
    return run_campaign(_in_own_place, 800)


def _in_own_place(count: int, folder: Path, seed: int, log: Callable[[str], None]) -> Tally:
    own = {"HOME": folder, "HF_HOME": folder / "hf", "LSQ_DB": folder / "own.duckdb"}
    os.environ.update({name: str(path) for name, path in own.items()})
    os.environ["GIT_ALLOW_PROTOCOL"] = "file"  # git downloads fail
    (folder / "place").mkdir()
    os.chdir(folder / "place")
    return campaign(count, folder, seed, log)


if __name__ == "__main__":
    sys.exit(main())
