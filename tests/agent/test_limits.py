"""What the device's owner grants: speed, memory, and what is announced of them; and what a restart need not repeat."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_edge.agent.admission import refusal
from reft_edge.agent.pacing import Pacer
from reft_edge.agent.settings import AgentSettings, Limits, limited_profile
from reft_edge.agent.training import learning_rate_at
from reft_edge.bundle.bundle import Bundle
from reft_edge.bundle.manifest import BlobRef, MeanSquaredError
from reft_edge.data.description import DataDescription, fingerprint
from reft_edge.data.settings import DataSettings
from reft_edge.errors import ConfigError
from reft_edge.profiling.profile import DeviceProfile
from reft_edge.wire.messages import Task, TrainingPlan, WeightsRef

PROFILE = DeviceProfile.read(Path(__file__).parent.parent.parent / "device_profiles" / "raspberry-pi-4b.toml")
PLAN = TrainingPlan(local_epochs=2, batch_size=16, learning_rate=0.1, seed=1)


@given(st.lists(st.floats(0, 0.3), min_size=1, max_size=30), st.floats(1, 1000), st.floats(0, 0.01))
def test_work_is_never_faster_than_granted(works_s: list[float], flops: float, oversleep_s: float) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        assert seconds > 0
        now += seconds + oversleep_s

    pacer = Pacer(flops / 0.1, clock=lambda: now, sleep=sleep)
    for work_s in works_s:
        pacer.begin()
        now += work_s
        pacer.end(flops)
    granted_s = 0.1 * len(works_s)
    assert now >= granted_s - oversleep_s - 1e-9
    if max(works_s) < 0.09 - oversleep_s:
        assert now <= granted_s + oversleep_s + 1e-9  # sleeping too long is made up for


def test_without_a_limit_nothing_waits() -> None:
    pacer = Pacer(None, clock=lambda: 0.0, sleep=lambda _: pytest.fail("slept"))
    pacer.begin()
    pacer.end(1e12)


def test_what_is_announced_is_the_lesser_of_measured_and_granted() -> None:
    less = limited_profile(PROFILE, Limits(training_flops_per_s=1e6, memory_bytes=2**25))
    assert (less.planning_flops_per_s, less.planning_memory_bytes) == (1e6, 2**25)
    assert limited_profile(PROFILE, Limits(training_flops_per_s=1e15, memory_bytes=2**50)) == PROFILE
    assert limited_profile(PROFILE, Limits()) == PROFILE


def test_the_cosine_goes_from_the_rate_to_nearly_nothing() -> None:
    cosine = msgspec.structs.replace(PLAN, learning_rate_schedule="cosine")
    rates = [learning_rate_at(cosine, step, 100) for step in range(100)]
    assert rates[0] == 0.1
    assert rates == sorted(rates, reverse=True)
    assert rates[50] == pytest.approx(0.05)
    assert 0 < rates[-1] < 1e-4
    assert {learning_rate_at(PLAN, step, 100) for step in range(100)} == {0.1}


WHOLE = 'device = "a"\nfederation = "f"\n[data]\npath = "d"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('device = "a/b"\nfederation = "f"\n[data]\npath = "d"', "device 'a/b' must be"),
        ('device = "a"\nfederation = "f"', "data"),
        (
            'device = "a"\nfederation = "f"\n[data]\npath = "d"\n[limits]\nmemory_byte = 5',
            "did you mean 'memory_bytes'",
        ),
        (WHOLE + 'function = "m:f"', "either path"),
    ],
)
def test_a_wrong_settings_file_is_named_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "agent.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        AgentSettings.read(tmp_path / "agent.toml")


def test_data_are_counted_again_when_any_file_has_changed(tmp_path: Path) -> None:
    (tmp_path / "d" / "cat").mkdir(parents=True)
    picture = tmp_path / "d" / "cat" / "1.png"
    picture.write_bytes(b"1")
    settings = DataSettings(path="d")
    first = fingerprint(settings, base_dir=tmp_path)
    assert fingerprint(settings, base_dir=tmp_path) == first
    assert fingerprint(DataSettings(path="d", broken="skip"), base_dir=tmp_path) != first
    picture.write_bytes(b"12")
    second = fingerprint(settings, base_dir=tmp_path)
    picture.rename(picture.with_name("2.png"))
    assert len({first, second, fingerprint(settings, base_dir=tmp_path)}) == 3
    assert fingerprint(DataSettings(function="m:f"), base_dir=tmp_path) is None


IMAGES = DataDescription(training_samples=9, holdout_samples=1, n_classes=2, classes=("cat", "dog"), pictures=True)
NUMBERS = DataDescription(training_samples=9, holdout_samples=1, input_shape=(36,))


@pytest.mark.parametrize(
    ("data", "classes", "message"),
    [
        (IMAGES, ("ant", "cat", "dog"), None),
        (IMAGES, ("cat", "cow"), "class 'dog' is not one of the federation's cat, cow"),
        (msgspec.structs.replace(IMAGES, n_classes=9), (), "9 classes, the model has 3 outputs"),
        (msgspec.structs.replace(IMAGES, training_samples=0), (), "no training samples"),
        (NUMBERS, (), "targets are numbers"),
        (msgspec.structs.replace(NUMBERS, n_classes=3), (), None),
        (
            msgspec.structs.replace(NUMBERS, n_classes=3, input_shape=(35,)),
            (),
            "the model takes (1, 6, 6)",
        ),
        (None, (), None),
    ],
)
def test_data_that_do_not_fit_the_model_are_refused(
    bundle: Bundle, data: DataDescription | None, classes: tuple[str, ...], message: str | None
) -> None:
    ref = BlobRef(sha256="0" * 64, size_bytes=1)
    task = Task(
        task="t", round=0, run="r", bundle=ref, weights=WeightsRef(blob=ref), plan=PLAN, deadline=0, classes=classes
    )
    reason = refusal(bundle.manifest, task, limits=Limits(), profile=PROFILE, data=data)
    assert reason is None if message is None else message in str(reason)
    regression = msgspec.structs.replace(bundle.manifest, loss=MeanSquaredError())
    assert refusal(regression, task, limits=Limits(), profile=None, data=None) is None
