"""Checks for impossible sizes in a model's ``config.json``."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator

#: Names of sizes and counts: ``num_attention_heads``, ``n_layer``, ``hidden_size``.
_SIZE = re.compile(r"^(num|n)_|^(d_model|n\w*_layers?)$|_(size|dim|layers?|heads|experts)$")
#: The largest accepted counts. Modules are built for each layer and planned for each expert, and
#: configs build lists as long as other counts before any module exists. No published model comes
#: near these numbers, and building so many would take forever.
_MOST = {"layers": 1_000, "experts": 10_000, "others": 100_000}
_COUNTS = {
    "layers": re.compile(r"^(num|n)_(\w+_)?(layers?|blocks)$|(^|_)layers$|(^|_)depth$"),
    "experts": re.compile(r"^(num|n)_(\w+_)?experts$|^moe_num_experts$"),
    "others": re.compile(r"^(num|n)_(\w+_)?(heads?|labels|groups|codebooks|stages)$|_heads$"),
}


def find_excessive_count(config: dict) -> str:
    """Return the first count larger than any model's (of layers, experts, heads, labels, …).

    It is given as ``name is value``, or '' if there is none.

    >>> find_excessive_count({"num_hidden_layers": 32})
    ''
    >>> find_excessive_count({"text_config": {"num_hidden_layers": 10**9}})
    'text_config.num_hidden_layers is 1000000000'
    """
    for name, value in _entries(config):
        for what, pattern in _COUNTS.items():
            number = isinstance(value, (int, float)) and value > _MOST[what]
            if number and pattern.search(name.rpartition(".")[2]):
                return f"{name[-80:]} is {str(value)[:40]}"
    return ""


def find_invalid_sizes(config: dict) -> list[str]:
    """Return the sizes that are not positive integers below 2³¹, each as ``name is value``.

    Some models have such values legitimately (null for a default, 0 for none), so this is only a
    hint for when a model could not be built.

    >>> find_invalid_sizes({"num_attention_heads": 0, "hidden_size": "64", "eps": 0})
    ['num_attention_heads is 0', 'hidden_size is "64"']
    """
    return [
        f"{name} is {json.dumps(value)[:40]}"
        for name, value in _entries(config)
        if _SIZE.search(name.rpartition(".")[2])
        and (isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31)
        and not isinstance(value, (list, dict))
    ]


def _entries(config: dict) -> Iterator[tuple[str, object]]:
    """Yield every name and value of a config and of its nested configs (``text_config.…``)."""
    waiting = deque([("", config)])  # not recursive: a config may exceed the recursion limit
    while waiting:
        prefix, entries = waiting.popleft()
        for name, value in entries.items():
            if isinstance(value, dict):
                waiting.append((f"{prefix}{name}."[-200:], value))
            else:
                yield f"{prefix}{name}", value
