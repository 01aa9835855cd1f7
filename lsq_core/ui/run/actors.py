"""Where a sweep runs: on one device, all devices by Ray, or a cluster; and its actors."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from lsq_core.distributed import cluster
from lsq_core.distributed.status import ActorRow, read_actors
from lsq_core.errors import InputError
from lsq_core.jobs import Job
from lsq_core.ui import words
from lsq_core.ui.safe import st

#: The choices and their labels.
_PLACES = {
    "device": "One device",
    "local": "All devices, by Ray",
    "cluster": "A Ray cluster",
}


@dataclass(frozen=True)
class Place:
    """Where a sweep runs: ``address`` is None without Ray; ``reason`` is why it can't, or ''."""

    address: str | None = None
    cores: int | None = None
    reason: str = ""


def choose_place() -> Place:
    """Show the choice of one device, all devices of this machine, or a cluster by its address."""
    columns = st.columns([1.6, 1.6, 1.1, 3.2])
    unavailable = cluster.unavailable_reason()
    chosen = columns[0].selectbox(
        "Compute on",
        list(_PLACES),
        format_func=lambda name: (
            f"{_PLACES[name]} (not available here)"
            if unavailable and name != "device"
            else _PLACES[name]
        ),
        key="sweep_place",
        persist_state="session",
        help="With Ray, one actor per device (per GPU or, without any, per few CPU cores) measures "
        f"plans in parallel. {unavailable}",
    )
    if chosen == "device":
        return Place()
    address = cluster.LOCAL
    if chosen == "cluster":
        address = columns[1].text_input(
            "Address",
            key="sweep_address",
            placeholder="HOST:6379",
            persist_state="session",
            help="As 'ray start' prints it, or auto. Whoever can connect to a Ray cluster can run "
            "programs on it.",
        )
    cores = columns[2].number_input(
        "Cores per actor",
        min_value=0,
        step=1,
        key="sweep_cores",
        persist_state="session",
        help="For CPUs only; 0 uses a quarter of the machine's cores.",
    )
    try:
        return Place(cluster.check_address(address.strip()), cores or None)
    except InputError as error:
        return Place(address, cores or None, str(error))


def show_actors(job: Job) -> None:
    """Show what each actor of a sweep on Ray is doing; once it has ended, a summary."""
    rows = read_actors(job.folder)
    if not rows:
        return
    if not job.active:
        st.caption(describe(rows))
        return
    st.dataframe(
        table(rows),
        hide_index=True,
        key=f"actors-{job.id}",
        height=38 + 35 * min(len(rows), 8),
        column_config={
            "done": st.column_config.ProgressColumn(format="percent", min_value=0, max_value=1),
            "task": st.column_config.TextColumn(width="large"),
            "runs": st.column_config.NumberColumn(help="Runs that this actor has measured."),
        },
    )


def table(rows: list[ActorRow]) -> pd.DataFrame:
    """Return a table of the actors, lost ones last."""
    rows = sorted(rows, key=lambda row: (row.state == "lost", row.number))
    return pd.DataFrame(
        {
            "actor": [row.number for row in rows],
            "node": [row.host for row in rows],
            "device": [row.device for row in rows],
            "state": [row.state for row in rows],
            "task": [row.task for row in rows],
            "done": [row.fraction if row.task else None for row in rows],
            "runs": [row.measured for row in rows],
        }
    )


def describe(rows: list[ActorRow]) -> str:
    """Describe how many runs each node's actors measured, and how many actors were lost."""
    by_node: dict[str, int] = {}
    for row in rows:
        if row.host:
            by_node[row.host] = by_node.get(row.host, 0) + row.measured
    lost = sum(row.state == "lost" for row in rows)
    nodes = ", ".join(f"{words.escape(node)} {count}" for node, count in by_node.items())
    text = f"Measured by {words.plural(len(rows) - lost, 'actor')}"
    text += f", runs by node: {nodes}." if nodes else "."
    if lost:
        was = "was" if lost == 1 else "were"
        text += f" {words.plural(lost, 'actor')} died and {was} replaced."
    return text
