"""The pages in a real browser: what happens shows without a reload, and nothing is asked of anybody else."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from reft_edge.coordinator import events
from reft_edge.coordinator.store import Store
from reft_edge.dashboard.parts import PAGES
from tests.conftest import skip_or_fail
from tests.written_run import FINISHED, tell_on, write_run

pytestmark = [pytest.mark.browser, pytest.mark.slow]

PATIENCE_S = 60
PHONE, LAPTOP = (390, 844), (1280, 900)


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return int(server.getsockname()[1])


@contextmanager
def dashboard(settings: Path) -> Iterator[str]:
    """A dashboard process; gives its address."""
    port = free_port()
    command = [sys.executable, "-m", "reft_edge", "dashboard", str(settings), "--port", str(port)]
    # NiceGUI behaves otherwise where it finds itself in a test.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert f"127.0.0.1:{port}" in line
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@contextmanager
def browser(size: tuple[int, int], *, dark: bool = False) -> Iterator[webdriver.Chrome]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        skip_or_fail("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    # Without a sandbox of its own, because tests may run as root; it only sees pages of ours.
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={size[0]},{size[1]}"]
    for flag in flags + (["--blink-settings=preferredColorScheme=0"] if dark else []):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield opened
    finally:
        opened.quit()


def text_of(page: webdriver.Chrome) -> str:
    return str(page.find_element(By.TAG_NAME, "body").text)


def wait_for_text(page: webdriver.Chrome, *words: str) -> None:
    WebDriverWait(page, PATIENCE_S).until(lambda one: all(word in text_of(one) for word in words), f"no {words}")


def asked_hosts(page: webdriver.Chrome) -> set[str | None]:
    """Hosts of everything that the browser asked for."""
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    sockets = [m["params"]["url"] for m in messages if m["method"] == "Network.webSocketCreated"]
    return {urlsplit(url).hostname for url in requests + sockets if not url.startswith(("data:", "blob:"))}


def test_a_round_is_followed_and_a_rejected_update_appears_without_a_reload(tmp_path):
    settings = write_run(tmp_path)
    with dashboard(settings) as address, browser(LAPTOP) as page:
        page.get(address + PAGES["Round"])
        wait_for_text(page, "birds", "interrupted", "the coordinator is not running")
        page.execute_script("window.loadedOnce = true")
        with closing(Store(tmp_path / "federation")):  # a coordinator is at work again
            tell_on(settings, events.DeviceProgress(round=2, device="pi-1", state="training", steps_total=8))
            wait_for_text(page, "training")
            tell_on(settings, events.UpdateSeen(round=2, device="pi-1", state="rejected", reason="far <b>too</b> long"))
            wait_for_text(page, "rejected", "far <b>too</b> long")
            tell_on(settings, events.Distilling(round=2, epoch=3, epochs=9, loss=0.25))
            wait_for_text(page, "epoch 3 of 9")
        wait_for_text(page, "the coordinator is not running")
        assert page.execute_script("return window.loadedOnce") is True
        page.get(address + PAGES["Rejected"])
        wait_for_text(page, "pi-1", "far <b>too</b> long", "three bad updates")


@pytest.mark.parametrize(("size", "dark"), [(LAPTOP, False), (PHONE, True)], ids=["laptop", "phone, dark"])
def test_every_page_shows_its_part_and_asks_nobody_else(tmp_path, size, dark):
    settings = write_run(tmp_path)
    tell_on(settings, events.Exported(name="global", path="x/global.onnx", values={"accuracy": 0.5}), FINISHED)
    words = {
        "Fleet": ["pi-1", "merged", "81 °C, throttled"],
        "Round": ["pi-2", "failed", "no space left on the device"],
        "Curves": ["On test data, by round", "Over the air"],
        "Family": ["global.onnx", "50.0%"],
        "Rejected": ["In quarantine", "pi-3"],
    }
    with dashboard(settings) as address, browser(size, dark=dark) as page:
        for name, path in PAGES.items():
            page.get(address + path)
            wait_for_text(page, *words[name])
            width = page.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
            assert width <= 0, f"{name} is wider than the screen"
        assert asked_hosts(page) == {"127.0.0.1"}
        assert [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
        background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(18, 18, 18)") is dark
