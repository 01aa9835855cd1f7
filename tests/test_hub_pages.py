"""Models on Hugging Face in the pages: looked up without blocking one, and never mistaken."""

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
from lsq_core.profiling.weights import Weights
from lsq_core.store.store import Store
from lsq_core.ui import cached, hub_lookup
from lsq_core.ui.explore import weights
from tests.conftest import save_random_model
from tests.test_app import first_line, go, open_page


class Replies(BaseHTTPRequestHandler):
    """Says of every model that it does not exist, once it may."""

    def do_GET(self):
        self.server.asked.append(self.path)
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
    """A hub on this machine, of which ``may_answer`` says when it does."""
    from huggingface_hub import constants

    with ThreadingHTTPServer(("127.0.0.1", 0), Replies) as server:
        server.asked, server.may_answer = [], threading.Event()
        server.may_answer.set()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(hub_lookup, "AT_ONCE", 0.3)
        monkeypatch.setattr(hub, "TIMEOUT_S", 60.0)  # however slow the machine is
        yield server
        server.may_answer.set()
        server.shutdown()


@pytest.mark.parametrize("title", ["Model", "Explore", "Plan", "Run"])
def test_a_page_does_not_wait_for_the_hub(server, title):
    """It says what it looks for, and when there is no such model why, with ways out."""
    server.may_answer.clear()
    name = f"org/slow-{title.lower()}"
    app = open_page("Model", model=name)
    go(app, title)
    assert not server.may_answer.is_set()
    assert not app.error
    assert any("is being looked up" in title.value for title in app.title)
    server.may_answer.set()
    _until(lambda: not hub_lookup.is_looking(ModelSource(name)))
    app.run()
    assert not app.exception
    assert name in app.error[0].value
    assert any("cannot be opened" in title.value for title in app.title)
    asked = len(server.asked)
    app.run()
    assert len(server.asked) == asked, "what was answered isn't asked again at once"
    app.button(key="look-again").click().run()
    assert len(server.asked) > asked
    assert name in app.error[0].value
    app.button(key="use-demo").click().run()
    assert not app.exception
    assert not app.error


def _until(ready, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_unknown_models_in_a_row_are_each_named(server):
    for name in ("org/first", "org/second"):
        app = open_page("Model", model=name)
        _until(lambda name=name: not hub_lookup.is_looking(ModelSource(name)))
        app.run()
        assert name in app.error[0].value
        assert "org/first" not in app.error[0].value or name == "org/first"


def test_a_hub_out_of_reach_is_asked_once_and_shortly(monkeypatch):
    """Nothing listens there: no request is repeated for half a minute."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    for find in (find_config, find_model):
        with pytest.raises(LsqError, match="cannot be reached"):
            find(ModelSource("org/out-of-reach"))
    assert remote_file_bytes(ModelSource("org/out-of-reach")) == 0
    assert time.monotonic() - began < 5
    assert not hub.answers("org/out-of-reach", None)


def test_a_hub_that_does_not_answer_in_time_is_out_of_reach(server, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.3)
    server.may_answer.clear()
    with pytest.raises(LsqError, match="cannot be reached"):
        find_config(ModelSource("org/hangs"))


def test_what_the_hub_knows_to_be_missing_is_bad_input(server):
    with pytest.raises(InputError, match="does not exist"):
        find_config(ModelSource("org/missing"))


# --- which model is this ----------------------------------------------------------------------


def test_two_models_without_a_fingerprint_have_each_their_own_histogram(tmp_path):
    """Files of neither are whole here, so that nothing but the name tells them apart."""
    drawn = []
    for name in ("one", "two"):
        folder = save_random_model(tmp_path / name, "llama-gqa")
        info = replace(
            inspect_model(ModelSource(str(folder))), source=f"org/{name}", fingerprint=""
        )
        opened = weights.open_weights(folder, info)
        if name == "two":  # random models of one architecture have the same weights
            _change_a_weight(folder)
        seen = SimpleNamespace(info=info)
        drawn.append(weights._drawn(seen, opened, opened.matrices[0]))
        own = Weights(folder, info.matrices).region(opened.matrices[0])
        assert drawn[-1].mean == pytest.approx(float(own.mean()))
    assert drawn[0].counts.tolist() != drawn[1].counts.tolist()


def _change_a_weight(folder) -> None:
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors = {name: np.ascontiguousarray(own + np.abs(own)) for name, own in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_profile_is_found_under_every_name_of_the_model(tmp_path, small_text):
    """A copy in another folder is the same model: Explore doesn't ask to profile it again."""
    import shutil

    from lsq_core.session import Session

    first = save_random_model(tmp_path / "first", "llama-gqa", num_hidden_layers=4)
    settings = ProfileSettings("rtn", calibration=str(small_text), samples=4, block_tokens=64)
    Session(ModelSource(str(first)), Store(), "cpu").profile(settings)
    shutil.copytree(first, tmp_path / "second")
    app = open_page("Explore", model=str(tmp_path / "second"))
    assert "has not been profiled" not in first_line(app)
    assert cached.identity(
        cached.model_info(Store(), ModelSource(str(tmp_path / "second")))
    ) == cached.identity(cached.model_info(Store(), ModelSource(str(first))))
