"""What fuzzing found, each with an input of its own; and the largest inputs that the limits allow."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
import pytest

from reft_edge.agent.session_words import SessionState
from reft_edge.agent.spool import Spool
from reft_edge.bundle.bundle import MANIFEST_FILE, TRAINING_FILE, Bundle
from reft_edge.bundle.container import MAX_HEADER_BYTES, compress, pack_tensors, unpack_tensors
from reft_edge.bundle.manifest import MAX_MANIFEST_BYTES, BlobRef, Manifest, TensorSpec
from reft_edge.compile.channels import FORMAT, ChannelMap
from reft_edge.config import MAX_SETTINGS_BYTES, load_settings
from reft_edge.coordinator.events import DeviceProgress
from reft_edge.coordinator.prediction import FIRST_LIMITS, correct
from reft_edge.coordinator.records import Prediction
from reft_edge.coordinator.report.live import PlainWatcher
from reft_edge.errors import MAX_MESSAGE_CHARACTERS, BundleError, ConfigError, RemoteProtocolError
from reft_edge.profiling.profile import DeviceProfile
from reft_edge.wire import messages
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.codec_names import Int8
from reft_edge.wire.codecs import decode_tensors, encode_tensors
from reft_edge.wire.messages import MAX_MESSAGE_BYTES
from reft_edge.wire.transfer import Courier
from tests.fuzzing.file_targets import AGENT_TOML, small_bundle
from tests.fuzzing.harness import Target, run, silence
from tests.fuzzing.targets import all_targets
from tests.fuzzing.wire_targets import ANNOUNCEMENT, DONE, SHA256, TASK

LIMIT = 1 << 24


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    with silence(), ExitStack() as stack:
        yield all_targets(tmp_path_factory.mktemp("fuzzing"), stack)


def container(header: bytes, data: bytes = b"") -> bytes:
    return compress(len(header).to_bytes(8, "little") + header + data)


# What a peer says must not fill or forge a log.


@pytest.mark.parametrize("said", ["x" * 90_000, "\n2026-01-01 ERROR forged", "\x1b[2J", "\x00", "\u202e"])
def test_an_error_is_one_bounded_printable_line_whatever_the_peer_said(said: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        messages.decode_report(json.dumps({"type": said}).encode())
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= MAX_MESSAGE_CHARACTERS


def test_a_reason_of_a_device_cannot_command_the_operators_terminal() -> None:
    lines: list[str] = []
    reason = "\x1b]0;title\x07\nround 9: update of pi-2, 1 s"
    PlainWatcher(lines.append).show(DeviceProgress(round=1, device="pi-1", state="refused", reason=reason))
    assert [line.isprintable() for line in lines] == [True]


# Transfers.


def test_an_offer_beyond_ascii_is_garbage_and_not_the_end_of_the_network_thread(tmp_path: Path) -> None:
    courier = Courier(BlobStore(tmp_path), [].append)
    courier.set_connected(True, 0.0)
    courier.fetch(BlobRef(sha256=SHA256, size_bytes=10), 0.0)
    offer = messages.BlobOffer(
        sha256=SHA256, size_bytes=10, block_bytes=65_536, transfer=SHA256[:16], block_hashes="é" * 11
    )
    with pytest.raises(RemoteProtocolError, match="not base64"):
        courier.handle(messages.encode(offer), 0.0)


def test_a_block_beyond_any_file_is_not_there(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    ref = store.put(b"blob")
    for index in (1, 2**47, 2**53):
        assert store.read_block(ref.sha256, index) is None


# Numbers and shapes.


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [0, 10**30], "data_offsets": [0, 0]},
        {"dtype": "U8", "shape": [1] * 33, "data_offsets": [0, 1]},
        {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]},
    ],
)
def test_a_container_holds_only_what_numpy_can_represent(entry: dict[str, object]) -> None:
    data = b"\x02"[: entry["data_offsets"][1]]
    with pytest.raises(BundleError, match=r"impossible shape|truth values"):
        unpack_tensors(container(msgspec.json.encode({"a": entry}), data), max_bytes=LIMIT)


@pytest.mark.parametrize("shape", [(0, 2**62), (2**31 + 1,), (1,) * 33, (-1,), (2**20, 2**20)])
def test_a_manifest_names_only_shapes_that_can_be(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="impossible shape"):
        TensorSpec(name="a", shape=shape)


def test_the_tensors_of_a_manifest_are_bounded_together() -> None:
    fields = msgspec.to_builtins(small_bundle().manifest)
    fields["buffers"] = [{"name": f"{number}", "shape": [2**31]} for number in range(2)]
    with pytest.raises(BundleError, match="more than 2147483648 elements"):
        Manifest.from_json(msgspec.json.encode(fields))


def test_an_update_that_overflows_its_narrower_dtype_is_refused() -> None:
    specs = [TensorSpec(name="w", shape=(1, 1), dtype="float16")]
    stored = {"w": np.full((1, 1), 127, np.int8), "w::scale": np.full(1, 1e30, np.float32)}
    good = encode_tensors({"w": np.ones((1, 1), np.float16)}, Int8())
    assert decode_tensors(good, Int8(), specs)["w"].dtype == np.float16
    with pytest.raises(BundleError, match="not finite"):
        decode_tensors(pack_tensors(stored, {"codec": "int8"}), Int8(), specs)


@pytest.mark.parametrize("value", [1e-200, 5e-324, 1e22, 1.7e308])
def test_a_profile_with_which_no_plan_can_be_computed_is_refused(value: float) -> None:
    fields = msgspec.to_builtins(ANNOUNCEMENT)
    fields["profile"]["clock_hz"]["value"] = value
    with pytest.raises(RemoteProtocolError, match="neither 0 nor between"):
        messages.decode_profile(msgspec.json.encode(fields))


@pytest.mark.parametrize(("seconds", "factor"), [(5e-324, FIRST_LIMITS[0]), (1e300, FIRST_LIMITS[1])])
def test_a_measurement_that_makes_no_sense_bounds_the_correction(seconds: float, factor: float) -> None:
    measured = msgspec.structs.replace(DONE.measured, training_s=seconds)
    correction = correct([(Prediction(uncorrected_training_s=10.0), measured)])
    assert correction.time_factor == pytest.approx(factor)


@pytest.mark.parametrize(
    "change", [{"deadline": 1e300}, {"bundle": {"sha256": "a" * 64, "size_bytes": 10**30}}, {"round": 2**64}]
)
def test_numbers_that_no_arithmetic_survives_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError):
        messages.decode_task(msgspec.json.encode({**msgspec.to_builtins(TASK), **change}))


# Files.


@pytest.mark.parametrize(
    "line",
    [
        b"x = " + b"[" * 3000,
        b"x = " + b"9" * 5000,
        b".".join([b"a"] * 5000) + b" = 1",
        b"x = inf",
        b"x = nan",
        b"x = 99999999999999999999",
    ],
)
def test_toml_that_exhausts_the_parser_or_arithmetic_is_a_wrong_setting(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes(line)
    with pytest.raises(ConfigError, match=r"settings\.toml"):
        load_settings(path, msgspec.defstruct("Loose", [("x", object)]))


def test_a_device_profile_of_infinite_speed_is_a_wrong_setting(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text('name = "x"\n[cores]\nvalue = inf\nbasis = "specified"\n')
    with pytest.raises(ConfigError, match="value = inf"):
        DeviceProfile.read(path)


@pytest.mark.parametrize("content", [b'{"phase":"\xff"}', b"[" * 100_000, b"\xff\xfe", b""])
def test_a_state_that_a_bad_disk_changed_is_a_fresh_start(tmp_path: Path, content: bytes) -> None:
    spool = Spool(tmp_path, max_blob_bytes=1024)
    (tmp_path / "state.json").write_bytes(content)
    with silence():
        assert spool.load_state() == SessionState()


def test_a_pipe_in_a_bundle_s_folder_does_not_hang_its_reader(tmp_path: Path) -> None:
    small_bundle().save(tmp_path)
    for name in (TRAINING_FILE, MANIFEST_FILE):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(BundleError, match=f"{name} is not a file"):
            Bundle.open(tmp_path)


@pytest.mark.parametrize("shapes", ['{"a":[2147483648]}', '{"a":[0,134217728]}', '{"a":[90000000],"b":[-80000000]}'])
def test_a_channel_map_of_few_bytes_does_not_name_gigabytes(shapes: str) -> None:
    header = msgspec.json.encode({"__metadata__": {"format": FORMAT, "shapes": shapes}})
    with pytest.raises(BundleError, match="axes of more than"):
        ChannelMap.from_bytes(container(header))


# The largest inputs.

LARGEST = {
    "nested": ("message_task", b'{"type":"task","x":' + b"[" * MAX_MESSAGE_BYTES),
    "many strings": ("message_task", b'{"type":"task","classes":[' + b'"",' * (MAX_MESSAGE_BYTES // 3 - 20)),
    "many objects": ("message_transfer", b'{"type":"want","x":[' + b"{}," * (MAX_MESSAGE_BYTES // 3 - 20)),
    "many numbers": ("message_profile", b'{"type":"profile","input_shape":[' + b"1," * (MAX_MESSAGE_BYTES // 2 - 40)),
    "one number": ("message_profile", b'{"type":"profile","input_shape":[' + b"9" * (MAX_MESSAGE_BYTES - 50)),
    "sealed": ("envelope", b'{"message":' + b"[" * MAX_MESSAGE_BYTES),
    "bomb": ("frame", compress(bytes(LIMIT), level=1)),
    "claim": ("frame", bytes.fromhex("28b52ffde0") + (1 << 62).to_bytes(8, "little") + b"\x01\x00\x00"),
    "entries": ("header", b"{" + b",".join(b'"%x":{}' % n for n in range(MAX_HEADER_BYTES // 11)) + b"}\n"),
    "axes": ("header", b'{"a":{"dtype":"U8","data_offsets":[0,1],"shape":[' + b"1," * (MAX_HEADER_BYTES // 4)),
    "tensors": ("manifest", b'{"model":"m","buffers":[' + b'{"name":"a","shape":[1]},' * (MAX_MANIFEST_BYTES // 26)),
    "tables": ("toml", b"\n".join(b"[t%d]" % n for n in range(7000))[:MAX_SETTINGS_BYTES]),
    "array": ("toml", b"x = [" + b"1," * (MAX_SETTINGS_BYTES // 2 - 10) + b"]"),
    "dotted": ("toml", b"\n".join(b"b%d." % n + b"a." * 98 + b"a = 1" for n in range(300))[:MAX_SETTINGS_BYTES]),
    "settings": ("agent_toml", AGENT_TOML + b"#" * (MAX_SETTINGS_BYTES - len(AGENT_TOML))),
}


@pytest.mark.parametrize("case", LARGEST)
def test_the_largest_inputs_stay_within_time_and_memory(targets: dict[str, Target], case: str) -> None:
    name, data = LARGEST[case]
    run(targets[name], data)
