"""The app as a server: who may reach it, under which names, and what a browser may do with it.

Streamlit allows any page on this machine to open its websocket, and any page to show it in a
frame. Its ASGI application is therefore served behind :class:`Guard`, within this process.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import psutil

from lsq_core import paths
from lsq_core.errors import InputError, LsqError

#: Name prefix of a folder with a snapshot of the database; the id of its process follows.
SNAPSHOT = "lsq-snapshot-"
#: Seconds that open connections have to finish once the server is asked to stop.
GRACE_S = 3.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
#: Headers of every response: pages cannot be framed and load nothing from other servers, even if
#: a name or a note in the database refers to it.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; "
        "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Access:
    """Who may reach the server.

    ``hosts`` are the names it answers to, without port; empty means any name, which requires a
    token. ``token`` is '' if none is required.
    """

    hosts: tuple[str, ...]
    token: str
    port: int

    @property
    def cookie(self) -> str:
        """The name of the token's cookie, with the port because cookies are shared by all ports."""
        return f"lsq-token-{self.port}"


def access(address: str, port: int, token: bool) -> Access:
    """Return who may reach a server at an address; a token is required unless it is loopback.

    ``token`` requires one in any case.

    Raises
    ------
    InputError
        If the port is invalid or this machine can't listen there.
    """
    if not 0 < port < 2**16:  # getaddrinfo drops the higher bits
        raise InputError(f"{port} is not a valid port; give --port a number from 1 to 65535.")
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(found[0]) as test:
            test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            test.bind(found[4][:2])
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"{address}:{port} cannot be bound ({error}); give another --port or --address."
        ) from error
    ip = ipaddress.ip_address(found[4][0])
    name = address.rstrip(".").lower()  # as host names of requests are compared
    if ip.is_loopback:
        hosts = tuple({*LOOPBACK, name})
    else:
        hosts = () if ip.is_unspecified else (name, str(ip))
        token = True
    return Access(hosts, secrets.token_urlsafe(24) if token else "", port)


#: The answer to requests that come from pages of another origin.
_OTHER_ORIGIN = "Only this server's own pages may send requests to it."


class Guard:
    """ASGI middleware that checks host name, origin and token, and adds security headers."""

    def __init__(self, app: Application, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on permitted requests, and answer others with 403."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin1"): value.decode("latin1") for key, value in scope["headers"]}
        reason = self.rejection_reason(headers)
        query_token = dict(parse_qsl(scope["query_string"].decode("latin1"))).get("token", "")
        if not reason and self.access.token and not self._is_token(self._cookie(headers)):
            if scope["type"] == "http" and scope["method"] == "GET" and self._is_token(query_token):
                await self._set_token_cookie(scope, send)
                return
            reason = "Open the address with the token that the server printed when it started."
        if not reason:
            await self.app(scope, receive, _with_headers(send))
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})  # before accepting: status 403
        else:
            await _respond(send, 403, reason)

    def rejection_reason(self, headers: dict[str, str]) -> str:
        """Return why a request is not for this server or not from its pages, or '' if it is."""
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname or ""
        if self.access.hosts and name.rstrip(".") not in self.access.hosts:
            return "This server does not answer to that name."
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return _OTHER_ORIGIN
        # Browsers send this for content embedded by a page of another server; links navigate.
        site, mode = headers.get("sec-fetch-site"), headers.get("sec-fetch-mode")
        if site in ("cross-site", "same-site") and mode != "navigate":
            return _OTHER_ORIGIN
        return ""

    def _cookie(self, headers: dict[str, str]) -> str:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self.access.cookie)
        except CookieError:
            return ""
        return found.value if found else ""

    def _is_token(self, query_token: str) -> bool:
        return hmac.compare_digest(query_token.encode(), self.access.token.encode())

    async def _set_token_cookie(self, scope: Scope, send: Send) -> None:
        """Store the token in a cookie and redirect to the address without it."""
        query = parse_qsl(scope["query_string"].decode("latin1"), keep_blank_values=True)
        rest = urlencode([(key, value) for key, value in query if key != "token"])
        # Exactly one slash: two would name another host.
        path = "/" + quote(scope["path"].lstrip("/\\"))
        cookie = f"{self.access.cookie}={self.access.token}; Path=/; HttpOnly; SameSite=Lax"
        extra = {"Location": path + (f"?{rest}" if rest else ""), "Set-Cookie": cookie}
        await _respond(send, 303, "", extra)


def _with_headers(send: Send) -> Send:
    ours = [(key.lower().encode(), value.encode()) for key, value in HEADERS.items()]

    async def wrapped(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            names = {key for key, _ in ours}
            theirs = [pair for pair in message.get("headers", []) if pair[0].lower() not in names]
            message = {**message, "headers": [*theirs, *ours]}
        await send(message)

    return wrapped


async def _respond(send: Send, status: int, text: str, extra: dict[str, str] | None = None) -> None:
    headers = {"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-store"}
    pairs = [(k.lower().encode(), v.encode()) for k, v in (headers | (extra or {})).items()]
    send = _with_headers(send)
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": text.encode()})


def remove_old_snapshots() -> None:
    """Delete snapshots left behind by killed processes of this user."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SNAPSHOT}*"):
        number = folder.name.removeprefix(SNAPSHOT).partition("-")[0]
        with suppress(FileNotFoundError):  # another process may delete it at the same time
            mine = not folder.is_symlink() and folder.stat().st_uid == os.getuid()
            if mine and number.isdigit() and not psutil.pid_exists(int(number)):
                shutil.rmtree(folder, ignore_errors=True)


def serve(address: str, port: int, token: bool) -> None:
    """Serve the app in this process until it is asked to stop.

    Raises
    ------
    InputError
        If the port is invalid or this machine can't listen there.
    LsqError
        If the server cannot be started.
    """
    import uvicorn

    allowed = access(address, port, token)
    remove_old_snapshots()
    os.chdir(paths.IMPORT_FOLDER)  # as for jobs, so that relative paths mean the same
    config = uvicorn.Config(
        _application(address, allowed),
        host=address,
        port=port,
        log_level="warning",
        access_log=False,  # it would reveal the token
        ws_max_size=200 * 1024 * 1024,
        timeout_graceful_shutdown=int(GRACE_S),
    )
    server = uvicorn.Server(config)
    # uvicorn re-raises the signal that stopped it; with this handler SIGTERM exits with status 0.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print(f"LSQ Explorer is at {_url(address, allowed)} (press Ctrl+C to stop)", file=sys.stderr)
    server.run()
    if not server.started:
        raise LsqError("The app could not be started; see the message above.")


def _url(address: str, allowed: Access) -> str:
    shown = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(address, address)
    shown = f"[{shown}]" if ":" in shown else shown
    return f"http://{shown}:{allowed.port}/" + (f"?token={allowed.token}" * bool(allowed.token))


def _application(address: str, allowed: Access) -> Application:
    from starlette.middleware import Middleware
    from streamlit.starlette import App
    from streamlit.web.bootstrap import load_config_options

    app = App(paths.RESOURCES / "app.py", middleware=[Middleware(Guard, access=allowed)])
    # The guard checks host names; Streamlit's own list has only those of this machine.
    load_config_options(
        {"server.address": address, "server.port": allowed.port, "server.allowedHosts": []}
    )
    return app
