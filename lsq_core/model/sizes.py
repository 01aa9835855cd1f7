"""Sizes in a model's ``config.json``: which of them no model can have."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator

#: What counts or measures something: ``num_attention_heads``, ``n_layer``, ``hidden_size``.
_SIZE = re.compile(r"^(num|n)_|^(d_model|n\w*_layers?)$|_(size|dim|layers?|heads|experts)$")
#: Modules are built one by one for each layer, and planned one by one for each expert; configs make
#: lists as long as other counts before a module is built. No published model comes near these
#: numbers, and building so many would take for ever.
_MOST = {"layers": 1_000, "experts": 10_000, "others": 100_000}
_COUNTS = {
    "layers": re.compile(r"^(num|n)_(\w+_)?(layers?|blocks)$|(^|_)layers$|(^|_)depth$"),
    "experts": re.compile(r"^(num|n)_(\w+_)?experts$|^moe_num_experts$"),
    "others": re.compile(r"^(num|n)_(\w+_)?(heads?|labels|groups|codebooks|stages)$|_heads$"),
}


def find_excessive_count(config: dict) -> str:
    """The count of layers or experts that is larger than any model's, as ``name is value``, or ''.

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
    """Sizes that are no whole positive number of 31 bits, each as ``name is value``.

    Some of them are right in some models (null for a default, 0 for none), so this only tells
    where to look once a model could not be built.

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
    """Every name and value of a config, and of the configs inside it (``text_config.…``)."""
    waiting = deque([("", config)])  # a foreign config may be nested deeper than calls may be
    while waiting:
        prefix, entries = waiting.popleft()
        for name, value in entries.items():
            if isinstance(value, dict):
                waiting.append((f"{prefix}{name}."[-200:], value))
            else:
                yield f"{prefix}{name}", value
