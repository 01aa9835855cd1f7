"""The Ray cluster to run on: a temporary one on this machine, or an existing one."""

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

#: Address of a temporary cluster of this machine alone.
LOCAL = "local"
#: Address with which Ray finds the cluster that this machine is a node of.
AUTO = "auto"
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):\d{1,5}")
#: Bytes of the local cluster's object store, which holds the tokens of texts; larger ones go to
#: disk. Ray needs at least 75 MiB.
_STORE_BYTES = 96 * 2**20
_HANDLED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class NodeResources:
    """The numbers of cores and GPUs of a cluster node."""

    address: str
    cores: int
    gpus: int


def unavailable_reason() -> str:
    """Return why nothing can run on Ray here; an empty string if it can."""
    if find_spec("ray") is not None:
        return ""
    return "Ray is not installed; make ray adds it."


def check_address(address: str) -> str:
    """Return the address if it is valid and Ray is installed.

    Raises
    ------
    InputError
        If Ray is not installed, or the address is not ``local``, ``auto`` or ``HOST:PORT``.
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
def connection(address: str, cores: int, gpus: int) -> Iterator[None]:
    """Connect to a cluster as a driver, within a ``with`` block.

    A cluster of this machine is started on entry and stopped on exit. It has the given ``cores``
    and ``gpus``, listens on the loopback interface only, and accepts only clients with a random
    token that is held in memory.

    Raises
    ------
    InputError
        If there is no cluster at the address, or its version of Ray or Python differs.
    LsqError
        If the cluster of this machine does not start.
    """
    environment = {"RAY_USAGE_STATS_ENABLED": "0"}
    session_folder = None
    options: dict[str, object] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        # Socket paths must be short, whatever TMPDIR is.
        environment["RAY_TMPDIR"] = os.environ.get("RAY_TMPDIR", "/tmp")
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        # Workers must import the same package as this process.
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(paths.IMPORT_FOLDER), os.environ.get("PYTHONPATH")])
        )
        options |= {"num_cpus": cores, "num_gpus": gpus, "include_dashboard": False}
        options |= {"object_store_memory": _STORE_BYTES}
    with _environment(environment):
        import ray

        # Ray sets this from an environment variable when first imported. If false, its servers
        # listen on 127.0.0.1; ``_node_ip_address`` would not work, since Ray replaces that address.
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = address != LOCAL
        try:
            session_folder = _connect(ray, address, options)
            yield
        finally:
            ray.shutdown()
            if address == LOCAL and session_folder:
                shutil.rmtree(session_folder, ignore_errors=True)


def _connect(ray: object, address: str, options: dict[str, object]) -> str:
    """Connect and return the folder of Ray's session; turn errors into readable ones."""
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
    """Keep this process's signal handlers, which Ray would replace with its own.

    Ray's handler exits the process; a signal that arrives meanwhile is raised again afterwards.
    """
    before = {number: signal.getsignal(number) for number in _HANDLED_SIGNALS}
    terminated = False
    try:
        yield
    except SystemExit:
        terminated = True
    finally:
        for number, handler in before.items():
            # ValueError: not in the main thread, so Ray set none either; TypeError: a handler
            # that was not set from Python, which cannot be restored.
            with suppress(ValueError, TypeError):
                signal.signal(number, handler)
    if terminated:
        signal.raise_signal(signal.SIGTERM)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables and have Ray read them; restore the previous ones afterwards."""
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
    """Have Ray read its authentication variables again, since it caches them.

    Nodes without a token cannot reach a driver that requires one, and kill its actors before they
    start.
    """
    from ray._raylet import AuthenticationTokenLoader, Config

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def nodes() -> list[NodeResources]:
    """Return the living nodes of the cluster that this process is connected to."""
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
    """Return the id of the node that this process runs on."""
    import ray

    return ray.get_runtime_context().get_node_id()
