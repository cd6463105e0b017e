"""A run's curves for TensorBoard, read back from the files that it reads."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event as Record
from tensorboardX.record_writer import RecordWriter

from reft_edge.cli.main import main
from reft_edge.coordinator import events
from reft_edge.coordinator.event_log import EventLog
from reft_edge.coordinator.report.tensorboard import LiveScalars, write_run
from reft_edge.errors import FederationError, ResourceError
from tests.written_run import RUN, TOOK, told
from tests.written_run import write_run as write_federation

MORE = (
    events.RoundMerged(round=2, updates=1, accuracy=0.6, accuracy_before_batch_norm=0.55, loss=1.5),
    events.Distilling(round=2, epoch=1, epochs=2, loss=0.9),
    events.Distilling(round=2, epoch=2, epochs=2, loss=0.7),
    events.RoundDistilled(round=2, teachers=1, kept_epoch=2, accuracy=0.7, loss=1.25),
    events.RoundClosed(round=2, seconds=6.0, counted=1, asked=1, accuracy=0.7, traffic=[]),
    events.Distilling(round=3, epoch=1, epochs=2, loss=0.5),
)


def records(file: Path) -> Iterator[bytes]:
    """TFRecords: length, its checksum, data, its checksum; a checksum is CRC-32C, rotated and shifted."""

    def checked(data: bytes) -> bytes:
        crc = crc32c(data)
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        assert content.read(4) == struct.pack("<I", masked)
        return data

    with file.open("rb") as content:
        while head := content.read(8):
            (length,) = struct.unpack("<Q", checked(head))
            yield checked(content.read(length))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every tag."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for data in records(file):
            record = Record.FromString(data)
            for value in record.summary.value:
                found.setdefault(value.tag, []).append((record.step, pytest.approx(value.simple_value)))
    return found


def test_a_run_becomes_curves_by_round(tmp_path: Path) -> None:
    timed = [msgspec.structs.replace(event, at=1e9) for event in (*told(), *MORE)]
    folder = write_run(timed, tmp_path / "curves")
    assert folder == tmp_path / "curves" / RUN
    found = scalars(folder)
    expected = {
        "accuracy/averaged": [(2, 0.55)],
        "accuracy/merged": [(1, 0.5), (2, 0.6)],
        "accuracy/distilled": [(2, 0.7)],
        "accuracy/round": [(1, 0.5), (2, 0.7)],
        "loss/merged": [(2, 1.5)],
        "loss/distilled": [(2, 1.25)],
        "distillation/loss": [(1, 0.9), (2, 0.7), (3, 0.5)],
        "predicted_seconds/pi-1": [(1, 3.5)],
        "measured_seconds/pi-1": [(1, 3.5)],
        "bytes/down": [(1, 2048.0), (2, 0.0)],
        "up_bytes/pi-1": [(1, 1024.0)],
        "updates/received": [(1, 1.0)],
        "round/seconds": [(1, 5.0), (2, 6.0)],
    }
    assert {tag: found[tag] for tag in expected} == expected
    assert "mse/round" not in found


def test_times_are_those_of_the_events(tmp_path: Path) -> None:
    folder = write_run([msgspec.structs.replace(event, at=1e9) for event in told()], tmp_path)
    (file,) = folder.glob("events.out.tfevents.*")
    times = {Record.FromString(data).wall_time for data in records(file) if Record.FromString(data).summary.value}
    assert times == {1e9}


def test_what_a_rejected_device_measured_is_not_shown(tmp_path: Path) -> None:
    received = events.UpdateSeen(round=1, device="liar", state="received", measured=TOOK)
    rejected = events.UpdateSeen(round=1, device="liar", state="rejected")
    found = scalars(write_run([*told()[:-1], received, rejected, told()[-1]], tmp_path))
    assert not {tag for tag in found if tag.endswith("/liar")}
    assert found["updates/rejected"] == [(1, 1.0)]


def test_written_again_there_is_nothing_twice(tmp_path: Path) -> None:
    once = scalars(write_run(told(), tmp_path))
    assert scalars(write_run(told(), tmp_path)) == once


def test_a_run_that_goes_on_is_written_on_and_one_that_was_resumed_from_its_beginning(tmp_path: Path) -> None:
    results, curves = tmp_path / "federation", tmp_path / "curves"
    begun = told()
    with closing(LiveScalars(curves, results=results)) as live, EventLog(results / RUN, live.show) as tell:
        for event in begun:
            tell(event)
        assert scalars(curves / RUN)["accuracy/round"] == [(1, 0.5)]  # before anything is closed
    resumed = msgspec.structs.replace(begun[0], resumed=True)
    with closing(LiveScalars(curves, results=results)) as live, EventLog(results / RUN, live.show) as tell:
        for event in (resumed, *MORE):
            tell(event)
    found = scalars(curves / RUN)
    assert found["accuracy/round"] == [(1, 0.5), (2, 0.7)]
    assert found["predicted_seconds/pi-2"] == [(1, 3.5)]


def test_a_disk_that_fills_up_costs_the_curves_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, results = told(), tmp_path / "federation"
    with closing(LiveScalars(tmp_path / "curves", results=results)) as live, EventLog(results / RUN, live.show) as tell:
        tell(begun[0])

        def full(_writer: object, _data: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(RecordWriter, "write", full)
        for event in (*begun[1:], *MORE):
            tell(event)
    (line,) = caplog.messages
    assert line.endswith("cannot be written: No space left on device; no more curves for TensorBoard")


def test_a_log_without_its_beginning_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="lacks its beginning"):
        write_run(told()[1:], tmp_path)


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "curves").touch()
    with pytest.raises(ResourceError, match="cannot be written"):
        write_run(told(), tmp_path / "curves")


def test_the_report_command_writes_them_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    federation = write_federation(tmp_path)
    assert main(["report", str(federation), "--tensorboard", str(tmp_path / "curves")]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert scalars(folder)["accuracy/round"] == [(1, 0.5)]
