"""A browser for tests, and what a person would look for in a page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from reft_edge.errors import ResourceError
from reft_edge.simulation.dashboard.looking import chromium
from tests.conftest import skip_or_fail

PATIENCE_S = 60
PHONE, LAPTOP = (390, 844), (1280, 900)


@contextmanager
def browser(size: tuple[int, int], *, dark: bool = False) -> Iterator[webdriver.Chrome]:
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(chromium(size, dark=dark))
        except ResourceError as exc:
            skip_or_fail(str(exc))
        yield opened


def text_of(page: webdriver.Chrome) -> str:
    return str(page.find_element(By.TAG_NAME, "body").text)


def wait_for_text(page: webdriver.Chrome, *words: str) -> None:
    WebDriverWait(page, PATIENCE_S, poll_frequency=0.1).until(
        lambda one: all(word in text_of(one) for word in words), f"no {words}"
    )


def asked_hosts(page: webdriver.Chrome) -> set[str | None]:
    """Hosts of everything that the browser asked for."""
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    sockets = [m["params"]["url"] for m in messages if m["method"] == "Network.webSocketCreated"]
    return {urlsplit(url).hostname for url in requests + sockets if not url.startswith(("data:", "blob:"))}
