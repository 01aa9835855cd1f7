"""The app as a server: access control, browser security headers and shutdown."""

from __future__ import annotations

import asyncio
import http.client
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import pytest

from lsq_core import serve
from lsq_core.errors import InputError
from lsq_core.serve import Access, Guard
from tests.conftest import ROOT
from tests.helpers import find_free_port

OWN = "127.0.0.1:8501"
LOCAL_ACCESS = Access(("127.0.0.1", "localhost"), "", 8501)
TOKEN_ACCESS = Access((), "secret", 8501)


async def _inner_app(scope, receive, send) -> None:
    """Accept every request, as the wrapped ASGI application."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    headers = [(b"x-frame-options", b"ALLOWALL")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"passed"})


def send_request(
    access: Access, kind: str = "http", query: str = "", path: str = "/", **headers: str
):
    """Send a request through the guard and return the first message of the response."""
    messages: list[dict] = []
    headers = {"host": OWN} | {name.replace("_", "-"): text for name, text in headers.items()}
    scope = {
        "type": kind,
        "method": "GET",
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.encode(), text.encode()) for name, text in headers.items()],
    }

    async def receive() -> dict:
        return {"type": "websocket.connect"}

    async def send(message: dict) -> None:
        messages.append(message)

    asyncio.run(Guard(_inner_app, access)(scope, receive, send))
    return messages[0]


def is_allowed(response: dict) -> bool:
    return response.get("status") == 200 or response["type"] == "websocket.accept"


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"origin": f"http://{OWN}"}, True),
        ({"host": "localhost:8501", "origin": "http://localhost:8501"}, True),
        ({"origin": "http://localhost:3000"}, False),
        ({"origin": "http://127.0.0.1:3000"}, False),
        ({"origin": "http://127.0.0.1"}, False),
        ({"origin": "null"}, False),
        ({"origin": "https://evil.example"}, False),
        ({"host": "evil.example:8501", "origin": "http://evil.example:8501"}, False),
        ({"host": "127.0.0.1.evil.example"}, False),
        ({"host": ""}, False),
        ({"sec_fetch_site": "same-site", "sec_fetch_mode": "no-cors"}, False),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, True),
        ({"sec_fetch_site": "same-origin", "sec_fetch_mode": "websocket"}, True),
    ],
)
def test_guard_host_and_origin(kind, headers, allowed):
    assert is_allowed(send_request(LOCAL_ACCESS, kind, **headers)) == allowed


def test_guard_security_headers():
    for response in (
        send_request(LOCAL_ACCESS),
        send_request(LOCAL_ACCESS, host="evil.example"),
        send_request(TOKEN_ACCESS, query="token=secret"),
    ):
        headers = dict(response["headers"])
        policy = headers[b"content-security-policy"].decode()
        assert "frame-ancestors 'none'" in policy
        assert policy.startswith("default-src 'self'")
        assert [value for name, value in response["headers"] if name == b"x-frame-options"] == [
            b"DENY"
        ]
        assert headers[b"x-content-type-options"] == b"nosniff"


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_guard_requires_token(kind):
    assert not is_allowed(send_request(TOKEN_ACCESS, kind))
    assert not is_allowed(send_request(TOKEN_ACCESS, kind, query="token=wrong"))
    assert not is_allowed(send_request(TOKEN_ACCESS, kind, cookie="lsq-token-8501=wrong"))
    assert not is_allowed(
        send_request(TOKEN_ACCESS, kind, cookie="lsq-token-9999=secret"),
    ), "another port's"
    assert is_allowed(send_request(TOKEN_ACCESS, kind, cookie="other=1; lsq-token-8501=secret"))


def test_guard_token_query_sets_cookie():
    response = send_request(
        TOKEN_ACCESS, query="model=demo&token=secret", path="//evil.example/Plan"
    )
    headers = dict(response["headers"])
    assert response["status"] == 303
    assert headers[b"location"] == b"/evil.example/Plan?model=demo"
    assert headers[b"set-cookie"].startswith(b"lsq-token-8501=secret;")
    assert b"HttpOnly" in headers[b"set-cookie"]


def test_access_token_on_public_address():
    port = find_free_port()
    assert serve.access("127.0.0.1", port, token=False).token == ""
    assert len(serve.access("127.0.0.1", port, token=True).token) >= 32
    own = serve.access("LocalHost", port, token=False).hosts
    assert all(name == name.lower() for name in own), "as requests name them"
    everyone = serve.access("0.0.0.0", port, token=False)
    assert everyone.token
    assert everyone.hosts == ()
    with pytest.raises(InputError, match="cannot be bound"):
        serve.access("192.0.2.1", port, token=False)
    with pytest.raises(InputError, match="cannot be bound"):
        serve.access("\udcff" * 300, port, token=False)


@pytest.mark.parametrize("port", [-1, 0, 2**16, 99999, 10**30])
def test_a_number_that_is_no_port_is_refused(port):
    with pytest.raises(InputError, match=f"{port} is not a valid port"):
        serve.access("127.0.0.1", port, token=False)


def test_remove_old_snapshots(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    kept_folders = [tmp_path / f"{serve.SNAPSHOT}{os.getpid()}-a", tmp_path / "lsq-other"]
    removed_folder = tmp_path / f"{serve.SNAPSHOT}{ended.pid}-b"
    for folder in (*kept_folders, removed_folder):
        folder.mkdir()
        (folder / "snapshot.duckdb").touch()
    serve.remove_old_snapshots()
    assert sorted(tmp_path.iterdir()) == sorted(kept_folders)


# --- the real server ------------------------------------------------------------------------


def _status(port: int, path: str = "/_stcore/health", **headers: str) -> int | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


@pytest.fixture
def server(tmp_path) -> Iterator[tuple[subprocess.Popen, int]]:
    """Start ``lsq app`` with its own temporary folder and wait until it responds."""
    port = find_free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "lsq_core", "app", "--port", str(port)],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while _status(port) is None and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    yield process, port
    process.kill()
    process.wait()


#: Headers that a browser sends to open a WebSocket.
_UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_server(server, number):
    process, port = server
    assert _status(port) == 200
    assert _status(port, Origin="http://localhost:3000") == 403
    same_origin = f"http://127.0.0.1:{port}"
    assert _status(port, "/_stcore/stream", **_UPGRADE, Origin=same_origin) == 101
    cross_origin = "http://localhost:3000"
    assert _status(port, "/_stcore/stream", **_UPGRADE, Origin=cross_origin) == 403
    process.send_signal(number)
    process.wait(20)
    assert _status(port) is None, "nothing listens on its port any more"
