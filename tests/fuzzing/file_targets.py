"""Targets for what travels as a blob or is handed over as a file: bundles, tensors, settings, certificates, state."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from reft_edge.agent.session import Session
from reft_edge.agent.session_words import Phase, SessionState, TaskArrived
from reft_edge.agent.settings import AgentSettings
from reft_edge.agent.spool import Spool
from reft_edge.bundle.bundle import (
    INFERENCE_FILE,
    MANIFEST_FILE,
    TRAINING_FILE,
    WEIGHTS_FILE,
    Bundle,
    blob_ref,
    graph_bytes,
    weights_limit,
)
from reft_edge.bundle.container import MAX_HEADER_BYTES, compress, container_limit, decompress, unpack_tensors
from reft_edge.bundle.manifest import Manifest, TensorSpec
from reft_edge.compile.channels import MAX_AXIS_ENTRIES, ChannelMap
from reft_edge.config import convert_settings, read_toml
from reft_edge.coordinator.settings import load_federation
from reft_edge.errors import BundleError, ConfigError, ReftError, RemoteProtocolError
from reft_edge.profiling.profile import DeviceProfile
from reft_edge.provisioning.settings import read_settings as read_provisioning
from reft_edge.wire.certificates import certificate_faults, device_key
from reft_edge.wire.codec_names import (
    Codec,
    Float16,
    Float32,
    Int4,
    Int8,
    LayerWise,
    RandomK,
    Selective,
    TopK,
    codec_text,
)
from reft_edge.wire.codecs import decode_tensors, encode_tensors, weight_norms
from reft_edge.wire.enrolment import Enrolment, decode_enrolment, encode_enrolment
from tests.certificates import Authority
from tests.fuzzing.harness import Target
from tests.fuzzing.wire_targets import DONE, PROFILE, TASK

MIB = 2**20

CONTENT_BYTES = MIB
"""What the containers that are tried may hold, their header apart."""

CONTAINER_MEMORY_BYTES = 20 * MAX_HEADER_BYTES + 2 * CONTENT_BYTES
"""A header of 4 MiB becomes Python objects of up to 18 times its size; the content is held once."""

SETTINGS_MEMORY_BYTES = 32 * MIB
"""A settings file is at most 64 KiB."""

CHANNEL_MAP_MEMORY_BYTES = 10 * MAX_AXIS_ENTRIES
"""8 bytes for each position, and what finds a selection that is not sorted."""

SPECS = (
    TensorSpec(name="conv", shape=(4, 3, 2, 2)),
    TensorSpec(name="bias", shape=(4,)),
    TensorSpec(name="half", shape=(2, 3), dtype="float16"),
    TensorSpec(name="empty", shape=(0, 3)),
    TensorSpec(name="count", shape=(), dtype="int64"),
    TensorSpec(name="mask", shape=(3,), dtype="bool"),
)
TENSORS = {
    spec.name: np.linspace(-1, 1, spec.n_elements).reshape(spec.shape).astype(np.dtype(spec.dtype)) for spec in SPECS
}
CODECS: tuple[Codec, ...] = (
    Float32(),
    Float16(),
    Int8(),
    Int4(),
    TopK(fraction=0.2),
    RandomK(fraction=0.2, unbiased=True),
    LayerWise(),
    Selective(),
)


# Tensors.


def _check_frame(data: bytes) -> None:
    """A compressed frame as it comes, whatever it claims."""
    assert len(decompress(data, max_bytes=CONTENT_BYTES)) <= CONTENT_BYTES
    unpack_tensors(data, max_bytes=container_limit(CONTENT_BYTES))


def _check_container(data: bytes) -> None:
    """What is inside a good frame."""
    tensors, _ = unpack_tensors(compress(data, level=1), max_bytes=container_limit(CONTENT_BYTES))
    assert sum(array.nbytes for array in tensors.values()) <= len(data)
    for array in tensors.values():
        array.sum()
        if array.dtype == np.bool_:
            assert array.view(np.uint8).max(initial=0) <= 1


def _content(data: bytes) -> bytes:
    """A container from its header, a line of JSON, and what follows: a form that can be changed field by field."""
    header, _, tensors = data.partition(b"\n")
    return len(header).to_bytes(8, "little") + header + tensors


def _as_line(content: bytes) -> bytes:
    """Inverse of `_content`."""
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end].rstrip() + b"\n" + content[end:]


def _check_header(data: bytes) -> None:
    _check_container(_content(data))


def _check_update(data: bytes) -> None:
    """An update of the codec that its header names, for tensors that are known."""
    codec = next((codec for codec in CODECS if f'"codec":"{codec_text(codec)}"'.encode() in data), Int8())
    tensors = decode_tensors(compress(_content(data), level=1), codec, SPECS)
    assert list(tensors) == [spec.name for spec in SPECS]
    for spec in SPECS:
        found = tensors[spec.name]
        assert found.shape == spec.shape
        assert found.dtype.name == spec.dtype
        assert found.dtype.kind != "f" or np.isfinite(found).all()


def _check_channel_map(data: bytes) -> None:
    """A map that is accepted selects from global tensors of its shapes, if they are small enough to be made."""
    channels = ChannelMap.from_bytes(compress(_content(data), level=1))
    shapes = channels.global_shapes
    if sum(map(math.prod, shapes.values())) > 10_000:
        return
    whole = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    part = channels.gather(whole)
    assert {name: array.shape for name, array in part.items()} == channels.variant_shapes
    channels.scatter(part, whole)


def tensor_targets() -> list[Target]:
    frames = [
        encode_tensors(TENSORS, codec, rng=np.random.default_rng(0), norms=weight_norms(TENSORS)) for codec in CODECS
    ]
    contents = [decompress(frame, max_bytes=1 << 20) for frame in frames]
    picked = {"conv": np.arange(48).reshape(4, 3, 2, 2)[:2, 1:], "bias": np.array([2, 0]), "count": np.array(0)}
    channels = ChannelMap(picked, {"conv": (4, 3, 2, 2), "bias": (4,), "count": ()})
    lines = [_as_line(content) for content in contents]
    checks: list[tuple[str, Callable[[bytes], None], list[bytes]]] = [
        ("frame", _check_frame, frames),
        ("container", _check_container, contents),
        ("header", _check_header, lines),
        ("update", _check_update, lines),
        ("channel_map", _check_channel_map, [_as_line(decompress(channels.to_bytes(), max_bytes=1 << 20))]),
    ]
    return [
        Target(
            name=name,
            check=check,
            seeds=seeds,
            errors=(BundleError,),
            memory_bytes=CHANNEL_MAP_MEMORY_BYTES if name == "channel_map" else CONTAINER_MEMORY_BYTES,
            text=name not in ("frame", "container"),
        )
        for name, check, seeds in checks
    ]


# Bundles.


def small_bundle() -> Bundle:
    """A bundle of few bytes; its graphs are no graphs, because nobody runs them here."""
    weights = encode_tensors(TENSORS, Float32())
    graph = compress(b"graph")
    parts = {"training_graph": blob_ref(graph), "inference_graph": blob_ref(graph), "weights": blob_ref(weights)}
    manifest = {
        "model": "small",
        "input": {"name": "inputs", "shape": [3, 2, 2]},
        "target": {"name": "targets", "shape": [], "dtype": "int64"},
        "output": {"name": "outputs", "shape": [4]},
        "loss": {"name": "cross_entropy"},
        "optimizer": {"name": "sgd", "momentum": 0.9},
        "parameters": msgspec.to_builtins(SPECS[:2]),
        "buffers": msgspec.to_builtins(SPECS[2:]),
        "cost": {
            "parameters": 52,
            "forward_macs": 1000,
            "step_flops_per_sample": 6000,
            "memory_fixed_bytes": 1000,
            "memory_per_sample_bytes": 100,
        },
        **msgspec.to_builtins(parts),
    }
    made = Manifest.from_json(json.dumps(manifest).encode())
    return Bundle(manifest=made, training_graph=graph, inference_graph=graph, weights=weights)


def _check_manifest(data: bytes) -> None:
    manifest = Manifest.from_json(data)
    assert Manifest.from_json(manifest.to_json()) == manifest
    weights_limit(manifest)
    manifest.cost.memory_bytes(32)
    manifest.cost.step_flops(32)
    for spec in manifest.tensors:
        np.broadcast_to(np.zeros((), spec.dtype), spec.shape)  # a shape that numpy can have, without the memory


class _Folder:
    """The first byte chooses a file of a bundle's folder; the rest is its content."""

    def __init__(self, directory: Path) -> None:
        self._bundle = small_bundle()
        self._folder = self._bundle.save(directory / "bundle")
        self._files = (MANIFEST_FILE, WEIGHTS_FILE, TRAINING_FILE, INFERENCE_FILE)

    def seeds(self) -> list[bytes]:
        return [bytes([i]) + (self._folder / name).read_bytes() for i, name in enumerate(self._files)]

    def check(self, data: bytes) -> None:
        self._bundle.save(self._folder)
        number = data[0] % len(self._files) if data else 0
        (self._folder / self._files[number]).write_bytes(data[1:])
        if number == 1:  # the manifest names what is there, so that it is read
            manifest = msgspec.structs.replace(self._bundle.manifest, weights=blob_ref(data[1:]))
            (self._folder / MANIFEST_FILE).write_bytes(manifest.to_json())
        bundle = Bundle.open(self._folder)
        bundle.tensors()
        graph_bytes(bundle.training_graph)


def bundle_targets(directory: Path) -> list[Target]:
    manifest = small_bundle().manifest.to_json()
    folder = _Folder(directory)
    return [
        Target(
            name="manifest",
            check=_check_manifest,
            seeds=[manifest],
            errors=(BundleError,),
            memory_bytes=CONTAINER_MEMORY_BYTES,
            text=True,
        ),
        Target(
            name="bundle_folder",
            check=folder.check,
            seeds=folder.seeds(),
            errors=(BundleError,),
            memory_bytes=CONTAINER_MEMORY_BYTES,
        ),
    ]


# Settings.

AGENT_TOML = b"""\
device = "pi-1"
federation = "fed"
spool = "spool"
[broker]
host = "localhost"
port = 1883
keepalive_s = 30
session_expiry_s = 86400
connect_timeout_s = 10.0
[data]
path = "data.npz"
classes = ["cat", "dog"]
shape = [3, 32, 32]
window = 0
holdout_fraction = 0.2
[limits]
memory_bytes = 268435456
training_flops_per_s = 1e9
threads = 2
nice = 10
idle_worker_s = 120.0
max_model_bytes = 536870912
[profile]
quick = true
"""

FEDERATION_TOML = b"""\
federation = "fed"
rounds = 5
seed = 0
deadline_s = 600.0
grace_s = 60.0
absent_s = 120
quorum = 0.5
min_devices = 2
enrol_wait_s = 600.0
settle_s = 2.0
max_parallel_uploads = 4
[model]
name = "vgg16"
input_shape = [3, 32, 32]
n_outputs = 10
loss = {name = "cross_entropy", label_smoothing = 0.1}
optimizer = {name = "adam", beta1 = 0.9, epsilon = 1e-8, weight_decay = 0.0}
[training]
local_epochs = 2
batch_size = 32
learning_rate = 0.05
[planning]
policy = "deadline"
max_variants = 4
ratios = [0.0, 0.25, 0.5]
[data]
public = {path = "public", labelled = false}
[distillation]
epochs = 3
[output]
directory = "out"
"""


PROVISIONING_TOML = b"""\
federation = "fed"
broker_hosts = ["broker.example", "192.0.2.1", "2001:db8::1"]
port = 8883
reload_command = ["systemctl", "reload", "mosquitto"]
revocation_list_url = "https://broker.example/list.crl"
[lifetimes]
authority_days = 7300
certificate_days = 365
renew_before_days = 60
revocation_list_days = 30
"""


class _SettingsFile:
    """A file that one reader reads. What is accepted holds numbers that one can calculate with."""

    def __init__(self, path: Path, read: Callable[[Path], Any]) -> None:
        self._path = path
        self._read = read

    def check(self, data: bytes) -> None:
        self._path.write_bytes(data)
        _check_numbers(msgspec.to_builtins(self._read(self._path)))


def _check_numbers(value: Any) -> None:
    if isinstance(value, dict):
        for each in value.values():
            _check_numbers(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _check_numbers(each)
    elif isinstance(value, (int, float)):
        assert math.isfinite(value)
        assert -(2**63) <= value < 2**63 or isinstance(value, float)


def _read_toml_of_anything(path: Path) -> Any:
    """Whatever the file's keys are; the reader under test is the parser."""
    read_toml(path)
    return convert_settings({}, msgspec.defstruct("Empty", []), origin="empty")


def settings_targets(directory: Path) -> list[Target]:
    readers: list[tuple[str, Callable[[Path], Any], bytes]] = [
        ("agent_toml", AgentSettings.read, AGENT_TOML),
        ("federation_toml", load_federation, FEDERATION_TOML),
        ("profile_toml", DeviceProfile.read, _profile_toml()),
        ("provisioning_toml", read_provisioning, PROVISIONING_TOML),
        ("toml", _read_toml_of_anything, AGENT_TOML),
    ]
    return [
        Target(
            name=name,
            check=_SettingsFile(directory / f"{name}.toml", read).check,
            seeds=[seed],
            errors=(ConfigError,),
            memory_bytes=SETTINGS_MEMORY_BYTES,
            text=True,
        )
        for name, read, seed in readers
    ]


def _profile_toml() -> bytes:
    import tomli_w

    return tomli_w.dumps(PROFILE.to_table()).encode()


# What the agent kept.


class _State:
    """A damaged state.json is treated as absent, or is a state from which the agent can go on."""

    def __init__(self, directory: Path) -> None:
        self._spool = Spool(directory / "spool", max_blob_bytes=1024)
        self._file = directory / "spool" / "state.json"

    def seeds(self) -> list[bytes]:
        states = [
            SessionState(),
            SessionState(phase=Phase.TRAINING, task=TASK, parts=(TASK.bundle,), attempts=1),
            SessionState(phase=Phase.UPLOADING, task=TASK, outcome=DONE, parts=(TASK.bundle,)),
        ]
        return [msgspec.json.encode(state) for state in states]

    def check(self, data: bytes) -> None:
        self._file.write_bytes(data)
        state = self._spool.load_state()
        self._spool.save_state(state)
        assert self._spool.load_state() == state
        session = Session(state)
        session.resume(update_is_here=bool(len(data) % 2), now=10.0)
        session.needed_blobs()
        session.handle(TaskArrived(task=TASK), 11.0)
        self._spool.save_state(session.state)


def state_targets(directory: Path) -> list[Target]:
    state = _State(directory)
    return [
        Target(
            name="spool_state",
            check=state.check,
            seeds=state.seeds(),
            errors=(),
            memory_bytes=SETTINGS_MEMORY_BYTES,
            text=True,
        )
    ]


# Enrolment and certificates.

NOW = datetime(2026, 6, 1, tzinfo=UTC)


class _Certificates:
    """A damaged certificate is refused, or it is the one that the authority signed."""

    def __init__(self, directory: Path) -> None:
        self._authority = Authority(directory / "authority", now=NOW)
        self.issued = self._authority.issue("pi-1")
        self._crl = self._authority.revoke(self._authority.issue("pi-2")).read_bytes()
        self._key = self.issued.certificate.public_key().public_bytes_raw()
        self.ca_pem = self._authority.ca_pem

    def seeds(self) -> list[bytes]:
        others = [
            self._authority.issue("pi-1", client=False),
            self._authority.issue("pi-1", ends=-timedelta(hours=1)),
            self._authority.issue("other"),
        ]
        return [each.certificate_pem for each in (self.issued, *others)] + [self.ca_pem]

    def key_seeds(self) -> list[bytes]:
        return [self.issued.key_pem]

    def crl_seeds(self) -> list[bytes]:
        return [self._crl]

    def check(self, data: bytes) -> None:
        certificate_faults(certificate_pem=data, key_pem=self.issued.key_pem, ca_pem=self.ca_pem, name="pi-1", now=NOW)
        text = data.decode("utf-8", "replace")
        assert device_key(text, ca_pem=self.ca_pem, crl_pem=self._crl, device="pi-1", now=NOW) == self._key

    def check_authority(self, data: bytes) -> None:
        pem = self.issued.certificate_pem.decode()
        device_key(pem, ca_pem=data, crl_pem=None, device="pi-1", now=NOW)

    def check_revocations(self, data: bytes) -> None:
        pem = self.issued.certificate_pem.decode()
        assert device_key(pem, ca_pem=self.ca_pem, crl_pem=data, device="pi-1", now=NOW) == self._key

    def check_key(self, data: bytes) -> None:
        pem = self.issued.certificate_pem
        certificate_faults(certificate_pem=pem, key_pem=data, ca_pem=self.ca_pem, name="pi-1", now=NOW)


def _check_enrolment(data: bytes) -> None:
    enrolment = decode_enrolment(data)
    assert decode_enrolment(encode_enrolment(enrolment)) == enrolment
    assert enrolment.key.strip() not in repr(enrolment)


def certificate_targets(directory: Path) -> list[Target]:
    known = _Certificates(directory)
    public = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA" + "A" * 43 + "=\n-----END PUBLIC KEY-----\n"
    enrolment = Enrolment(
        device="pi-1",
        federation="fed",
        broker_host="broker.example",
        broker_port=8883,
        ca=known.ca_pem.decode(),
        certificate=known.issued.certificate_pem.decode(),
        key=known.issued.key_pem.decode(),
        coordinator_key=public,
    )
    checks: list[tuple[str, Callable[[bytes], None], list[bytes], tuple[type[ReftError], ...], bool]] = [
        ("certificate", known.check, known.seeds(), (RemoteProtocolError,), False),
        ("authority", known.check_authority, [known.ca_pem], (ConfigError, RemoteProtocolError), False),
        ("revocations", known.check_revocations, known.crl_seeds(), (ConfigError,), False),
        ("private_key", known.check_key, known.key_seeds(), (ConfigError,), False),
        ("enrolment", _check_enrolment, [encode_enrolment(enrolment)], (ConfigError,), True),
    ]
    return [
        Target(name=name, check=check, seeds=seeds, errors=errors, memory_bytes=SETTINGS_MEMORY_BYTES, text=text)
        for name, check, seeds, errors, text in checks
    ]


def targets(directory: Path) -> list[Target]:
    return [
        *tensor_targets(),
        *bundle_targets(directory),
        *settings_targets(directory),
        *state_targets(directory),
        *certificate_targets(directory),
    ]
