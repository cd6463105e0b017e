"""A dashboard process and a browser that looks at it, for measurements: when something shows, and what travelled."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from reft_edge.errors import ResourceError

SIZE = (1280, 900)
NARROWEST_WINDOW = 500
PATIENCE_S = 60.0
LOOK_S = 0.02

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

_WATCH = """
window.shownAt = {};
const now = () => performance.timeOrigin + performance.now();
const look = (text) => {
  for (const [word] of text.matchAll(/\\b\\d+\\.\\d{3}\\b|board-\\d{4}/g)) shownAt[word] ??= now();
};
new MutationObserver((changes) => {
  for (const change of changes) {
    if (change.type === "characterData") look(change.target.data);
    for (const node of change.addedNodes) {
      if (node.nodeName === "SCRIPT" || change.target.nodeName === "SCRIPT") continue;
      look(node.textContent ?? "");
      if (node.nodeName === "CANVAS") shownAt["chart"] ??= now();
      if (node.querySelector?.("canvas")) shownAt["chart"] ??= now();
    }
  }
}).observe(document, { childList: true, subtree: true, characterData: true });
"""
"""Notes when each device's name, each number with three digits after the point, and a chart was first in the page."""

_LOADED = """
const done = arguments[0];
const parts = performance.getEntriesByType("resource").filter((one) => one.startTime < done);
const page = performance.getEntriesByType("navigation")[0];
const paint = performance.getEntriesByName("first-contentful-paint")[0];
return {
  paint: paint?.startTime,
  bytes: page.transferSize + parts.reduce((sum, one) => sum + one.transferSize, 0),
  requests: 1 + parts.length,
};
"""


@dataclass(frozen=True, kw_only=True)
class RunningDashboard:
    """A process of its own, as `reft-edge dashboard` starts it."""

    address: str
    pid: int

    @property
    def cpu_s(self) -> float:
        """Processor seconds so far, user and system."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S

    @property
    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
        return int(found[1]) * 1024 if found else 0


@contextmanager
def dashboard(settings: Path) -> Iterator[RunningDashboard]:
    """Raises `ResourceError` when it does not come up."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "reft_edge", "dashboard", str(settings), "--port", str(port)]
    # NiceGUI behaves otherwise where it finds itself in a test.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            if process.stdout is None or str(port) not in process.stdout.readline():
                raise ResourceError("the dashboard did not start")
            yield RunningDashboard(address=f"http://127.0.0.1:{port}", pid=process.pid)
        finally:
            process.terminate()


class Browser:
    """A headless Chromium with one page."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self._driver = driver
        self._call("Page.addScriptToEvaluateOnNewDocument", source=_WATCH)
        self._call("Network.enable")
        self._call("Performance.enable")

    def load(self, address: str, *, wait_for: str, cold: bool) -> tuple[float, float, int, int]:
        """First paint and completion in milliseconds, bytes and requests until then. `wait_for`: see `shown`."""
        if cold:
            self._call("Network.clearBrowserCache")
        self._driver.get(address)
        origin = float(self._driver.execute_script("return performance.timeOrigin"))
        complete_ms = self.shown(wait_for) - origin
        found: dict[str, Any] = {}
        give_up = time.monotonic() + PATIENCE_S
        while found.get("paint") is None:  # what is in the page is painted a frame later
            found = self._driver.execute_script(_LOADED, complete_ms)
            if time.monotonic() > give_up:
                raise ResourceError(f"the browser never painted {address}")
        return float(found["paint"]), complete_ms, int(found["bytes"]), int(found["requests"])

    def shown(self, word: str) -> float:
        """Waits until a device's name, a number or "chart" is in the page; Unix milliseconds of that moment.

        Raises `ResourceError` when it does not come.
        """
        give_up = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up:
            at = self._driver.execute_script("return shownAt[arguments[0]]", word)
            if at is not None:
                return float(at)
            time.sleep(LOOK_S)
        raise ResourceError(f"the page never showed {word!r}")

    @property
    def busy_s(self) -> float:
        """Seconds that the page's main thread has worked."""
        metrics = self._call("Performance.getMetrics")["metrics"]
        return float(next(one["value"] for one in metrics if one["name"] == "TaskDuration"))

    def _call(self, command: str, **parameters: object) -> dict[str, Any]:
        answer: dict[str, Any] = self._driver.execute_cdp_cmd(command, parameters)
        return answer


@contextmanager
def chromium(size: tuple[int, int] = SIZE, *, dark: bool = False) -> Iterator[webdriver.Chrome]:
    """A headless one, which keeps what it asks for and what goes wrong in its logs.

    Raises `ResourceError` where none is installed.
    """
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if program is None or driver is None:
        raise ResourceError("chromium and chromedriver are not on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    # Without a sandbox of its own, because tests and benchmarks may run as root; it only sees pages of ours.
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={size[0]},{size[1]}"]
    for flag in flags + (["--blink-settings=preferredColorScheme=0"] if dark else []):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    try:
        if size[0] < NARROWEST_WINDOW:  # a window cannot be narrower; a phone's page is
            screen = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": True}
            opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        yield opened
    finally:
        opened.quit()


@contextmanager
def browser() -> Iterator[Browser]:
    """Raises `ResourceError` where no Chromium is installed."""
    with chromium() as opened:
        yield Browser(opened)
