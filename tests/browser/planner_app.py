"""A page with only the live planner on a random model, for its browser tests.

The query string selects what to mount: ``?layers=24&methods=mxq,sensiboost&experts=8&budget=3.25``;
``serve=vllm`` restricts the plans.
"""

from __future__ import annotations

import numpy as np
import streamlit as st

from lsq_core.bits import LADDER
from lsq_core.model.info import Matrix
from lsq_core.planning.constraints import restrict
from lsq_core.planning.facts import layer_means
from lsq_core.planning.make import make_frontier
from lsq_core.planning.methods import PLANNERS
from lsq_core.planning.problem import Problem
from lsq_core.planning.request import PlanRequest
from lsq_core.ui.planner import (
    Curve,
    FreePlans,
    LayerScores,
    LiveMethod,
    MatrixFacts,
    Preset,
    live_planner,
    read_committed_budget,
)

SIZES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
FULL = 5.47
OTHER_BYTES = 524_288_000


def random_model(layers: int, experts: int = 1, seed: int = 0) -> Problem:
    """Return seven modules per layer with random scores, high at both ends and in nine matrices."""
    random = np.random.default_rng(seed)
    matrices = []
    for layer in range(layers):
        for kind, (out_features, in_features) in SIZES.items():
            each = experts if kind.startswith("mlp") else 1
            for expert in range(each):
                name, number = f"model.layers.{layer}.{kind}", None
                if each > 1:
                    name, number = f"{name}.{expert}", expert
                matrices.append(Matrix(name, layer, kind, out_features, in_features, number))
    n = len(matrices)
    layer_index = np.array([m.layer for m in matrices])
    ends = 1 + 6 * np.exp(-layer_index) + 4 * np.exp(layer_index - layers + 1)
    difficulty = ends * np.exp(0.4 * random.standard_normal(n))
    difficulty[random.choice(n, 9, replace=False)] *= 12
    size = np.array([m.numel for m in matrices]) / 2**24
    error_scale = 2.0 ** -np.array([c.nominal_bits for c in LADDER])
    cost = (
        (difficulty * size)[:, None]
        * error_scale**1.5
        * np.exp(0.05 * random.standard_normal((n, 12)))
    )
    scores = {
        "sensitivity": difficulty,
        "sensitivity_module": difficulty,
        "kurtosis": 3 * difficulty,
    }
    return Problem(tuple(matrices), scores, {"weight_error": cost, "sensitivity_module": cost})


def curve(shift: float) -> Curve:
    """Return a perplexity curve that falls with the budget."""
    return falling_curve(np.linspace(2.1, 8.6, 200), shift)


def uniform_curve() -> Curve:
    """Return the uniform plans' predicted perplexity, higher than the other curves."""
    return falling_curve(np.array([c.nominal_bits for c in LADDER]), 5)


def falling_curve(bits: np.ndarray, shift: float) -> Curve:
    perplexity = FULL * np.exp((12 + shift) * np.exp(-1.5 * (bits - 1)))
    return Curve(bits, perplexity, perplexity * 0.985, perplexity * 1.02, FULL)


@st.cache_resource
def build_methods(
    layers: int, experts: int, names: tuple[str, ...], pins: tuple[str, ...], serve: str | None
) -> tuple[Problem, list[LiveMethod]]:
    """Return the model and the methods' frontiers, cached as on the app's pages."""
    model = random_model(layers, experts)
    problem = restrict(model, PlanRequest(names[0], pins=pins, serve=serve))
    methods = []
    for k, name in enumerate(names):
        request = PlanRequest(name, boost_stop=3)
        frontier = make_frontier(problem, request)
        unit = "" if frontier.cost is None else "squared output error"
        free = FreePlans(make_frontier(model, request), curve(2 * k - 6)) if serve else None
        title = PLANNERS[name].title
        scores = LayerScores("sensitivity", "Sensitivity", layer_means(problem, "sensitivity"))
        methods.append(
            LiveMethod(name, title, frontier, unit, curve(2 * k), scores=scores, free=free)
        )
    return problem, methods


def app() -> None:
    """Mount the planner and show the script's state below it."""
    st.set_page_config(layout="wide")
    query = st.query_params
    names = tuple(query.get("methods", "mxq").split(","))
    pins = st.session_state.get("pins", ())
    size = int(query.get("layers", 80)), int(query.get("experts", 1))
    problem, methods = build_methods(*size, names, pins, query.get("serve"))
    if "budget" not in st.session_state:
        st.session_state["budget"] = float(query.get("budget", 3.25))
    z = problem.scores["kurtosis"].copy()
    z[z < 20] = np.nan
    fixed = None
    if "fixed" in query:
        fixed = np.full(len(problem.matrices), int(query["fixed"]))
    st.session_state["runs"] = st.session_state.get("runs", 0) + 1
    low, high = (8 * size / problem.total for size in problem.feasible)
    committed = read_committed_budget()
    if committed is not None:
        st.session_state["budget"], st.session_state["bytes"] = committed.bits, committed.bytes
    live_planner(
        problem,
        methods,
        budget=st.session_state["budget"],
        budget_bytes=st.session_state.get("bytes"),
        other_bytes=OTHER_BYTES,
        metadata="8bit",
        presets=[
            Preset("1 GB", 0.1, "fits in 1 GB with room for 4,096 tokens"),
            Preset("8 GB", 3.7, "fits in 8 GB with room for 4,096 tokens"),
            Preset("80 GB", 40.0, "fits in 80 GB with room for 4,096 tokens"),
        ],
        facts=[
            MatrixFacts("Sensitivity", problem.scores["sensitivity"]),
            MatrixFacts("Kurtosis", problem.scores["kurtosis"]),
            MatrixFacts("z of kurtosis", z),
        ],
        fixed=fixed,
        feasible=(low, high),
        uniform=None if "alone" in query else uniform_curve(),
        pins=pins,
        on_pins=lambda new_pins: st.session_state.update(pins=new_pins),
    )
    st.button("Elsewhere", on_click=lambda: st.session_state.update(budget=5.0, bytes=None))
    st.caption(f"run {st.session_state['runs']}, budget {st.session_state['budget']:.4f}")


if __name__ == "__main__":
    app()
