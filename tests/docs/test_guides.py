"""The guides in docs/ do what they say: every step that is not marked otherwise is typed as it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.guide import Section, read_guide
from tests.docs.machines import free_ports, site

DOCS = Path(__file__).resolve().parents[2] / "docs"
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
@pytest.mark.timeout(300)
def test_a_model_and_data_of_ones_own_work_as_the_guide_says(tmp_path: Path) -> None:
    (broker,) = free_ports(1)
    with site(tmp_path, substitutions={"18832": str(broker)}) as machines:
        machines.follow(read_guide(DOCS / "own-model-and-data.md"))
