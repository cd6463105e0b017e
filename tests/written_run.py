"""A federation on disk as its coordinator leaves it after one round of two, for those who look at it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from reft_edge.coordinator import events
from reft_edge.coordinator.event_log import EventLog
from reft_edge.coordinator.records import DeviceRecord, Prediction, QuarantineRecord, RunRecord
from reft_edge.coordinator.store import Store
from reft_edge.profiling.profile import DeviceProfile, Quantity
from reft_edge.wire.messages import Measured, ProfileAnnouncement

SETTINGS = """
federation = "birds"
[model]
name = "mlp"
input_shape = [6]
n_outputs = 3
[distillation]
epochs = 0
"""

RUN = "20260301-0badcafe"
TOOK = Measured(
    download_s=1.0, start_s=0.5, training_s=2.0, steps=8, peak_memory_bytes=1, temperature_celsius=81.0, throttled=True
)


def profile() -> DeviceProfile:
    one = Quantity(value=1.0, basis="specified")
    return DeviceProfile(name="pi-4", cores=one, clock_hz=one, flops_per_cycle=one, memory_total_bytes=one)


def planned(device: str) -> events.PlannedDevice:
    return events.PlannedDevice(
        device=device,
        variant="0.5",
        ratio=0.5,
        parameters=10,
        forward_macs=5,
        share=0.25,
        prediction=Prediction(download_s=1.0, training_s=2.5),
        predicted_round_s=4.0,
    )


def told() -> list[events.Event]:
    return [
        events.Started(
            run=RUN, federation="birds", resumed=False, round=1, rounds=2, model="mlp", parameters=40, global_bytes=160
        ),
        events.DeviceSeen(device="pi-1", online=True, profile="pi-4", training_samples=9),
        events.Planned(round=1, attempt=1, devices=[planned("pi-1"), planned("pi-2")], excluded=[]),
        events.RoundStarted(round=1, attempt=1, devices=["pi-1", "pi-2"], deadline=1e9),
        events.DeviceProgress(round=1, device="pi-2", state="failed", reason="no space left on the device"),
        events.UpdateSeen(round=1, device="pi-1", state="received", up_bytes=30, measured=TOOK),
        events.RoundMerged(round=1, updates=1, accuracy=0.5),
        events.RoundClosed(
            round=1,
            seconds=5.0,
            counted=1,
            asked=2,
            accuracy=0.5,
            traffic=[events.DeviceBytes(device="pi-1", down_bytes=2048, up_bytes=1024, full_model_bytes=160)],
        ),
    ]


FINISHED = events.Finished(run=RUN, rounds=1, accuracy=0.5, mse=None, updates={"merged": 1}, directory="")


def write_run(directory: Path) -> Path:
    """Settings, store and log; returns the settings file. The events are told at 2e9 s, all else was at 1e9."""
    path = directory / "federation.toml"
    path.write_text(SETTINGS)
    announcement = ProfileAnnouncement(profile=profile(), training_samples=9)
    with closing(Store(directory / "federation")) as store:
        store.create_run(RunRecord(run=RUN, federation="birds", settings_digest="", created_at=1e9))
        store.save_device(DeviceRecord(device="pi-1", announcement=announcement, seen_at=1e9))
        store.save_device(DeviceRecord(device="pi-3", announcement=announcement, seen_at=1e9))
        store.quarantine(QuarantineRecord(device="pi-3", since=1e9, reason="three bad updates", by="rejections"))
    tell_on(path, *told(), at=2e9)
    return path


def tell_on(settings_file: Path, *more: events.Event, at: float = 2e9) -> None:
    """Write more events to the run's log, as a coordinator would."""
    with EventLog(settings_file.parent / "federation" / RUN, events.ignore, clock=lambda: at) as tell:
        for event in more:
            tell(event)
