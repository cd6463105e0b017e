"""Every profile in device_profiles/ can be read, is named as its file is, and says where each value comes from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reft_edge.profiling.profile import DeviceProfile, Quantity

FOLDER = Path(__file__).parents[2] / "device_profiles"
FILES = sorted(FOLDER.glob("*.toml"))


def quantities(profile: DeviceProfile) -> dict[str, Quantity]:
    values = {field: getattr(profile, field) for field in profile.__struct_fields__}
    return {field: value for field, value in values.items() if isinstance(value, Quantity)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_value_has_a_source_that_fits_its_basis(path: Path) -> None:
    profile = DeviceProfile.read(path)
    assert profile.name == path.stem
    assert profile.description
    assert profile.processor
    for field, quantity in quantities(profile).items():
        assert len(quantity.source) > 10, f"{path.name}: {field} does not say where it comes from"
        if quantity.basis == "measured":
            assert re.search(r"20\d\d-\d\d-\d\d", quantity.source), f"{path.name}: {field} does not say when"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_figures_are_possible(path: Path) -> None:
    profile = DeviceProfile.read(path)
    assert profile.planning_memory_bytes <= profile.memory_total_bytes.value
    assert 1e9 < profile.theoretical_flops_per_s < 1e12
    if profile.training_flops_per_s is not None:
        assert profile.training_flops_per_s.value < profile.theoretical_flops_per_s


def test_there_are_boards_of_both_kinds() -> None:
    profiles = [DeviceProfile.read(path) for path in FILES]
    bases = {
        name: {value.basis for value in quantities(profile).values()}
        for name, profile in zip(FILES, profiles, strict=True)
    }
    assert sum(basis == {"specified"} for basis in bases.values()) >= 8
    assert any("measured" in basis for basis in bases.values())
