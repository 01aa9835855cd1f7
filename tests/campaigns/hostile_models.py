"""Inspect and evaluate hostile models and count the outcomes.

``python -m tests.campaigns.hostile_models [COUNT] [SEED]`` mutates the config, safetensors header,
index or tokenizer of COUNT (default 142) copies of a small model, and passes each to ``inspect``
and ``eval`` through the command line's entry point. Each must end with an exit status and, if it
fails, one sentence. A traceback, an ending without a sentence, more than 20 seconds, or a read
outside the folder is a fault.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.campaigns.harness import Tally, failed, outcome, run_campaign

#: A file next to the model's folder that nothing may read.
SECRET = "secret.safetensors"
#: Odd values to put into a JSON file.
ODD = (
    None,
    "many",
    "",
    0,
    -1,
    1.5,
    10**5,
    10**9,
    10**30,
    float("nan"),
    float("inf"),
    True,
    [],
    [1, 2],
    {},
    {"a": None},
)

Mutation = Callable[[Path, random.Random], str]


# --- mutations --------------------------------------------------------------------------------


def change_config_value(folder: Path, rng: random.Random) -> str:
    """Set a random entry of config.json to an odd value."""
    return change_json(folder / "config.json", rng)


def remove_config_key(folder: Path, rng: random.Random) -> str:
    """Remove a key from config.json."""
    path = folder / "config.json"
    content = json.loads(path.read_text("utf8"))
    key = rng.choice(sorted(content))
    del content[key]
    path.write_text(json.dumps(content), "utf8")
    return f"config.json without {key}"


def add_config_key(folder: Path, rng: random.Random) -> str:
    """Set a key in config.json that some architectures have."""
    keys = (
        ("layer_types", ["full_attention"] * 3),
        ("num_labels", 10**9),
        ("quantization_config", {"quant_method": 3}),
        ("auto_map", {"AutoConfig": "../evil.Config"}),
        ("text_config", 4),
        ("rope_scaling", {"rope_type": "yarn", "factor": "x"}),
        ("tie_word_embeddings", "no"),
        ("architectures", 7),
        ("model_type", rng.choice(["bert", "t5", "llama4", "no-such", "mamba2", 5, "gpt2"])),
        ("torch_dtype", "complex64"),
        ("sliding_window", "x"),
        ("_attn_implementation", "flash_attention_2"),
        ("pruned_heads", {"0": [0]}),
        ("id2label", "x"),
    )
    key, value = rng.choice(keys)
    path = folder / "config.json"
    content = json.loads(path.read_text("utf8")) | {key: value}
    path.write_text(json.dumps(content), "utf8")
    return f"config.json with {key}={str(value)[:40]}"


def change_config_size(folder: Path, rng: random.Random) -> str:
    """Change one of the sizes in config.json, and so the shapes of modules."""
    sizes = [
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
    ]
    key = rng.choice(sizes)
    value = rng.choice([0, 1, 3, 7, 1000, 5000, 10**5, 10**6, 10**7, 10**9, 2**62, 2**63])
    path = folder / "config.json"
    content = json.loads(path.read_text("utf8")) | {key: value}
    path.write_text(json.dumps(content), "utf8")
    return f"config.json with {key}={value}"


def spoil_json_file(folder: Path, rng: random.Random) -> str:
    """Spoil one of the model's JSON files, as :func:`spoil_text` does."""
    path = folder / rng.choice(["config.json", "tokenizer.json", "tokenizer_config.json"])
    if path.name != "config.json" and not path.is_file():
        path = folder / "config.json"
    return spoil_text(path, rng)


def spoil_text(path: Path, rng: random.Random) -> str:
    """Empty or truncate a text file, or replace its content with malformed text."""
    original = path.read_bytes()
    variants = {
        "empty": b"",
        "cut": original[: rng.randrange(len(original))],
        "a list": b"[1, 2]",
        "null": b"null",
        "a number": b"17",
        "nested": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "nested lists": b"[" * 200_000,
        "not UTF-8": original[:20] + b"\xff\xfe" + original[20:],
        "zeros": bytes(len(original)),
        "a long number": b'{"hidden_size": ' + b"9" * 10_000 + b"}",
    }
    name = rng.choice(sorted(variants))
    path.write_bytes(variants[name])
    return f"{path.name} is {name}"


def write_huge_file(folder: Path, rng: random.Random) -> str:
    """Extend or create a sparse file of 2 GiB."""
    names = [
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "tokenizer_config.json",
    ]
    name = rng.choice(names)
    with (folder / name).open("r+b" if (folder / name).is_file() else "wb") as file:
        file.truncate(2 * 2**30)
    return f"{name} of 2 GiB"


def change_weights_header(folder: Path, rng: random.Random) -> str:
    """Change a tensor's entry in the safetensors header."""
    return change_header(folder / "model.safetensors", rng)


def change_header_length(folder: Path, rng: random.Random) -> str:
    """Change the header's length; for 200 MB and 8 GiB the file is extended to match (sparse)."""
    path = folder / "model.safetensors"
    length = rng.choice([0, 1, 2**20, 200_000_000, 8 * 2**30, 2**63, 2**64 - 1])
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", length))
        if 2**20 < length < 2**40:
            file.truncate(length + 8)
    return f"header of {length} bytes"


def flip_header_bit(folder: Path, rng: random.Random) -> str:
    """Flip a bit in the first 2,000 bytes of the weights file, or truncate it."""
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        if rng.random() < 0.3:
            size = rng.randrange(path.stat().st_size)
            file.truncate(size)
            return f"model.safetensors cut to {size} bytes"
        at = rng.randrange(2000)
        file.seek(at)
        byte = file.read(1)[0] ^ 1 << rng.randrange(8)
        file.seek(at)
        file.write(bytes([byte]))
    return f"bit of byte {at} of model.safetensors"


def write_bad_index(folder: Path, rng: random.Random) -> str:
    """Write an index that points outside the folder or is malformed."""
    names = [
        f"../{SECRET}",
        str(folder.parent / SECRET),
        "/dev/zero",
        "/etc/passwd",
        f"sub/../../{SECRET}",
        "",
        ".",
        7,
        None,
        ["model.safetensors"],
        {"a": 1},
        "a\0b",
        "no-such.safetensors",
        "x" * 5000,
    ]
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    keys = [key for key in header if key != "__metadata__"]
    where = rng.choice(names)
    contents = [
        {"weight_map": dict.fromkeys(keys, where)},
        {"weight_map": dict.fromkeys(keys, "model.safetensors") | {keys[0]: where}},
        {"weight_map": where},
        {"metadata": {}},
        where,
    ]
    which = rng.choice([0, 0, 0, 1, 1, 2, 3, 4])
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(contents[which]), "utf8")
    return f"index {which} with {str(where)[:40]!r}"


def replace_with_link(folder: Path, rng: random.Random) -> str:
    """Replace a file of the model with a link to a file outside, a device or itself."""
    name = rng.choice(["model.safetensors", "config.json", "tokenizer.json"])
    targets = [folder.parent / SECRET, Path("/dev/zero"), Path("/etc/passwd"), folder / name]
    target = rng.choice(targets)
    (folder / name).unlink()
    (folder / name).symlink_to(target)
    return f"{name} is a link to {target.name}"


def change_tokenizer_value(folder: Path, rng: random.Random) -> str:
    """Set a random entry of a tokenizer file to an odd value."""
    return change_json(folder / rng.choice(["tokenizer.json", "tokenizer_config.json"]), rng)


MUTATIONS: tuple[Mutation, ...] = (
    change_config_value,
    change_config_size,
    change_weights_header,
    write_bad_index,
    spoil_json_file,
    change_config_value,
    add_config_key,
    change_header_length,
    change_tokenizer_value,
    flip_header_bit,
    replace_with_link,
    change_config_size,
    remove_config_key,
    change_tokenizer_value,
    write_huge_file,
)


def change_json(path: Path, rng: random.Random) -> str:
    """Set a random entry of a JSON file, up to five levels deep, to an odd value."""
    content = json.loads(path.read_text("utf8"))
    entries_found = list(_walk_entries(content))
    holder, key, name = rng.choice(entries_found)
    holder[key] = rng.choice([odd for odd in ODD if repr(odd) != repr(holder[key])])
    path.write_text(json.dumps(content), "utf8")
    return f"{path.name}: {name} = {str(holder[key])[:40]}"


def _walk_entries(content: object, name: str = "", depth: int = 0) -> Iterator[tuple]:
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    for number, (key, value) in enumerate(list(entries)):
        if number > 60 or depth > 4:
            return
        yield content, key, f"{name}.{key}".lstrip(".")
        if isinstance(value, (dict, list)):
            yield from _walk_entries(value, f"{name}.{key}", depth + 1)


def change_header(path: Path, rng: random.Random) -> str:
    """Rewrite one entry of a safetensors header; leave the tensors' data as it is."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    keys = sorted(key for key in header if key != "__metadata__")
    key, other = rng.sample(keys, 2)
    changes = {
        "shape": [rng.choice([-1, "a", 0, 2**63, 3, None]), 4],
        "dtype": rng.choice(["F99", 5, None, "F32", "I64", "F8_E4M3", "BOOL"]),
        "data_offsets": rng.choice([[0, 4], [4, 0], [-8, 8], ["a", 1], [0, 2**63], [], None, 3]),
    }
    field = rng.choice(sorted([*changes, "all", "removed", "renamed", "overlap", "swapped"]))
    if field in changes:
        header[key][field] = changes[field]
    elif field == "all":
        header[key] = rng.choice([None, 3, "x", [], {}, {"dtype": "F32"}])
    elif field == "removed":
        del header[key]
    elif field == "renamed":
        header[key + rng.choice(["x", ".weight", "\n", "/../a"])] = header.pop(key)
    elif field == "overlap":
        header[key]["data_offsets"] = header[other]["data_offsets"]
    else:
        header[key]["shape"] = list(reversed(header[key]["shape"]))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return f"header of {key}: {field} {str(changes.get(field, ''))[:40]}"


# --- campaign ---------------------------------------------------------------------------------


@dataclass
class OpenWatch:
    """Audit hook that counts opens of ``secret``, a file outside the folders commands may read."""

    secret: str = ""
    seen: int = 0

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.secret and event == "open" and str(arguments[0]).endswith(self.secret):
            self.seen += 1


WATCH = OpenWatch()


def make_model(folder: Path) -> Path:
    """Save a random model of two small layers with the demo model's tokenizer."""
    from tests.conftest import save_random_model

    return save_random_model(folder, "llama-gqa")


def make_text(path: Path) -> Path:
    """Write a text of a few hundred tokens."""
    path.write_text("\n".join(f"Return the {i}-th item of the list." for i in range(60)), "utf8")
    return path


def campaign(
    count: int, folder: Path, seed: int = 0, log: Callable[[str], None] = lambda _: None
) -> Counter[str]:
    """Count the outcomes of ``inspect`` and ``eval`` on ``count`` hostile models, by verb."""
    sys.addaudithook(WATCH)
    WATCH.secret, WATCH.seen = SECRET, 0
    original, text = make_model(folder / "whole"), make_text(folder / "text.txt")
    shutil.copy(original / "model.safetensors", folder / SECRET)
    WATCH.seen = 0
    counts: Counter[str] = Counter()
    for number in range(count):
        rng = random.Random(f"{seed}-{number}")
        copy = folder / "hostile"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(original, copy)
        what = MUTATIONS[number % len(MUTATIONS)](copy, rng)
        database = ["--db", str(folder / "lsq.duckdb"), "--json"]
        options = ["--model", str(copy), *database]
        verbs = {
            "inspect": ["inspect", *options],
            "eval": ["eval", *options, "--corpus", str(text), "--max-tokens", "100"],
        }
        for verb, arguments in verbs.items():
            kind = outcome(arguments)
            counts[f"{verb}: {kind}"] += 1
            counts["failed"] += failed(kind)
            log(f"{number:4} {verb:8} {what}: {kind}")
    counts["reads outside"] = WATCH.seen
    WATCH.secret = ""
    return counts


def run(count: int, folder: Path, seed: int, log: Callable[[str], None]) -> Tally:
    """Run the campaign and return its row."""
    return Tally.of("hostile models", count, bad_endings(campaign(count, folder, seed, log)))


def bad_endings(counts: Counter[str]) -> Counter[str]:
    """Return the faults among a campaign's outcomes."""
    faults: Counter[str] = Counter()
    for name, count in counts.items():
        verb, _, kind = name.partition(": ")
        if verb == "reads outside":
            faults["fetched from outside the folder"] += count
        elif kind and failed(kind):
            faults[kind] += count
    return faults


if __name__ == "__main__":
    sys.exit(run_campaign(run, 142))
