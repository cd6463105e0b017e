"""Properties of the run's report: it says what the events said, escapes names, and needs nothing from outside."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import msgspec
import pytest
from rich.console import Console

from reft_edge.coordinator.events import (
    DeviceBytes,
    DeviceSeen,
    Excluded,
    Exported,
    Finished,
    Planned,
    PlannedDevice,
    Quarantined,
    RoundClosed,
    RoundDistilled,
    RoundMerged,
    Started,
    UpdateSeen,
)
from reft_edge.coordinator.records import Prediction
from reft_edge.coordinator.report.live import PlainWatcher, watcher
from reft_edge.coordinator.report.page import to_html
from reft_edge.coordinator.report.record import CentralFigures, RunReport, gather, to_json
from reft_edge.coordinator.report.stream import read_event, read_events
from reft_edge.coordinator.report.terminal import print_report
from reft_edge.errors import RemoteProtocolError
from reft_edge.wire.messages import Measured

DEVICES = {"pi-zero": 0.5, "nano": 0.0}


def events(n_rounds=2, metric="accuracy"):
    yield Started(
        run="r1",
        federation="dig<b>its",
        resumed=False,
        round=1,
        rounds=n_rounds,
        model="net",
        parameters=1000,
        global_bytes=4000,
    )
    for device in DEVICES:
        yield DeviceSeen(device=device, online=True, profile=f"board <script> {device}", training_samples=99)
    for number in range(1, n_rounds + 1):
        plans = [
            PlannedDevice(
                device=device,
                variant=f"{ratio:.2f}",
                ratio=ratio,
                parameters=int(1000 * (1 - ratio)),
                forward_macs=7,
                share=1 - ratio,
                prediction=Prediction(download_s=1.0, start_s=0.5, training_s=2.0, upload_s=9.0),
                predicted_round_s=12.5,
            )
            for device, ratio in DEVICES.items()
        ]
        yield Planned(round=number, attempt=1, devices=plans, excluded=[Excluded(device="pi-1", reason="<small>")])
        took = Measured(download_s=1.0, start_s=1.0, training_s=3.0, steps=8, peak_memory_bytes=2**20)
        yield UpdateSeen(round=number, device="nano", state="received", loss_last=0.5, measured=took)
        yield UpdateSeen(round=number, device="nano", state="duplicate")
        yield UpdateSeen(round=number, device="pi-zero", state="late")
        yield RoundMerged(round=number, updates=1, **{metric: 0.8})
        yield RoundDistilled(round=number, teachers=1, kept_epoch=3, **{metric: 0.9})
        traffic = [DeviceBytes(device="nano", down_bytes=3000, up_bytes=1000, full_model_bytes=4000)]
        yield RoundClosed(round=number, seconds=5.0, counted=1, asked=2, traffic=traffic, **{metric: 0.9})
    yield Exported(name="global", path="out/global.onnx", values={"size_bytes": 4096.0, metric: 0.9})
    values = {"accuracy": None, "mse": None, metric: 0.91}
    yield Finished(run="r1", rounds=n_rounds, updates={}, directory="out", **values)


def test_the_report_says_what_the_events_said():
    report = gather(events(), seconds=12.0)
    assert (report.value, report.metric, report.finished) == (0.91, "accuracy", True)
    assert [(one.merged, one.distilled, one.updates, one.asked) for one in report.rounds] == [(0.8, 0.9, 1, 2)] * 2
    assert [(one.device, one.round, one.reason) for one in report.left_out] == [("pi-1", n, "<small>") for n in (1, 2)]
    nano, zero = report.devices
    assert (nano.device, nano.share, nano.training_samples, nano.updates) == ("nano", 1.0, 99, 2)
    assert (nano.down_bytes, nano.up_bytes, report.unpruned_bytes) == (6000, 2000, 8000)
    assert [(one.predicted_s, one.measured_s, one.state) for one in nano.rounds] == [(3.5, 5.0, "received")] * 2
    assert [(one.measured_s, one.state) for one in zero.rounds] == [(None, "late")] * 2
    assert msgspec.json.decode(to_json(report), type=RunReport) == report


def test_regression_is_reported_by_its_mean_squared_error():
    report = gather(events(metric="mse"))
    assert (report.metric, report.value, report.rounds[0].distilled) == ("mse", 0.91, 0.9)
    assert "mse on test data" in to_html(report)


def test_what_is_known_of_an_unfinished_run_is_a_report():
    told = list(events())
    for n_known in range(len(told)):
        report = gather(told[:n_known])
        assert not report.finished
        assert msgspec.json.decode(to_json(report), type=RunReport) == report
    assert "has not ended" in to_html(gather(told[:6]))
    assert "has not ended" in to_html(gather([]))


class Page(HTMLParser):
    """Collects tags, and every attribute that could make a browser ask for something."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.asked_for = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.asked_for += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]


@pytest.fixture(scope="module")
def page():
    central = CentralFigures(value=0.99, epochs=4, samples=10, seconds=1.0)
    return to_html(gather(events(), central=central, seconds=3.0, setting={"data": "<i>digits</i>"}))


def test_the_page_asks_nobody_for_anything_and_escapes_names(page):
    found = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "b>its"} & set(found.tags)
    assert all(value.startswith("#") for value in found.asked_for)
    assert not re.search(r"@import|url\((?!#)", page)
    assert found.tags.count("svg") == 4
    assert "dig&lt;b&gt;its" in page
    assert "<i>" not in page
    assert "&lt;small&gt;" in page


def test_the_page_is_the_same_for_the_same_report_and_its_ids_occur_once(page):
    central = CentralFigures(value=0.99, epochs=4, samples=10, seconds=1.0)
    again = to_html(gather(events(), central=central, seconds=3.0, setting={"data": "<i>digits</i>"}))
    assert again == page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', page)) <= set(ids)


def test_plots_follow_the_page_s_colours(page):
    assert "currentColor" in page
    assert "#010203" not in page
    assert "#000000" not in page


def test_events_survive_json_lines_and_unknown_ones_are_passed_over():
    lines = [msgspec.json.encode(event) for event in events()]
    lines[3:3] = [b"", b'{"event":"of tomorrow","x":1}']
    assert list(read_events(lines)) == list(events())
    for garbage in (b"hello", b"[1]", b'{"event":"started"}', b"\xff"):
        with pytest.raises(RemoteProtocolError):
            read_event(garbage)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_watcher_shows_every_device_and_every_round(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=150)
    with watcher(console) as shown:
        for event in events():
            shown.show(event)
    text = console.file.getvalue()
    for expected in (*DEVICES, "90.0%", "late" if terminal else "round 2 of 2"):
        assert expected in text


def test_the_terminal_s_tables_carry_the_page_s_figures():
    console = Console(file=io.StringIO(), width=150)
    print_report(gather(events(), central=CentralFigures(value=0.99, epochs=4, samples=10, seconds=1.0)), console)
    for expected in ("91.0%", "99.0%", "-8.0 points", "5.9 KiB", "5.00 s", "4.0 KiB"):
        assert expected in console.file.getvalue()


def test_a_rejected_update_and_its_device_s_quarantine_are_shown_everywhere():
    """The last word on an update counts: it was received, and taken back beside the others."""
    took = Measured(download_s=1, start_s=1, training_s=2, steps=3, peak_memory_bytes=9)
    told = [
        *events(n_rounds=1),
        UpdateSeen(round=1, device="nano", state="rejected", reason="<i>40 times", kept="a/b.json", measured=took),
        Quarantined(device="nano", reason="3 tasks in a row"),
    ]
    report = gather(told)
    (rejected,) = report.rejected
    assert (rejected.device, rejected.round, rejected.kept) == ("nano", 1, "a/b.json")
    assert next(one for one in report.devices if one.device == "nano").rounds[0].state == "rejected"
    page, console = to_html(report), Console(file=io.StringIO(), width=150)
    print_report(report, console)
    lines: list[str] = []
    plain = PlainWatcher(lines.append)
    for event in told:
        plain.show(event)
    assert "&lt;i&gt;40 times" in page
    assert "<i>40 times" not in page
    assert "Rejected in round 1, nano: <i>40 times" in console.file.getvalue()
    assert "round 1: update of nano is rejected: <i>40 times" in lines
    for shown in (page, console.file.getvalue(), "\n".join(lines)):
        assert "3 tasks in a row" in shown
