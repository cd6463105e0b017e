"""What cuts, kills, slowness and disorder cost a transfer between real processes over a real broker."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from reft_edge.simulation.links.disorder import Disorder
from reft_edge.simulation.links.mqtt_proxy import MqttProxy
from reft_edge.simulation.links.tunnel import TunnelShape, available
from reft_edge.simulation.recovery import ends
from reft_edge.simulation.recovery.lossy import measure_lossy
from reft_edge.simulation.recovery.pair import Side
from reft_edge.simulation.recovery.stage import Stage
from reft_edge.simulation.recovery.surplus import Disturbance, Way, move
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.blocks import BLOCK_BYTES
from reft_edge.wire.fetch import MAX_WINDOW

pytestmark = [pytest.mark.mosquitto, pytest.mark.usefixtures("mosquitto_program")]

N_BYTES = 12 * BLOCK_BYTES + 100


@pytest.mark.parametrize(
    ("way", "disturbance"), [("down", "cut"), ("up", "cut"), ("broadcast", "cut"), ("down", "kill"), ("up", "kill")]
)
def test_after_a_cut_or_a_kill_at_most_the_window_travels_again(
    way: Way, disturbance: Disturbance, tmp_path: Path
) -> None:
    n_bytes = 24 * BLOCK_BYTES + 100
    moved = move(tmp_path, way, n_bytes=n_bytes, seed=0, disturbance=disturbance, times=1)  # after four fifths
    travelled = moved.far_bytes if (way, disturbance) == ("up", "kill") else moved.link_bytes
    assert n_bytes < travelled < n_bytes + (MAX_WINDOW + 0.5) * BLOCK_BYTES
    name = "coordinator" if way == "up" else "device-0"
    (blob,) = (tmp_path / name).iterdir()
    assert blob.stat().st_size == n_bytes


@pytest.mark.parametrize("broadcast", [False, True], ids=["pull", "broadcast"])
def test_messages_in_disorder_change_nothing_in_a_transfer(broadcast: bool, tmp_path: Path) -> None:
    links: list[MqttProxy] = []

    def in_disorder(host: str, port: int) -> MqttProxy:
        disorder = Disorder(seed=len(links), duplicate=0.3, delay=0.2, reorder=0.3, max_wait_s=0.05, within_topics=True)
        links.append(MqttProxy(host, port, disorder))
        return links[-1]

    with Stage(tmp_path, make_link=in_disorder) as stage:
        down = stage.put("coordinator", N_BYTES, device=1)
        up = stage.put("device", N_BYTES)
        stage.start_coordinator(down, broadcast=broadcast, pulled={stage.devices[0]: up})
        stage.pair.wait(ends.Up, side="coordinator")
        stage.start_device(down, broadcast=broadcast)
        stage.pair.wait(ends.Arrived, side="device")
        stage.pair.wait(ends.Arrived, side="coordinator")
    for name, ref in (("device-0", down), ("coordinator", up)):
        assert len(BlobStore(tmp_path / name).read(ref)) == N_BYTES
    assert all(min(link.counters.duplicated, link.counters.reordered) > 0 for link in links)


@pytest.mark.parametrize("way", ["pull", "broadcast", "upload"])
def test_a_consumer_ten_times_slower_than_its_publishers_loses_nothing(
    way: Literal["pull", "broadcast", "upload"], tmp_path: Path
) -> None:
    slow_side: Side = "coordinator" if way == "upload" else "device"
    n_bytes = 18 * BLOCK_BYTES if way == "upload" else N_BYTES
    with Stage(tmp_path, devices=6 if way == "upload" else 1) as stage:
        for side, link in stage.links.items():
            link.shape(delay_s=0.0, bytes_per_s=8e5 if side == slow_side else 8e6)
        if way == "upload":
            pulled = {name: stage.put("device", 3 * BLOCK_BYTES, device=n) for n, name in enumerate(stage.devices)}
            stage.start_device()
            stage.start_coordinator(pulled=pulled)
            arrived = {stage.pair.wait(ends.Arrived, side="coordinator").device for _ in pulled}
            assert arrived == set(stage.devices)
        else:
            ref = stage.put("coordinator", N_BYTES)
            stage.start_coordinator(ref, broadcast=way == "broadcast")
            stage.pair.wait(ends.Up, side="coordinator")
            stage.start_device(ref, broadcast=way == "broadcast")
            stage.pair.wait(ends.Arrived, side="device")
        assert stage.travelled(slow_side, up=way == "upload") < 1.1 * n_bytes


@pytest.mark.skipif(available() is not None, reason=f"no tunnel: {available()}")
def test_lost_packets_are_tcps_business_and_no_block_travels_twice(tmp_path: Path) -> None:
    shape = TunnelShape(bytes_per_s=500_000, delay_s=0.02, loss=0.02, seed=1)
    moved = measure_lossy(tmp_path, "down", n_bytes=4 * BLOCK_BYTES, shape=shape)
    assert moved.duplicates == 0
    assert moved.packet_bytes > 4 * BLOCK_BYTES
