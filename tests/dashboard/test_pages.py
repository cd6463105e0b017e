"""The pages in a real browser: what happens shows without a reload, and nothing is asked of anybody else."""

from __future__ import annotations

from contextlib import closing

import pytest
from selenium.webdriver.common.by import By

from reft_edge.coordinator import events
from reft_edge.coordinator.event_log import EventLog
from reft_edge.coordinator.store import Store
from reft_edge.dashboard.parts import PAGES
from reft_edge.simulation.dashboard.fleet import RUN, write_fleet
from reft_edge.simulation.dashboard.looking import dashboard
from tests.dashboard.browsing import LAPTOP, PHONE, asked_hosts, browser, wait_for_text
from tests.written_deployment import asked, condition, deployment, health, write, write_rollout
from tests.written_run import FINISHED, tell_on, write_run

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_a_round_is_followed_and_a_rejected_update_appears_without_a_reload(tmp_path):
    settings = write_run(tmp_path)
    with dashboard(settings) as served, browser(LAPTOP) as page:
        page.get(served.address + PAGES["Round"])
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
        page.get(served.address + PAGES["Rejected"])
        wait_for_text(page, "pi-1", "far <b>too</b> long", "three bad updates")


@pytest.mark.parametrize(("size", "dark"), [(LAPTOP, False), (PHONE, True)], ids=["laptop", "phone, dark"])
def test_every_page_shows_its_part_and_asks_nobody_else(tmp_path, size, dark):
    settings = write_run(tmp_path)
    tell_on(settings, events.Exported(name="global", path="x/global.onnx", values={"accuracy": 0.5}), FINISHED)
    write_rollout(tmp_path)
    words = {
        "Fleet": ["pi-1", "merged", "48 °C", "80% battery", "predicts unlike the rest", "global, int8"],
        "Round": ["pi-2", "failed", "no space left on the device"],
        "Curves": ["On test data, by round", "Over the air"],
        "Family": ["global.onnx", "50.0%"],
        "Rejected": ["In quarantine", "pi-3"],
        "Deployments": ["rolling out", "89.5%", "3.1 ms", "at most 0.5 s", "rolled back", "0.41 on its holdout"],
        "Drift": ["pi-1", "predicts class robin in 94% of cases"],
        "one deployment": ["too-big", "41.0%", "not taken"],
        "one device": ["How sure it is", "in 94% of cases"],
    }
    pages = PAGES | {"one deployment": "/deployments/d-1", "one device": "/drift/pi-1"}
    with dashboard(settings) as served, browser(size, dark=dark) as page:
        for name, path in pages.items():
            page.get(served.address + path)
            wait_for_text(page, *words[name])
            width = page.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
            assert width <= 0, f"{name} is wider than the screen"
        page.get(served.address + PAGES["Fleet"])
        wait_for_text(page, "predicts unlike the rest")
        page.find_element(By.LINK_TEXT, "predicts unlike the rest").click()
        wait_for_text(page, *words["one device"])
        assert asked_hosts(page) == {"127.0.0.1"}
        assert [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
        background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(18, 18, 18)") is dark


def test_a_deployment_is_followed_to_its_roll_back(tmp_path):
    settings = write_run(tmp_path)
    with dashboard(settings) as served, browser(LAPTOP) as page:
        page.get(served.address + PAGES["Deployments"])
        wait_for_text(page, "Nothing was deployed yet.")
        page.execute_script("window.loadedOnce = true")
        canary = {"wave": "canary", "asked_at": 1e9}
        write(tmp_path, deployments=[(deployment("d-1", "canary"), [asked("d-1", "pi-1", state="checking", **canary)])])
        wait_for_text(page, "d-1", "canary", "checking")
        refused = asked(
            "d-1", "pi-1", state="refused", health=(health("int8", 0.4),), reason="<i>too bad</i>", **canary
        )
        write(tmp_path, deployments=[(deployment("d-1", "rolling_back", reason="1 of 1 canaries refused"), [refused])])
        wait_for_text(page, "rolling back", "refused", "40.0%", "<i>too bad</i>", "1 of 1 canaries refused")
        write(tmp_path, deployments=[(deployment("d-1", "rolled_back", ended_at=1e9 + 109), [])])
        wait_for_text(page, "rolled back", "9.00 s")
        assert page.execute_script("return window.loadedOnce") is True


def test_a_page_of_one_deployment_keeps_its_devices_when_another_begins(tmp_path):
    settings = write_run(tmp_path)
    write(tmp_path, deployments=[(deployment("d-1", "canary"), [asked("d-1", "pi-1", state="checking")])])
    with dashboard(settings) as served, browser(LAPTOP) as page:
        page.get(served.address + "/deployments/d-1")
        wait_for_text(page, "d-1", "checking")
        refused = asked("d-1", "pi-1", state="refused", health=(health("int8", 0.4),))
        write(tmp_path, deployments=[(deployment("d-1", "rolled_back"), [refused])])
        wait_for_text(page, "rolled back", "refused", "40.0%")
        later = deployment("d-2", "canary", started_at=1e9 + 900)
        over = deployment("d-1", "rolled_back", reason="and another began")
        write(tmp_path, deployments=[(over, []), (later, [asked("d-2", "pi-2")])])
        wait_for_text(page, "and another began", "refused", "40.0%")


def test_a_table_is_filtered_and_sorted_where_it_is_read(tmp_path):
    settings = write_fleet(tmp_path, 30, 0)
    write(tmp_path, conditions=[condition("d-1", "board-0005", temperature_celsius=48.5)])
    with dashboard(settings) as served, browser(LAPTOP) as page:
        page.get(served.address + PAGES["Fleet"])
        wait_for_text(page, "board-0001", "board-0030")
        page.find_element(By.CSS_SELECTOR, "input[type=search]").send_keys("jetson")
        wait_for_text(page, "10 of 30")
        first = "return document.querySelector('tbody td').innerText"
        assert page.execute_script(first).startswith("board-0002")
        for _ in range(2):
            page.find_element(By.XPATH, "//th/button[text()='device']").click()
        assert page.execute_script(first).startswith("board-0029")
        for _ in range(2):
            page.find_element(By.XPATH, "//th/button[text()='temperature']").click()
            assert page.execute_script(first).startswith("board-0005"), "what is unknown is at the end"
        page.find_element(By.XPATH, "//th/button[text()='temperature']").click()
        tell = events.DeviceProgress(round=1, device="board-0029", state="failed", reason="no memory")
        with EventLog(tmp_path / "federation" / RUN, events.ignore) as write_event:
            write_event(tell)
        wait_for_text(page, "failed 1", "training 29")
        page.find_element(By.XPATH, "//button[starts-with(., 'failed')]").click()
        wait_for_text(page, "1 of 30")
        assert page.execute_script(first).startswith("board-0029")
