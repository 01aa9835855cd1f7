"""Evaluate and audit damaged or hostile saved models and count the outcomes.

``python -m tests.campaigns.hostile_saved [COUNT] [SEED]`` mutates the manifest, weights, config or
tokenizer of COUNT (default 139) copies of a small saved model, updates the checksums of half of
them to match, and passes each to ``eval`` and ``audit`` through the command line's entry point.
Outcomes are as in :mod:`tests.campaigns.harness`; a changed model with outdated checksums must not
be evaluated.
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

MANIFEST_FILE, WEIGHTS = "lsq.json", "packed.safetensors"


# --- mutations --------------------------------------------------------------------------------


def change_manifest_value(folder: Path, rng: random.Random) -> str:
    """Set a random entry of lsq.json to an odd value."""
    return models.change_json(folder / MANIFEST_FILE, rng)


def remove_manifest_key(folder: Path, rng: random.Random) -> str:
    """Remove a key from lsq.json or from one of its modules."""
    path = folder / MANIFEST_FILE
    content = json.loads(path.read_text("utf8"))
    holder = content if rng.random() < 0.6 else rng.choice(list(content["modules"].values()))
    key = rng.choice(sorted(holder))
    del holder[key]
    path.write_text(json.dumps(content), "utf8")
    return f"lsq.json without {key}"


def change_manifest_plan(folder: Path, rng: random.Random) -> str:
    """Change a module or a setting in lsq.json."""
    path = folder / MANIFEST_FILE
    content = json.loads(path.read_text("utf8"))
    modules = content["modules"]
    name = rng.choice(sorted(modules))
    changes = {
        "removed": lambda: modules.pop(name),
        "renamed": lambda: modules.update({"model.layers.99.x": modules.pop(name)}),
        "escape": lambda: modules.update({"\x1b[2J\n": modules.pop(name)}),
        "bits": lambda: modules[name].update(bits=rng.choice([2, 3, 8, 16, 5, -1])),
        "group": lambda: modules[name].update(group_size=rng.choice([32, 128, 7, 0])),
        "mixed": lambda: modules[name].update(high_bits=3, ratio=0.1, bits=2),
        "axis": lambda: content.update(axis=1 - content["axis"]),
        "metadata": lambda: content.update(metadata="fp16"),
        "quantizer": lambda: content.update(quantizer=rng.choice(["gptq", "nf4", "none", "../x"])),
        "format": lambda: content.update(format=rng.choice([0, 1, 3, "2", None, 2.5])),
        "size": lambda: content.update(planned_bytes=2**70),
        "run": lambda: content.update(run=rng.choice(["", 7, "x" * 5000, None])),
    }
    which = rng.choice(sorted(changes))
    changes[which]()
    path.write_text(json.dumps(content), "utf8")
    return f"lsq.json with other {which}"


def spoil_text_file(folder: Path, rng: random.Random) -> str:
    """Empty or truncate a text file, or replace its content with malformed text."""
    names = [MANIFEST_FILE, MANIFEST_FILE, "config.json", "tokenizer.json", "tokenizer_config.json"]
    return models.spoil_text(folder / rng.choice(names), rng)


def flip_weight_bytes(folder: Path, rng: random.Random) -> str:
    """Flip a bit in every 37th byte of the weights."""
    path = folder / WEIGHTS
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little") + rng.randrange(37)
    for at in range(start, len(content), 37):
        content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return "every 37th byte of the weights"


def change_weights_header(folder: Path, rng: random.Random) -> str:
    """Change a tensor's entry in the header of the weights file."""
    return models.change_header(folder / WEIGHTS, rng)


def damage_weights_file(folder: Path, rng: random.Random) -> str:
    """Change the header's length, flip a bit near the start, or truncate the weights file."""
    (folder / "model.safetensors").symlink_to(folder / WEIGHTS)
    try:
        way = rng.choice([models.change_header_length, models.flip_header_bit])
        return way(folder, rng)
    finally:
        (folder / "model.safetensors").unlink()


def change_config(folder: Path, rng: random.Random) -> str:
    """Change a size in config.json, or set a key to an odd value."""
    return rng.choice(
        [models.change_config_size, models.change_config_value, models.add_config_key]
    )(folder, rng)


def change_tokenizer(folder: Path, rng: random.Random) -> str:
    """Set a random entry of a tokenizer file to an odd value."""
    return models.change_tokenizer_value(folder, rng)


def replace_or_remove_file(folder: Path, rng: random.Random) -> str:
    """Remove a file, replace it with a folder or link, or extend it to 2 GiB."""
    names = [WEIGHTS, "config.json", "tokenizer.json", MANIFEST_FILE, "tokenizer_config.json"]
    path = folder / rng.choice(names)
    way = rng.choice(["gone", "a folder", "a link", "huge"])
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


def generation(folder: Path, rng: random.Random) -> str:
    """Write a malformed generation_config.json."""
    path = folder / "generation_config.json"
    text = rng.choice(['{"max_length": "x"}', "[", "null", '{"eos_token_id": {}}', '{"a": ' * 9000])
    path.write_text(text, "utf8")
    return f"generation_config.json is {text[:20]}"


MUTATIONS: tuple[models.Mutation, ...] = (
    change_manifest_value,
    flip_weight_bytes,
    change_manifest_plan,
    change_weights_header,
    change_config,
    remove_manifest_key,
    damage_weights_file,
    replace_or_remove_file,
    change_manifest_value,
    spoil_text_file,
    change_tokenizer,
    change_manifest_plan,
    generation,
)


def update_checksums(folder: Path) -> None:
    """Update the checksums to match the files, as an attacker would."""
    from lsq_core.quantized.manifest import with_checksums

    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_text("utf8"))
        del content["sha256"]
        path.write_text(json.dumps(with_checksums(content, folder)), "utf8")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # too damaged for checksums; leave it as it is


# --- campaign ---------------------------------------------------------------------------------


def make_saved(model: Path, folder: Path, data: Path) -> Path:
    """Save a model at 4 bits via the command line, with the database in ``data``."""
    from lsq_core.cli.program import main

    text = models.make_text(data / "text.txt")
    plan = ["--method", "uniform", "--budget", "b4g64", "--quantizer", "rtn"]
    corpus = ["--corpus", str(text), "--max-tokens", "100"]
    output = ["--save", str(folder), "--db", str(data / "lsq.duckdb")]
    if main(["run", "--model", str(model), *plan, *corpus, *output, "--json"]) != 0:
        raise RuntimeError("the model could not be saved")
    return folder


def _is_unchanged(copy: Path, original: Path) -> bool:
    """Return whether a copy's manifest has the same content and its other files are unchanged."""
    rest = [path.name for path in original.iterdir() if path.name != MANIFEST_FILE]
    try:
        if any((copy / n).stat().st_size != (original / n).stat().st_size for n in rest):
            return False
        touched = [n for n in rest if (copy / n).read_bytes() != (original / n).read_bytes()]
        manifests = [json.loads((f / MANIFEST_FILE).read_bytes()) for f in (copy, original)]
    except (OSError, ValueError, RecursionError):
        return False
    return not touched and repr(manifests[0]) == repr(manifests[1])


def campaign(
    count: int, folder: Path, seed: int = 0, log: Callable[[str], None] = lambda _: None
) -> Counter[str]:
    """Count the outcomes of ``eval`` and ``audit`` on ``count`` hostile saved models."""
    original = make_saved(models.make_model(folder / "model"), folder / "saved", folder)
    shutil.copy(folder / "model" / "model.safetensors", folder / models.SECRET)
    sys.addaudithook(models.WATCH)
    models.WATCH.secret, models.WATCH.seen = models.SECRET, 0
    counts: Counter[str] = Counter()
    for number in range(count):
        rng = random.Random(f"{seed}-{number}")
        copy = folder / "hostile"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(original, copy)
        what = MUTATIONS[number % len(MUTATIONS)](copy, rng)
        # Some changes set the value that was already there, or write a file that nothing reads.
        unused = "generation" in what or "sha256" in what
        changed = not unused and not _is_unchanged(copy, original)
        signed = number % 2 == 1
        if signed:
            update_checksums(copy)
        # If the store knows the run, its stored plan is used; otherwise the one in the folder.
        database = ["--db", str(folder / rng.choice(["lsq.duckdb", "other.duckdb"])), "--json"]
        text = ["--corpus", str(folder / "text.txt"), "--max-tokens", "100"]
        verbs = {
            "eval": ["eval", "--model", str(copy), *text, *database],
            "audit": ["audit", str(copy), *database],
        }
        for verb, arguments in verbs.items():
            kind = outcome(arguments)
            if verb == "eval" and kind == "exit 0" and changed and not signed:
                kind = "lost: changed files were evaluated"
            counts[f"{verb}: {kind}"] += 1
            counts["failed"] += failed(kind)
            log(f"{number:4} {verb:6} {what}{', signed again' if signed else ''}: {kind}")
    counts["reads outside"] = models.WATCH.seen
    models.WATCH.secret = ""
    return counts


def run(count: int, folder: Path, seed: int, log: Callable[[str], None]) -> Tally:
    """Run the campaign and return its row."""
    endings = models.bad_endings(campaign(count, folder, seed, log))
    return Tally.of("hostile saved models", count, endings)


if __name__ == "__main__":
    sys.exit(run_campaign(run, 139))
