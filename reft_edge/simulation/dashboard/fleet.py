"""A large federation on disk as its coordinator leaves it, written by the project's own store and event log."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from reft_edge.coordinator import events
from reft_edge.coordinator.event_log import EventLog
from reft_edge.coordinator.records import DeviceRecord, Prediction, RunRecord
from reft_edge.coordinator.store import Store
from reft_edge.profiling.profile import DeviceProfile, Quantity
from reft_edge.wire.messages import Measured, ProfileAnnouncement

RUN = "20260301-0badcafe"

SETTINGS = """\
federation = "large-fleet"
[model]
name = "mlp"
input_shape = [6]
n_outputs = 3
[distillation]
epochs = 0
"""

STEPS = 1000
BOARDS = (("raspberry-pi-zero-2w", 2e9, 0.9), ("raspberry-pi-4b", 8e9, 0.6), ("jetson-orin-nano", 60e9, 0.0))
"""Kind, FLOP/s of training, and the ratio by which its variant is pruned. Stand-ins: nothing is trained here."""


def names(n_devices: int) -> list[str]:
    return [f"board-{number:04}" for number in range(1, n_devices + 1)]


def write_fleet(directory: Path, n_devices: int, closed_rounds: int) -> Path:
    """A run with closed rounds behind it and one open, in which all devices train; returns the settings file."""
    path = directory / "federation.toml"
    path.write_text(SETTINGS, encoding="utf-8")
    results = directory / "federation"
    now = time.time()
    with closing(Store(results)) as store:
        store.create_run(RunRecord(run=RUN, federation="large-fleet", settings_digest="", created_at=now - 3600))
        for device in names(n_devices):
            announcement = ProfileAnnouncement(profile=_profile(device), training_samples=600, holdout_samples=100)
            store.save_device(DeviceRecord(device=device, announcement=announcement, seen_at=now))
    with EventLog(results / RUN, events.ignore) as tell:
        tell(
            events.Started(
                run=RUN,
                federation="large-fleet",
                resumed=False,
                round=1,
                rounds=closed_rounds + 1,
                model="mlp",
                parameters=40_000,
                global_bytes=160_000,
            )
        )
        for device in names(n_devices):
            tell(events.DeviceSeen(device=device, online=True, profile=_board(device)[0], training_samples=600))
        for number in range(1, closed_rounds + 1):
            _open(tell, number, n_devices)
            _close(tell, number, n_devices)
        _open(tell, closed_rounds + 1, n_devices)
    return path


def progress(device: str, round_number: int, *, step: int, loss: float) -> events.DeviceProgress:
    """A device reports from its training."""
    return events.DeviceProgress(
        round=round_number, device=device, state="training", steps_done=step % STEPS, steps_total=STEPS, loss=loss
    )


def _open(tell: Callable[[events.Event], None], number: int, n_devices: int) -> None:
    planned = [_planned(device) for device in names(n_devices)]
    tell(events.Planned(round=number, attempt=1, devices=planned, excluded=[]))
    deadline = time.time() + 3600
    tell(events.RoundStarted(round=number, attempt=1, devices=names(n_devices), deadline=deadline))
    for device in names(n_devices):
        tell(progress(device, number, step=1, loss=2.5))


def _close(tell: Callable[[events.Event], None], number: int, n_devices: int) -> None:
    took = Measured(download_s=2.0, start_s=3.0, training_s=41.0, steps=STEPS, peak_memory_bytes=180 * 2**20)
    for device in names(n_devices):
        tell(events.UpdateSeen(round=number, device=device, state="received", up_bytes=90_000, measured=took))
    accuracy = 0.9 - 0.5 / (number + 1)
    tell(events.RoundCollected(round=number, counted=n_devices, asked=n_devices, late=[]))
    tell(events.RoundMerged(round=number, updates=n_devices, accuracy=accuracy, accuracy_before_batch_norm=accuracy))
    tell(events.RoundDistilled(round=number, teachers=n_devices, kept_epoch=2, accuracy=accuracy + 0.01))
    traffic = [
        events.DeviceBytes(device=device, down_bytes=120_000, up_bytes=90_000, full_model_bytes=160_000)
        for device in names(n_devices)
    ]
    tell(
        events.RoundClosed(
            round=number, seconds=70.0, counted=n_devices, asked=n_devices, traffic=traffic, accuracy=accuracy + 0.01
        )
    )


def _board(device: str) -> tuple[str, float, float]:
    return BOARDS[int(device[-4:]) % len(BOARDS)]


def _planned(device: str) -> events.PlannedDevice:
    _, _, ratio = _board(device)
    share = (1 - ratio) ** 2
    return events.PlannedDevice(
        device=device,
        variant=f"{ratio:.2f}",
        ratio=ratio,
        parameters=int(40_000 * share),
        forward_macs=int(30_000 * share),
        share=share,
        prediction=Prediction(download_s=2.0, start_s=3.0, steps=STEPS, training_s=40.0, peak_memory_bytes=2e8),
        predicted_round_s=50.0,
        training_flops=5e10,
    )


def _profile(device: str) -> DeviceProfile:
    board, flops_per_s, _ = _board(device)

    def specified(value: float) -> Quantity:
        return Quantity(value=value, basis="specified", source="made up")

    return DeviceProfile(
        name=board,
        cores=specified(4),
        clock_hz=specified(1.5e9),
        flops_per_cycle=specified(8),
        training_flops_per_s=specified(flops_per_s),
        memory_total_bytes=specified(2**30),
        memory_available_bytes=specified(600 * 2**20),
    )
