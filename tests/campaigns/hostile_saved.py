"""Evaluate and audit saved models that were damaged or made to do harm, and count how it ends.

``python -m tests.campaigns.hostile_saved [COUNT] [SEED]`` mutates COUNT (139) copies of a small
saved model by its manifest, weights, config and tokenizer, half of them with checksums that agree
with the change again, and gives each to ``eval`` and ``audit`` through the command line's own
entry. Outcomes are as in :mod:`tests.campaigns.harness`; a changed file whose checksum
doesn't agree may not be evaluated.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.campaigns import hostile_models as models
from tests.campaigns.harness import Tally, failed, outcome, run_campaign

MANIFEST, WEIGHTS = "lsq.json", "packed.safetensors"


# --- what is mutated --------------------------------------------------------------------------


def in_manifest(folder: Path, source: random.Random) -> str:
    """One entry of lsq.json, at any depth, gets an odd value."""
    return models.change_json(folder / MANIFEST, source)


def without_key(folder: Path, source: random.Random) -> str:
    """lsq.json loses a key, or a module one of its."""
    path = folder / MANIFEST
    content = json.loads(path.read_text("utf8"))
    holder = content if source.random() < 0.6 else source.choice(list(content["modules"].values()))
    key = source.choice(sorted(holder))
    del holder[key]
    path.write_text(json.dumps(content), "utf8")
    return f"lsq.json without {key}"


def other_plan(folder: Path, source: random.Random) -> str:
    """lsq.json plans something else than is stored."""
    path = folder / MANIFEST
    content = json.loads(path.read_text("utf8"))
    modules = content["modules"]
    name = source.choice(sorted(modules))
    changes = {
        "removed": lambda: modules.pop(name),
        "renamed": lambda: modules.update({"model.layers.99.x": modules.pop(name)}),
        "escape": lambda: modules.update({"\x1b[2J\n": modules.pop(name)}),
        "bits": lambda: modules[name].update(bits=source.choice([2, 3, 8, 16, 5, -1])),
        "group": lambda: modules[name].update(group_size=source.choice([32, 128, 7, 0])),
        "mixed": lambda: modules[name].update(high_bits=3, ratio=0.1, bits=2),
        "axis": lambda: content.update(axis=1 - content["axis"]),
        "metadata": lambda: content.update(metadata="fp16"),
        "quantizer": lambda: content.update(
            quantizer=source.choice(["gptq", "nf4", "none", "../x"])
        ),
        "format": lambda: content.update(format=source.choice([0, 1, 3, "2", None, 2.5])),
        "size": lambda: content.update(planned_bytes=2**70),
        "run": lambda: content.update(run=source.choice(["", 7, "x" * 5000, None])),
    }
    which = source.choice(sorted(changes))
    changes[which]()
    path.write_text(json.dumps(content), "utf8")
    return f"lsq.json with other {which}"


def spoiled(folder: Path, source: random.Random) -> str:
    """A text file is emptied, cut, replaced or nested."""
    names = [MANIFEST, MANIFEST, "config.json", "tokenizer.json", "tokenizer_config.json"]
    return models.spoil_text(folder / source.choice(names), source)


def weights_flipped(folder: Path, source: random.Random) -> str:
    """Every 37th byte of the weights is turned over."""
    path = folder / WEIGHTS
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little") + source.randrange(37)
    for at in range(start, len(content), 37):
        content[at] ^= 1 << source.randrange(8)
    path.write_bytes(content)
    return "every 37th byte of the weights"


def header_changed(folder: Path, source: random.Random) -> str:
    """The weights' header says something else of a tensor."""
    return models.change_header(folder / WEIGHTS, source)


def weights_damaged(folder: Path, source: random.Random) -> str:
    """The header's length, a bit of it, or the length of the file is another."""
    (folder / "model.safetensors").symlink_to(folder / WEIGHTS)
    try:
        way = source.choice([models.header_length, models.flipped])
        return way(folder, source)
    finally:
        (folder / "model.safetensors").unlink()


def config_changed(folder: Path, source: random.Random) -> str:
    """config.json counts otherwise, or says something odd."""
    return source.choice([models.sized, models.in_config, models.more_in_config])(folder, source)


def tokenizer_changed(folder: Path, source: random.Random) -> str:
    """A key of the tokenizer's files gets an odd value."""
    return models.in_tokenizer(folder, source)


def part_missing(folder: Path, source: random.Random) -> str:
    """A file is gone, a folder, a link or of 2 GiB."""
    names = [WEIGHTS, "config.json", "tokenizer.json", MANIFEST, "tokenizer_config.json"]
    path = folder / source.choice(names)
    way = source.choice(["gone", "a folder", "a link", "huge"])
    if way == "huge":
        with path.open("r+b") as file:
            file.truncate(2 * 2**30)
        return f"{path.name} of 2 GiB"
    path.unlink()
    if way == "a folder":
        path.mkdir()
    elif way == "a link":
        path.symlink_to(folder.parent / models.SECRET)
    return f"{path.name} is {way}"


def generation(folder: Path, source: random.Random) -> str:
    """How texts are generated is odd."""
    path = folder / "generation_config.json"
    text = source.choice(
        ['{"max_length": "x"}', "[", "null", '{"eos_token_id": {}}', '{"a": ' * 9000]
    )
    path.write_text(text, "utf8")
    return f"generation_config.json is {text[:20]}"


MUTATIONS: tuple[models.Mutation, ...] = (
    in_manifest,
    weights_flipped,
    other_plan,
    header_changed,
    config_changed,
    without_key,
    weights_damaged,
    part_missing,
    in_manifest,
    spoiled,
    tokenizer_changed,
    other_plan,
    generation,
)


def sign_again(folder: Path) -> None:
    """Have the checksums agree with the files, as whoever means harm would."""
    from lsq_core.quantize.manifest import with_checksums

    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text("utf8"))
        del content["sha256"]
        path.write_text(json.dumps(with_checksums(content, folder)), "utf8")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # damaged past signing, which is how it stays


# --- how it ends ------------------------------------------------------------------------------


def make_saved(model: Path, folder: Path, data: Path) -> Path:
    """Save a model at 4 bits by the command line, its database in ``data``."""
    from lsq_core.cli import main

    text = models.make_text(data / "text.txt")
    plan = ["--method", "uniform", "--budget", "b4g64", "--quantizer", "rtn"]
    corpus = ["--corpus", str(text), "--max-tokens", "100"]
    place = ["--save", str(folder), "--db", str(data / "lsq.duckdb")]
    if main(["run", "--model", str(model), *plan, *corpus, *place, "--json"]) != 0:
        raise RuntimeError("the model could not be saved")
    return folder


def _same(copy: Path, whole: Path) -> bool:
    """Whether a manifest says the same as another, and no file beside it was touched."""
    rest = [path.name for path in whole.iterdir() if path.name != MANIFEST]
    try:
        if any((copy / n).stat().st_size != (whole / n).stat().st_size for n in rest):
            return False
        touched = [n for n in rest if (copy / n).read_bytes() != (whole / n).read_bytes()]
        manifests = [json.loads((folder / MANIFEST).read_bytes()) for folder in (copy, whole)]
    except (OSError, ValueError, RecursionError):
        return False
    return not touched and repr(manifests[0]) == repr(manifests[1])


def campaign(
    count: int, folder: Path, seed: int = 0, tell: Callable[[str], None] = lambda _: None
) -> Counter[str]:
    """Outcomes of ``eval`` and ``audit`` of ``count`` hostile saved models."""
    whole = make_saved(models.make_model(folder / "model"), folder / "saved", folder)
    shutil.copy(folder / "model" / "model.safetensors", folder / models.SECRET)
    sys.addaudithook(models.WATCH)
    models.WATCH.secret, models.WATCH.seen = models.SECRET, 0
    found: Counter[str] = Counter()
    for number in range(count):
        source = random.Random(f"{seed}-{number}")
        copy = folder / "hostile"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        what = MUTATIONS[number % len(MUTATIONS)](copy, source)
        # Some changes put the value that is there already, or a file that nothing reads.
        changed = "generation" not in what and "sha256" not in what and not _same(copy, whole)
        signed = number % 2 == 1
        if signed:
            sign_again(copy)
        # Of a run that the store knows the kept plan holds; of others the one in the folder.
        database = ["--db", str(folder / source.choice(["lsq.duckdb", "other.duckdb"])), "--json"]
        text = ["--corpus", str(folder / "text.txt"), "--max-tokens", "100"]
        verbs = {
            "eval": ["eval", "--model", str(copy), *text, *database],
            "audit": ["audit", str(copy), *database],
        }
        for verb, arguments in verbs.items():
            kind = outcome(arguments)
            if verb == "eval" and kind == "exit 0" and changed and not signed:
                kind = "lost: changed files were evaluated"
            found[f"{verb}: {kind}"] += 1
            found["failed"] += failed(kind)
            tell(f"{number:4} {verb:6} {what}{', signed again' if signed else ''}: {kind}")
    found["reads outside"] = models.WATCH.seen
    models.WATCH.secret = ""
    return found


def tallied(count: int, folder: Path, seed: int, tell: Callable[[str], None]) -> Tally:
    """The campaign's row."""
    endings = models.bad_endings(campaign(count, folder, seed, tell))
    return Tally.of("hostile saved models", count, endings)


if __name__ == "__main__":
    sys.exit(run_campaign(tallied, 139))
