"""The models whose plans are exported."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import ROOT, save_random_model
from tests.exports.cases import MODELS, Case, load_case


@pytest.fixture(scope="session", params=MODELS)
def case(request: pytest.FixtureRequest, shared_folder: Callable) -> Case:
    """Each model in turn; the mixtures of experts have experts in every block."""
    name = request.param
    if name == "demo":
        return load_case(ROOT / "data" / "demo_model")
    changes = {"mlp_only_layers": []} if name == "qwen2-moe" else {}
    return load_case(
        shared_folder(f"exported-{name}", lambda to: save_random_model(to, name, **changes))
    )
