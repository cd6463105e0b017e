"""The guides in docs/ do what they say: every step that is not marked otherwise is typed as it is written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import skip_or_fail
from tests.docs.guide import Section, read_guide
from tests.docs.machines import free_ports, site

DOCS = Path(__file__).resolve().parents[2] / "docs"
BOARD = "device_profiles/raspberry-pi-5.toml"
MAX_LINE = 120


def pages() -> list[Path]:
    return sorted(DOCS.glob("*.md"))


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_a_section_whose_steps_are_not_run_says_so(page: Path) -> None:
    def silent(section: Section) -> bool:
        return section.n_left_out > 0 and "not run" not in section.prose.lower()

    assert [section.heading for section in read_guide(page) if silent(section)] == []


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_lines_are_short_enough_to_read(page: Path) -> None:
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
    assert [number for number, line in lines if len(line) > MAX_LINE and not line.startswith("| ")] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_model_and_data_of_ones_own_work_as_the_guide_says(tmp_path: Path) -> None:
    (broker,) = free_ports(1)
    substitutions = {
        "18832": str(broker),
        # Agents would measure at their first start, where tests run side by side: tests/agent/test_profiler.py does it.
        "[limits]\nthreads": f'[profile]\npath = "{DOCS.parent / BOARD}"\n\n[limits]\nthreads',
    }
    with site(tmp_path, substitutions=substitutions) as machines:
        machines.follow(read_guide(DOCS / "own-model-and-data.md"))


@pytest.mark.slow
@pytest.mark.mosquitto
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("mosquitto_program")
def test_a_fleet_comes_to_life_as_the_guide_says(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        skip_or_fail("curl is not installed, which the guide asks for predictions with")
    tls, dashboard, http, figures = free_ports(4)
    start_broker = "mosquitto -c provisioning/broker/mosquitto.conf"
    as_root = "echo 'user root' >> provisioning/broker/mosquitto.conf; " if os.geteuid() == 0 else ""
    substitutions = {
        "broker.local": "127.0.0.1",
        "8883": str(tls),
        "8080": str(dashboard),
        "8090": str(http),
        "9465": str(figures),
        # Half a minute of measuring, where tests run side by side: tests/cli/test_profile_device.py does it.
        "reft-edge profile-device --quick --name pump-board --output": f"cp {DOCS.parent}/{BOARD}",
        # Without systemd: a process whose number is known, and the signal that systemd would send.
        start_broker: f"{as_root}echo $$ > broker.pid; exec {start_broker}",
        '["systemctl", "reload", "reft-edge-broker"]': '["sh", "-c", "kill -HUP $(cat ../broker.pid)"]',
    }
    with site(tmp_path, substitutions=substitutions) as machines:
        (machines.folder("laptop") / "reft-edge").symlink_to(DOCS.parent)  # what `git clone` brings
        machines.follow(read_guide(DOCS / "fleet.md"))
