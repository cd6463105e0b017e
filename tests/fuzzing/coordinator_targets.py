"""Targets for what devices make the coordinator do: any sequence of what they say, and plans from any profile."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import msgspec
import numpy as np

from reft_edge.bundle.bundle import blob_ref
from reft_edge.bundle.manifest import BlobRef, Manifest
from reft_edge.config import convert_settings
from reft_edge.coordinator import rounds
from reft_edge.coordinator.collecting import Collector
from reft_edge.coordinator.deploying.standing import StandingDeployments
from reft_edge.coordinator.fleet import Fleet
from reft_edge.coordinator.network_events import Arrived, FromDevice, NotArrived
from reft_edge.coordinator.open_round import OpenRound
from reft_edge.coordinator.parts import RunParts
from reft_edge.coordinator.planning import plan
from reft_edge.coordinator.policies import POLICIES, Ladder
from reft_edge.coordinator.prediction import Device, Option, Workload, correct
from reft_edge.coordinator.records import (
    AssignmentRecord,
    DeployedDevice,
    DeployedState,
    DeploymentRecord,
    Prediction,
    ReleasedModel,
    RoundKey,
    RoundRecord,
    RunRecord,
)
from reft_edge.coordinator.rejected import RejectedUpdates
from reft_edge.coordinator.settings import FederationSettings
from reft_edge.coordinator.store import Store
from reft_edge.errors import RemoteProtocolError
from reft_edge.wire import deployment, messages
from reft_edge.wire.blobs import BlobStore
from reft_edge.wire.codec_names import Float32, Int8
from reft_edge.wire.codecs import encode_tensors
from tests.fuzzing.file_targets import FEDERATION_TOML, TENSORS, small_bundle
from tests.fuzzing.harness import Choices, Target
from tests.fuzzing.wire_targets import ANNOUNCEMENT, DONE, MEASURED

MIB = 2**20

COORDINATOR_MEMORY_BYTES = 64 * MIB
"""A program of some hundred events; each is a message of at most 96 KiB, and what the store makes of it."""

RUNS_A_STORE = 500
"""Inputs until the database begins anew."""

NICE_NUMBERS: tuple[object, ...] = (0, 1, 2, 100, 2**31, 2**53)
NASTY_NUMBERS: tuple[object, ...] = (*NICE_NUMBERS, -1, 2**53 + 1, 2**63, 2**64, 5e-324, 1e-300, 1e-9, 0.5, 1e15, 1e300)
"""What a field may hold once JSON was parsed; the decoders refuse some of it."""


# Collecting.


@dataclass(frozen=True, kw_only=True)
class _Variant:
    """A compiled variant as far as collecting looks at it."""

    name: str
    manifest: Manifest


class _Network:
    """Notes what is pulled and said; sends nothing."""

    def __init__(self) -> None:
        self.pulled: dict[tuple[str, str], BlobRef] = {}
        self.told: dict[str, deployment.DeploymentMessage] = {}
        """Device -> its last word about deployments."""

    def pull(self, device: str, blob: BlobRef) -> None:
        self.pulled[device, blob.sha256] = blob

    def give_up(self, device: str, sha256: str) -> None:
        self.pulled.pop((device, sha256), None)

    def acknowledge(self, device: str, sha256: str) -> None:
        """A receipt, which changes nothing here."""

    def send_deployment(self, device: str, message: deployment.DeploymentMessage) -> None:
        self.told[device] = deployment.decode_deployment(messages.encode(message))

    def serve_models(self, device: str, blobs: Iterable[str]) -> None:
        """Nobody fetches here."""

    def broadcast_models(self, blobs: Iterable[BlobRef]) -> None:
        """There is no broker."""

    def clear_broadcast(self, sha256: str, n_blocks: int) -> None:
        """There is no broker."""


class _Collecting:
    """Two devices with a task each and a stranger say what they like, as often and in what order they like."""

    devices = ("pi-1", "pi-2", "stranger")

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "coordinator"
        self._blobs = BlobStore(directory / "updates")
        self._bundle = small_bundle()
        self._weights = messages.WeightsRef(blob=self._blobs.put(encode_tensors(TENSORS, Float32())), codec=Float32())
        self._settings = convert_settings(_parsed(FEDERATION_TOML), FederationSettings, origin="federation.toml")
        self._updates = [self._blobs.put(content) for content in self._contents()]
        self._updates.append(BlobRef(sha256="0" * 64, size_bytes=1000))  # announced, and never there
        self._store: Store | None = None
        self._n_runs = 0

    def _contents(self) -> list[bytes]:
        """Updates that are good, of another codec, far too long, of other shapes, and no update at all."""
        good = {name: tensor * tensor.dtype.type(0.01) for name, tensor in TENSORS.items()}
        good |= {name: np.zeros_like(TENSORS[name]) for name in ("count", "mask")}
        other, long = {**good, "bias": np.zeros(4, np.float32)}, {**good, "bias": np.full(4, 1e6, np.float32)}
        return [
            encode_tensors(good, Int8()),
            encode_tensors(other, Int8()),
            encode_tensors(good, Float32()),
            encode_tensors(long, Int8()),
            encode_tensors({**good, "bias": np.zeros(5, np.float32)}, Int8()),
            b"garbage",
        ]

    def check(self, data: bytes) -> None:
        program = Choices(data)
        store = self._fresh_store()
        key = RoundKey(run=f"run{self._n_runs}", number=1)
        network = _Network()
        parts = self._parts(store, key.run, network)
        collector = Collector(parts)
        collector.round = self._open_round(store, key)
        now = 1000.0
        while program:
            now += program.one_of((0.0, 0.1, 10.0, 1000.0))
            step = program.below(12)
            if step == 0:
                collector.tick(now)
            elif step == 1:
                self._blob_event(collector, program, network, now)
            elif step == 2 and program.below(4) == 3:
                collector.note_absent(now)
            else:
                self._report(collector, key, program, now)
        self._check_end(collector, store, key, now)
        assert network.told.keys() <= {"pi-1"}  # the other goes by nothing, whatever it says

    def _check_end(self, collector: Collector, store: Store, key: RoundKey, now: float) -> None:
        contributions = collector.close(now)
        assert len({each.device for each in contributions}) == len(contributions)
        assert all(each.device in ("pi-1", "pi-2") for each in contributions)
        store.updates(key.run)
        store.devices()
        store.conditions()
        assert all(part.state in get_args(DeployedState) for part in store.deployed_devices(key.run))
        store.history(key.run)
        (record,) = store.rounds(key.run)
        store.load_round(record, self._settings.round_rules)
        counts = store.count_updates(key.run)
        assert counts.get("received", 0) == len(contributions)

    def _fresh_store(self) -> Store:
        if self._n_runs % RUNS_A_STORE == 0:
            self.close()
            shutil.rmtree(self._directory, ignore_errors=True)
            self._store = Store(self._directory)
        self._n_runs += 1
        assert self._store is not None
        self._store.begin_deployment(*self._deployment(f"run{self._n_runs}"))
        return self._store

    def _deployment(self, name: str) -> tuple[DeploymentRecord, list[DeployedDevice]]:
        """One that `pi-1` was asked to take and `pi-2` to undo, and that the stranger is no part of."""
        file = deployment.ModelFile(blob=self._updates[0], size_bytes=1000, precision="float32")
        released = [ReleasedModel(name=one, files=(file,), sha256s=("0" * 64,)) for one in ("global", "small")]
        asked = DeployedDevice(
            deployment=name, device="pi-1", model="global", smaller="small", wave="rest", state="away", asked_at=1.0
        )
        undone = msgspec.structs.replace(asked, device="pi-2", undone=True)
        record = DeploymentRecord(
            deployment=name,
            federation=name,
            version="v",
            state="done",
            started_at=float(self._n_runs),
            since=1.0,
            models=tuple(released),
        )
        return record, [asked, undone]

    def close(self) -> None:
        if self._store is not None:
            self._store.close()

    def _parts(self, store: Store, run: str, network: _Network) -> RunParts:
        nothing: Any = None
        return RunParts(
            run=run,
            settings=self._settings,
            store=store,
            blobs=self._blobs,
            catalogue=nothing,
            learner=nothing,
            network=cast(Any, network),
            fleet=Fleet(store.devices()),
            standing=StandingDeployments(store=store, network=cast(Any, network), blobs=self._blobs, federation=run),
            rejected=RejectedUpdates(self._directory / "rejected", self._settings.rejection),
            listener=_encode_event,
            clock=lambda: 0.0,
        )

    def _open_round(self, store: Store, key: RoundKey) -> OpenRound:
        store.create_run(RunRecord(run=key.run, federation="fed", settings_digest="", created_at=1.0))
        assignments = [self._assignment(key, device) for device in ("pi-1", "pi-2")]
        state = rounds.start_round([each.device for each in assignments], self._settings.round_rules)
        store.plan_round(RoundRecord(key=key, phase=state.phase.value, started_at=1.0), assignments)
        for event in (rounds.Published(), rounds.Opened(now=1000.0)):
            state, _ = rounds.advance(state, event)
        store.save_round(key, state)
        variant = cast(Any, _Variant(name="1", manifest=self._bundle.manifest))
        by_device = {each.device: each for each in assignments}
        return OpenRound(key=key, state=state, assignments=by_device, variants={"1": variant}, started_at=1.0)

    def _assignment(self, key: RoundKey, device: str) -> AssignmentRecord:
        return AssignmentRecord(
            task=key.task(device),
            device=device,
            variant="1",
            ratio=0.0,
            prediction=Prediction(steps=1000),
            plan=messages.TrainingPlan(local_epochs=1, batch_size=8, learning_rate=0.1, seed=0),
            bundle=blob_ref(self._bundle.manifest.to_json()),
            weights=self._weights,
        )

    def _blob_event(self, collector: Collector, program: Choices, network: _Network, now: float) -> None:
        """Mostly about what was asked for, as the network thread does it."""
        device, ref = program.one_of(self.devices), program.one_of(self._updates)
        if network.pulled and program.below(4):
            device, ref = program.one_of([(device, ref) for (device, _), ref in network.pulled.items()])
        if program.below(4) == 3:
            network.pulled.pop((device, ref.sha256), None)
            collector.handle(NotArrived(device=device, sha256=ref.sha256, reason="gone"), now)
        elif self._blobs.has(ref.sha256):
            collector.handle(Arrived(device=device, sha256=ref.sha256), now)

    def _report(self, collector: Collector, key: RoundKey, program: Choices, now: float) -> None:
        device = program.one_of(self.devices)
        whose = device if program.below(4) < 3 else program.one_of(self.devices)
        for decode, fields in self._messages(program, key.task(whose)):
            for _ in range(program.below(3) // 2):
                _spoil(fields, program)
            try:
                message = decode(msgspec.json.encode(fields))
            except (RemoteProtocolError, OverflowError):
                continue
            collector.handle(FromDevice(device=device, message=message), now)

    def _messages(self, program: Choices, task: str) -> list[tuple[Any, dict[str, Any]]]:
        kind = program.below(9)
        if kind == 8:
            return [(deployment.decode_condition, _fields(_condition(program, f"run{self._n_runs}")))]
        if kind == 0:
            return [(messages.decode_status, _fields(messages.Status(online=bool(program.below(2)))))]
        if kind == 1:
            return [(messages.decode_profile, _fields(ANNOUNCEMENT))]
        reason = program.one_of(("", "on battery", "\n\x1b[2J", "x" * 2000))
        manifest = msgspec.structs.replace(
            DONE.update, blob=program.one_of(self._updates), codec=program.one_of((Int8(), Int8(), Float32()))
        )
        report = (
            messages.Accepted(task=task),
            messages.Refused(task=task, reason=reason),
            messages.Progress(task=task, state="training", steps_done=1, steps_total=2, loss=1.0),
            messages.Failed(task=task, kind="crashed", reason=reason),
            messages.Done(task=task, round=1, update=manifest, measured=MEASURED),
            messages.Done(task=task, round=1, update=manifest, measured=MEASURED),
        )[kind - 2]
        return [(messages.decode_report, _fields(report))]


def _condition(program: Choices, name: str) -> deployment.Condition:
    """Of a device that serves, tries or has undone this deployment or another."""
    which, model = program.one_of((name, name, "other")), program.one_of(("global", "global", "small", "", "none"))
    serving = deployment.Served(deployment=which, version="v", model=model, precision="int8", sha256="0" * 64)
    health = deployment.Health(
        precision="int8", latency_p50_s=0.1, latency_p95_s=0.2, latency_p99_s=0.3, peak_memory_bytes=MIB
    )
    attempt = deployment.Attempt(
        deployment=program.one_of((name, name, "other")),
        model=model,
        state=program.one_of(("fetching", "checking", "serving", "refused", "refused", "failed", "rolled_back")),
        kind=program.one_of(("", "latency", "memory", "crashed")),
        reason=program.one_of(("", "90 ms", "\n\x1b[2J", "x" * 2000)),
        health=(health,),
    )
    counts = deployment.PredictionCounts(version="v", predictions=3, errors=1, classes=(1, 2), confidence=(3,))
    return deployment.Condition(
        serving=program.one_of((None, serving)),
        attempt=program.one_of((None, attempt)),
        counts=program.one_of((None, counts)),
        vitals=deployment.Vitals(temperature_celsius=40.0),
    )


def _encode_event(event: msgspec.Struct) -> None:
    """What listeners do first: an event that cannot be written would end the coordinator."""
    msgspec.json.encode(event)


def _fields(message: msgspec.Struct) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(message)
    return fields


def _spoil(fields: dict[str, Any], program: Choices) -> None:
    """Put a nasty number somewhere."""
    place: Any = fields
    while True:
        key = program.one_of(sorted(place))
        if not isinstance(place[key], dict) or not place[key]:
            break
        place = place[key]
    old = place[key]
    place[key] = [program.one_of(NASTY_NUMBERS)] if isinstance(old, list) else program.one_of(NASTY_NUMBERS)


def _parsed(toml: bytes) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(toml.decode())


# Planning.

WORKLOAD = Workload(local_epochs=2, batch_size=32, deadline_s=600.0)


def _check_plan(data: bytes) -> None:
    """Whatever devices announced and measured: there is a plan, and what it predicts survives the store."""
    program = Choices(data)
    manifest = small_bundle().manifest
    ladder = Ladder((0.0, 0.5), lambda ratio: Option.of(manifest, ratio=ratio, workload=WORKLOAD))
    devices = [_planned_device(program, number) for number in range(1 + program.below(3))]
    policy = program.one_of(sorted(POLICIES))
    assignments = plan([each for each in devices if each is not None], workload=WORKLOAD, ladder=ladder, policy=policy)
    for assignment in assignments:
        assert assignment.reason
        if assignment.prediction is not None:
            written = msgspec.json.encode(assignment.prediction)
            assert msgspec.json.decode(written, type=Prediction) == assignment.prediction
            assert math.isfinite(assignment.prediction.round_s)


def _planned_device(program: Choices, number: int) -> Device | None:
    """A device whose profile and measurements passed the decoders; None where they did not."""
    fields = _fields(ANNOUNCEMENT)
    history = []
    for _ in range(program.below(4)):
        quantity = program.one_of([key for key, value in fields["profile"].items() if isinstance(value, dict)])
        fields["profile"][quantity]["value"] = program.one_of(NASTY_NUMBERS)
    for key in ("training_samples", "holdout_samples"):
        fields[key] = program.one_of((100, *NASTY_NUMBERS))
    try:
        announcement = messages.decode_profile(msgspec.json.encode(fields))
        for _ in range(program.below(3)):
            done = _fields(DONE)
            _spoil(done["measured"], program)
            expected = Prediction(uncorrected_training_s=3.0, uncorrected_start_s=1.0, uncorrected_download_s=1.0)
            report = messages.decode_report(msgspec.json.encode(done))
            assert isinstance(report, messages.Done)
            history.append((expected, report.measured))
    except RemoteProtocolError:
        return None
    return Device(
        device=f"d{number}",
        profile=announcement.profile,
        training_samples=announcement.training_samples,
        holdout_samples=announcement.holdout_samples,
        correction=correct(history, failed_ratios=[0.0] if program.below(4) == 3 else []),
    )


def targets(directory: Path, stack: ExitStack) -> list[Target]:
    collecting = _Collecting(directory)
    stack.callback(collecting.close)
    good = bytes([1, 3, 0, 0, 6, 0, 0, 0, 1, 1, 0, 0, 0, 1, 3, 1, 0, 6, 0, 0, 0])
    return [
        Target(
            name="collecting",
            check=collecting.check,
            seeds=[good, good + good[::-1], bytes(range(120))],
            errors=(),
            memory_bytes=COORDINATOR_MEMORY_BYTES,
        ),
        Target(
            name="planning",
            check=_check_plan,
            seeds=[bytes(20), bytes(range(60)), bytes([2, 3, 4, 17, 9, 12, 3, 3, 17, 5, 2, 1, 2, 18, 3, 9])],
            errors=(),
            memory_bytes=COORDINATOR_MEMORY_BYTES,
        ),
    ]
