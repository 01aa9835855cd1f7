"""Hugging Face models in the app: looked up without blocking a page, and never mixed up."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

from lsq_core import hub
from lsq_core.errors import InputError, LsqError
from lsq_core.model.loading import inspect_model
from lsq_core.model.source import ModelSource, find_config, find_model, remote_file_bytes
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.profiling.weights import WeightReader
from lsq_core.store.store import Store
from lsq_core.ui import cached, hub_lookup
from lsq_core.ui.explore import weights
from tests.conftest import save_random_model
from tests.helpers import wait_for
from tests.test_app import first_line, go_to_page, open_page


class HubHandler(BaseHTTPRequestHandler):
    """Reply that the model does not exist, once ``may_answer`` is set or 30 s have passed."""

    def do_GET(self):
        self.server.requests.append(self.path)
        self.server.may_answer.wait(30)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A local hub server that delays its replies until ``may_answer`` is set."""
    from huggingface_hub import constants

    with ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as server:
        server.requests, server.may_answer = [], threading.Event()
        server.may_answer.set()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(hub_lookup, "WAIT_SECONDS", 0.3)
        monkeypatch.setattr(hub, "TIMEOUT_S", 60.0)  # long enough for a slow machine
        yield server
        server.may_answer.set()
        server.shutdown()


@pytest.mark.parametrize("title", ["Model", "Explore", "Plan", "Run"])
def test_page_does_not_block_on_hub(server, title):
    """It shows the lookup, then why the model cannot be opened and what the user can do."""
    server.may_answer.clear()
    name = f"org/slow-{title.lower()}"
    app = open_page("Model", model=name)
    go_to_page(app, title)
    assert not server.may_answer.is_set()
    assert not app.error
    assert any("is being looked up" in title.value for title in app.title)
    server.may_answer.set()
    wait_for(lambda: not hub_lookup.is_pending(ModelSource(name)))
    app.run()
    assert not app.exception
    assert name in app.error[0].value
    assert any("cannot be opened" in title.value for title in app.title)
    requests = len(server.requests)
    app.run()
    assert len(server.requests) == requests, "what was answered isn't asked again at once"
    app.button(key="look-again").click().run()
    assert len(server.requests) > requests
    assert name in app.error[0].value
    app.button(key="use-demo").click().run()
    assert not app.exception
    assert not app.error


def test_model_page_names_each_unknown_model(server):
    for name in ("org/first", "org/second"):
        app = open_page("Model", model=name)
        wait_for(lambda name=name: not hub_lookup.is_pending(ModelSource(name)))
        app.run()
        assert name in app.error[0].value
        assert "org/first" not in app.error[0].value or name == "org/first"


def test_unreachable_hub_fails_within_5_s(monkeypatch):
    """Nothing listens at the address, and requests are not retried for half a minute."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    for find in (find_config, find_model):
        with pytest.raises(LsqError, match="cannot be reached"):
            find(ModelSource("org/out-of-reach"))
    assert remote_file_bytes(ModelSource("org/out-of-reach")) == 0
    assert time.monotonic() - started < 5
    assert not hub.is_reachable("org/out-of-reach", None)


def test_find_config_hub_timeout_raises(server, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.3)
    server.may_answer.clear()
    with pytest.raises(LsqError, match="cannot be reached"):
        find_config(ModelSource("org/hangs"))


def test_find_config_missing_model_raises_input_error(server):
    with pytest.raises(InputError, match="does not exist"):
        find_config(ModelSource("org/missing"))


# --- model identity ---------------------------------------------------------------------------


def test_histogram_cache_separate_without_fingerprint(tmp_path):
    """Incomplete downloads have no fingerprint, so only the name tells the models apart."""
    histograms = []
    for name in ("one", "two"):
        folder = save_random_model(tmp_path / name, "llama-gqa")
        info = replace(
            inspect_model(ModelSource(str(folder))), source=f"org/{name}", fingerprint=""
        )
        opened = weights.open_weights(folder, info)
        if name == "two":  # random models of the same architecture have equal weights
            _change_a_weight(folder)
        context = SimpleNamespace(info=info)
        histograms.append(weights._matrix_histogram(context, opened, opened.matrices[0]))
        own = WeightReader(folder, info.matrices).region(opened.matrices[0])
        assert histograms[-1].mean == pytest.approx(float(own.mean()))
    assert histograms[0].counts.tolist() != histograms[1].counts.tolist()


def _change_a_weight(folder) -> None:
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors = {name: np.ascontiguousarray(own + np.abs(own)) for name, own in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def test_profile_found_for_copy_of_model(tmp_path, small_text):
    """A copy in another folder is the same model: Explore doesn't ask to profile it again."""
    import shutil

    from lsq_core.session import Session

    first = save_random_model(tmp_path / "first", "llama-gqa", num_hidden_layers=4)
    settings = ProfileSettings("rtn", calibration=str(small_text), samples=4, block_tokens=64)
    Session(ModelSource(str(first)), Store(), "cpu").profile(settings)
    shutil.copytree(first, tmp_path / "second")
    app = open_page("Explore", model=str(tmp_path / "second"))
    assert "has not been profiled" not in first_line(app)
    assert cached.model_key(
        cached.model_info(Store(), ModelSource(str(tmp_path / "second")))
    ) == cached.model_key(cached.model_info(Store(), ModelSource(str(first))))
