"""A real Chromium and a real server, each with its own folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from lsq_core import disk, jobs
from lsq_core.model.source import ModelSource
from lsq_core.profiling.settings import ProfileSettings
from lsq_core.session import Session
from lsq_core.store.store import Store
from tests.conftest import REFERENCE, ROOT
from tests.helpers import find_free_port
from tests.test_compare import insert_synthetic_runs

T = TypeVar("T")

INSTALL = "apt-get install -y chromium chromium-driver"
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1440,900",
)
#: Returns the traces of every chart on the page, one list per chart.
_FIGURES = """
const plain = (value) => value && value.length !== undefined && typeof value !== 'string'
    ? [...value].map(plain) : value;
const traces = (plot) => (plot._fullData ?? []).map(line =>
    Object.fromEntries(['name', 'type', 'mode', 'x', 'y', 'z', 'labels', 'values', 'customdata']
        .map(key => [key, plain(line[key]) ?? null])));
return [...document.querySelectorAll('.js-plotly-plot')].map(traces);
"""


@dataclass(frozen=True)
class Server:
    """A running app: its URL, database and process."""

    url: str
    database: Path
    process: subprocess.Popen

    @property
    def store(self) -> Store:
        """The app's database."""
        return Store(self.database)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The app on a free port with its own database."""
    with serve("app.py", tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def populated_server(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Server]:
    """The app on a database with a profile and synthetic runs of the demo model.

    The database also has the published measurements, if available.
    """
    folder = tmp_path_factory.mktemp("stocked")
    if REFERENCE.is_dir():
        shutil.copy(request.getfixturevalue("published_database"), folder / "lsq.duckdb")
    store = Store(folder / "lsq.duckdb")
    Session(ModelSource("demo"), store, "cpu").profile(ProfileSettings("rtn", samples=4))
    insert_synthetic_runs(store, 72, ("uniform", "sensiboost", "mxq", "uniform", "mxq"))
    with serve("app.py", folder) as running:
        yield running


@contextmanager
def serve(script: str, folder: Path) -> Iterator[Server]:
    """Serve a Streamlit script of this project on a free port until the block ends."""
    _require_chromium()
    database, port = folder / "lsq.duckdb", find_free_port()
    if script == "app.py":  # as a user starts it
        command = [sys.executable, "-m", "lsq_core", "app", "--port", str(port), "--no-shipped"]
    else:
        command = [sys.executable, "-m", "streamlit", "run", script, "--server.port", str(port)]
        command += ["--server.fileWatcherType", "none"]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"LSQ_DB": str(database)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    url = f"http://localhost:{port}"
    try:
        _wait_until_healthy(url, process, folder / "log.txt")
        yield Server(url, database, process)
    finally:
        process.terminate()
        process.wait(10)


def _require_chromium() -> None:
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not found; install with: {INSTALL}")


def _wait_until_healthy(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/_stcore/health", timeout=2) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(f"the server did not come up: {log.read_text('utf8', 'replace')}")


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """One browser for all tests, since starting one takes seconds."""
    with open_browser(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def user(server: Server, chromium: object) -> Iterator[User]:
    """A user with a new tab; jobs that the test leaves running are cancelled afterwards."""
    with new_tab(chromium):
        yield User(chromium, server)
    for job in jobs.list_jobs(disk.jobs_folder(server.store)):
        if job.active:
            jobs.cancel(job)


@contextmanager
def new_tab(driver: object) -> Iterator[None]:
    """Open a tab of laptop size in a shared browser; close all new tabs when the block ends."""
    first = driver.window_handles[0]
    driver.switch_to.new_window("tab")
    driver.set_window_size(1440, 900)
    try:
        yield
    finally:
        for handle in driver.window_handles[1:]:
            driver.switch_to.window(handle)
            driver.close()
        driver.switch_to.window(first)


@contextmanager
def open_browser(profile: Path) -> Iterator[object]:
    """Start Chromium with a profile in a folder; quit when the block ends."""
    _require_chromium()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in (*_OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


class User:
    """Actions and observations of a person using the app. Every wait has a timeout."""

    def __init__(self, driver: object, server: Server) -> None:
        self.driver = driver
        self.server = server

    def open(self, address: str = "/") -> None:
        """Open an address of the app."""
        self.driver.get(self.server.url + address)

    def wait(self, condition: Callable, seconds: float = 30, why: str = "") -> object:
        """Wait until a condition is true and return its value.

        The condition is retried if an element it looks up is missing, covered by another, or
        replaced between being found and being read; taking the first of no elements counts as
        missing.
        """
        from selenium.common.exceptions import (
            ElementClickInterceptedException,
            NoSuchElementException,
            StaleElementReferenceException,
            TimeoutException,
        )
        from selenium.webdriver.support.ui import WebDriverWait

        passing = [
            ElementClickInterceptedException,
            IndexError,
            NoSuchElementException,
            StaleElementReferenceException,
        ]
        waiter = WebDriverWait(self.driver, seconds, 0.1, ignored_exceptions=passing)
        try:
            return waiter.until(lambda driver: condition())
        except TimeoutException as late:
            seen = self.driver.execute_script("return document.body.innerText")
            raise AssertionError(f"{why or condition} within {seconds} s; seen: {seen}") from late

    def read(self, look: Callable[[], T]) -> T:
        """Return what ``look`` returns, true or not.

        It is retried if the page is redrawn between finding an element and using it.
        """
        return self.wait(lambda: (look(),))[0]

    def all(self, css: str) -> list:
        """Return every visible element that matches."""
        find = self.driver.find_elements
        return self.read(lambda: [e for e in find("css selector", css) if e.is_displayed()])

    def texts(self, css: str) -> list[str]:
        """Return the text of every visible element that matches."""
        return self.read(lambda: [e.text for e in self.all(css)])

    def text(self, css: str) -> str:
        """Return the text of the first visible element that matches, once there is one."""
        return self.read(lambda: self.all(css)[0].text)

    def attribute(self, css: str, name: str) -> str | None:
        """Return an attribute or property of the first visible element that matches."""
        return self.read(lambda: self.all(css)[0].get_attribute(name))

    @property
    def body(self) -> str:
        """All the text of the page."""
        return self.read(lambda: self.driver.find_element("tag name", "body").text)

    def first(self, css: str) -> object:
        """Return the first visible element that matches, once there is one.

        The page may be incomplete even after its script has ended: the browser fetches the code of
        some elements only when they are first shown.
        """
        return self.wait(lambda: self.all(css)[0], why=f"nothing matches {css}")

    @property
    def first_line(self) -> str:
        """The page's headline, or '' while there is none."""
        return " ".join(self.texts("[data-testid=stMain] h1"))

    def wait_for_headline(self, text: str, seconds: float = 30) -> str:
        """Wait until the headline contains a text; fail at once if the page shows an error."""

        def headline_or_none() -> str | None:
            broken = self.texts("[data-testid=stException], [data-testid=stAlertContentError]")
            assert not broken, broken[0]
            line = self.first_line
            return line if text in line and self.is_idle() else None

        return self.wait(headline_or_none, seconds, f"the headline never said '{text}'")

    @property
    def figures(self) -> list[list[dict]]:
        """The traces of every chart, in page order."""
        return self.driver.execute_script(_FIGURES)

    def charts(self, number: int = 1) -> list[list[dict]]:
        """Return the traces of ``number`` charts once all are drawn and the page is idle."""

        def figures_or_none() -> list | None:
            matches = self.figures
            return matches if len(matches) == number and all(matches) and self.is_idle() else None

        return self.wait(figures_or_none, why=f"there never were {number} charts")

    def set_download_folder(self, folder: Path) -> None:
        """Save downloads in a folder."""
        folder.mkdir(exist_ok=True)
        self.driver.execute_cdp_cmd(
            "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)}
        )
        self.folder = folder

    def saved(self, pattern: str) -> Path:
        """Return the downloaded file that matches a pattern, once it is complete."""
        return self.wait(lambda: next(self.folder.glob(pattern), None), why=f"no {pattern} came")

    def is_idle(self) -> bool:
        """Whether the page is not being redrawn."""
        return not self.all("[data-testid=stApp][data-test-script-state=running]")

    def click(self, label: str, css: str = "button") -> None:
        """Click the first element with a label."""

        def try_click() -> bool:
            matches = [e for e in self.all(css) if label in e.text.split("\n")]
            if matches:
                matches[0].click()
            return bool(matches)

        self.wait(try_click, why=f"nothing to click reads '{label}'")

    def click_on(self, css: str) -> None:
        """Click the first visible element that matches, once there is one."""
        self.read(lambda: self.all(css)[0].click())

    def press(self, *keys: str) -> None:
        """Press keys in the element that has the focus."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def navigate_to(self, page: str) -> None:
        """Follow a link in the sidebar."""
        self.click(page, "[data-testid=stSidebar] a")

    def choose(self, label: str, option: str) -> None:
        """Choose an option of a select box."""
        self.click_on(f"[data-testid=stSelectbox] input[aria-label*='{label}']")
        self.click(option, "[role=option]")
        self.wait(self.is_idle)

    def type(self, label: str, text: str) -> None:
        """Replace a field's text and press Enter."""
        from selenium.webdriver.common.keys import Keys

        field = f"input[aria-label='{label}']"
        keys = (Keys.CONTROL, "a", Keys.NULL, text, Keys.ENTER)
        self.read(lambda: self.all(field)[0].send_keys(*keys))
        self.wait(lambda: self.all(field)[0].get_attribute("value") == text and self.is_idle())

    def metric(self, label: str) -> str:
        """Return the value of the metric with a label, once it is shown."""

        def value() -> str | None:
            matches = [e for e in self.all("[data-testid=stMetric]") if label in e.text.split("\n")]
            values = [
                e.find_element("css selector", "[data-testid=stMetricValue]") for e in matches
            ]
            return values[0].text if values else None

        return self.wait(value, why=f"there is no figure '{label}'")
