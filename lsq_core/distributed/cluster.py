"""The Ray cluster that a sweep runs on: one of this machine, or one that is there."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec

from lsq_core import paths
from lsq_core.errors import InputError, LsqError, exception_reason

#: The address that means a cluster of this machine alone, for the length of the sweep.
LOCAL = "local"
#: The address by which Ray finds the cluster that this machine is a node of.
AUTO = "auto"
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):\d{1,5}")
#: Bytes of the local cluster's object store beside what is put into it; Ray wants 75 MiB.
_STORE_BYTES = 96 * 2**20
_HANDLED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class NodeResources:
    """What a node of a cluster has: whole cores and GPUs."""

    address: str
    cores: int
    gpus: int


def unavailable_reason() -> str:
    """Explain why nothing can run on Ray here; an empty string if it can."""
    if find_spec("ray") is not None:
        return ""
    return "Ray is not installed; make ray adds it."


def check_address(address: str) -> str:
    """The address, if Ray is installed and can have it.

    Raises
    ------
    InputError
        When Ray is not installed, or the address is none of ``local``, ``auto`` and ``HOST:PORT``.
    """
    if reason := unavailable_reason():
        raise InputError(reason)
    if address in (LOCAL, AUTO) or _ADDRESS.fullmatch(address):
        return address
    raise InputError(
        f"'{address}' is not the address of a Ray cluster; give HOST:PORT as 'ray start' prints "
        "it, auto on a node of the cluster, or nothing for a cluster of this machine. A driver "
        "outside the cluster, by ray://, is not supported."
    )


@contextmanager
def connection(address: str, cores: int, gpus: int, stored_bytes: int = 0) -> Iterator[None]:
    """Be the driver of a cluster; one of this machine begins and ends with it.

    A cluster of this machine has so many ``cores`` and ``gpus``, listens on the loopback interface
    alone, and accepts only clients with a random token that is kept in memory.

    Raises
    ------
    InputError
        When there is no cluster at the address, or one with another version of Ray or Python.
    LsqError
        When the cluster of this machine does not start.
    """
    environment = {"RAY_USAGE_STATS_ENABLED": "0"}
    session_folder = None
    options: dict[str, object] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        # Sockets have short paths, whatever TMPDIR is.
        environment["RAY_TMPDIR"] = os.environ.get("RAY_TMPDIR", "/tmp")
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        # Workers import the package that this process did.
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(paths.IMPORT_FOLDER), os.environ.get("PYTHONPATH")])
        )
        options |= {"num_cpus": cores, "num_gpus": gpus, "include_dashboard": False}
        options |= {"object_store_memory": _STORE_BYTES + 2 * stored_bytes}
    with _environment(environment):
        import ray

        # What Ray reads from a variable when it is first imported: unless machines form clusters,
        # its servers listen on 127.0.0.1. ``_node_ip_address`` would not do: Ray replaces that one.
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = address != LOCAL
        try:
            session_folder = _connect(ray, address, options)
            yield
        finally:
            ray.shutdown()
            if address == LOCAL and session_folder:
                shutil.rmtree(session_folder, ignore_errors=True)


def _connect(ray: object, address: str, options: dict[str, object]) -> str:
    """Connect, with what goes wrong in a sentence; returns the folder of Ray's session."""
    try:
        with _own_signal_handlers():
            context = ray.init(address=address, namespace="lsq", **options)
        return context.address_info["session_dir"]
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        reason = exception_reason(error)
        if address == LOCAL:
            raise LsqError(f"A Ray cluster of this machine did not start: {reason}.") from error
        raise InputError(
            f"The Ray cluster at {address} cannot be joined: {reason}. This machine must be a node "
            "of it, with the same versions of Ray and Python."
        ) from error


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keep this process's handlers of signals, in whose place Ray puts its own.

    Ray's ends the process; a signal that comes meanwhile is handled again afterwards.
    """
    before = {number: signal.getsignal(number) for number in _HANDLED_SIGNALS}
    terminated = False
    try:
        yield
    except SystemExit:
        terminated = True
    finally:
        for number, handler in before.items():
            with suppress(ValueError):  # not in the main thread, where Ray puts none either
                signal.signal(number, handler)
    if terminated:
        signal.raise_signal(signal.SIGTERM)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Have Ray read these variables, and afterwards what was there before."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    _read_authentication()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _read_authentication()


def _read_authentication() -> None:
    """Have Ray read the variables of authentication again; it keeps what it has read.

    Nodes without a token cannot reach a driver that asks for one, and end its actors before they
    start.
    """
    from ray._raylet import AuthenticationTokenLoader, Config

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def nodes() -> list[NodeResources]:
    """The living nodes of the cluster that this process is connected to."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    return [
        NodeResources(
            node["NodeManagerAddress"],
            int(node["Resources"].get("CPU", 0)),
            int(node["Resources"].get("GPU", 0)),
        )
        for node in alive
    ]


def own_node() -> str:
    """The id of the node that this process is on."""
    import ray

    return ray.get_runtime_context().get_node_id()
