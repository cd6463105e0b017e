"""Words on the pages are readable, light and dark, whoever reads them."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from reft_edge.dashboard import deployment_rows, rows

CSS = resources.files("reft_edge.dashboard").joinpath("style.css").read_text(encoding="utf-8")
READABLE = 4.5
"""Contrast that WCAG 2.2 asks of small letters (success criterion 1.4.3)."""

ON_GROUND = [(ink, ground) for ink in ("ink", "faint", "link") for ground in ("page", "card")]
BADGES = [(f"{tone}-ink", tone) for tone in ("busy", "good", "warn", "bad", "quiet")]


def colours(theme: str) -> dict[str, str]:
    block = CSS.split(theme + " {")[1].split("}")[0]
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [":root", "body.body--dark"])
@pytest.mark.parametrize(("ink", "ground"), ON_GROUND + BADGES)
def test_letters_stand_out_from_their_ground(theme, ink, ground):
    found = colours(theme)
    dark, light = sorted((luminance(found[ink]), luminance(found[ground])))
    assert (light + 0.05) / (dark + 0.05) >= READABLE


def test_every_tone_has_its_colours():
    tones = {tone for _, tone in [*rows.LANES.values(), *deployment_rows.DEPLOYMENT_WORDS.values()]}
    tones |= {tone for _, tone in deployment_rows.DEVICE_WORDS.values()}
    assert {tone for _, tone in BADGES} == tones


def test_nothing_is_asked_of_anybody():
    assert not re.search(r"@import|url\(", CSS)
