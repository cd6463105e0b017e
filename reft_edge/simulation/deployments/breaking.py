"""One deployment in which processes are killed or stopped at drawn moments, and what must be true afterwards.

Faults, their moments and the one who does them are those of `simulation.faults`; the coordinator there is the `deploy`
command here, which is given again when it was killed, as a person would. A moment is a stage that a device has come
to, a state of the deployment, or a time after the command's start.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from reft_edge.agent.serving.slots import SERVING
from reft_edge.coordinator.store import Store
from reft_edge.errors import BrokerError, FederationError, ReftError
from reft_edge.simulation.deployments.crew import COMMAND_TIMEOUT_S, LOOK_S
from reft_edge.simulation.deployments.records import Survived
from reft_edge.simulation.deployments.rollout import latest_deployment
from reft_edge.simulation.deployments.served import Watch, complaints
from reft_edge.simulation.deployments.site import FEDERATION
from reft_edge.simulation.deployments.stopping import ALIKE_WITHIN_S
from reft_edge.simulation.faults.injector import Injector
from reft_edge.simulation.faults.progress import Sign
from reft_edge.simulation.faults.ways import Ways
from reft_edge.simulation.faults.words import COORDINATOR, Fault, Kind, Moment, Script
from reft_edge.simulation.run_directory import FEDERATION_FILE, log_path

if TYPE_CHECKING:
    from reft_edge.simulation.deployments.crew import Crew
    from reft_edge.simulation.deployments.observer import Observer
    from reft_edge.simulation.deployments.site import Site

KINDS: tuple[Kind, ...] = (
    "kill-agent",
    "kill-worker",
    "kill-coordinator",
    "kill-broker",
    "freeze-agent",
    "freeze-coordinator",
    "freeze-broker",
    "out-of-memory",
    "disk-full",
)
"""The last needs a disk of its own for a device's spool, and so root."""

INSTALLING = "installing"
"""The worker writes the slot that does not serve: some milliseconds at the end of `checking`."""

DEVICE_STAGES = ("fetching", "checking", INSTALLING, "switching", "settled")
"""`settled`: again, after one of the others."""

DEPLOYMENT_STATES = ("canary", "soaking", "rolling_out")

_LONGEST_DELAY_S = 1.0
"""About what a check takes."""

_USUAL_S = 5.0
"""About what a deployment takes to a few devices, on a quiet machine."""

_WORKER_DELAYS_S = (0.1, 0.9)
"""After the check has begun: before there is no worker, and behind it has ended."""

_SHORT_PAUSES_S = (0.1, 3.0)
_LONG_PAUSES_S = (8.0, 12.0)
_LONG_PAUSE_SHARE = 0.15
_MOST_FAULTS = 2
_FULL_DISK = "No space left on device"

_ANSWERS = ("serving", "refused", "failed", "rolled_back")
"""Of devices that will fetch nothing more."""

_BRIEF_LOOK_S = 0.001
"""Between two looks for what is over soon; takes half a core."""

_STATE_FILE = "deployment.json"
"""Of the deployment session, in a device's spool."""


class _Attempt(msgspec.Struct):
    deployment: str
    state: str


class _State(msgspec.Struct):
    """As much of a session's state as is of interest here."""

    stage: str = ""
    attempt: _Attempt | None = None


class Progress:
    """Where a deployment is, read from the store and from devices' spools. Call `look` often, and `close` it."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._store = Store(site.results, shared=True)
        self._n_before = len(self._store.deployments(FEDERATION))
        self._seen = dict.fromkeys(site.devices, "settled")

    def close(self) -> None:
        self._store.close()

    def look(self) -> list[Sign]:
        """What is new since the last look."""
        found = dict(self._stages())
        if len(now := self._store.deployments(FEDERATION)) > self._n_before:
            found[COORDINATOR] = now[0].state
        signs = [Sign(who, what, 0) for who, what in found.items() if self._seen.get(who) != what]
        self._seen |= found
        return signs

    def _stages(self) -> Iterator[tuple[str, str]]:
        for device in self._site.devices:
            if (state := _state(self._site, device)) is not None:
                yield device, INSTALLING if _is_installing(self._site, device) else state.stage


def draw(seed: int, *, devices: Sequence[str], kinds: Sequence[Kind] = KINDS) -> Script:
    """One or two faults. Pure: the same seed, devices and kinds give the same ones."""
    rng = random.Random(f"deployments {seed}")
    faults = [_fault(rng, rng.choice(kinds), rng.choice(devices)) for _ in range(rng.randint(1, _MOST_FAULTS))]
    return Script(seed=seed, quorum=1.0, faults=tuple(faults))


def _fault(rng: random.Random, kind: Kind, device: str) -> Fault:
    of_device = Moment(who=device, what=rng.choice(DEVICE_STAGES), delay_s=_delay(rng))
    of_deployment = Moment(who=COORDINATOR, what=rng.choice(DEPLOYMENT_STATES), delay_s=_delay(rng))
    by_the_clock = Moment(who="clock", delay_s=round(rng.uniform(0.0, _USUAL_S), 3))
    match kind:
        case "kill-worker" | "out-of-memory":  # it has one only while it checks
            moment = Moment(who=device, what="checking", delay_s=round(rng.uniform(*_WORKER_DELAYS_S), 3))
        case "kill-agent" | "freeze-agent" | "disk-full":
            moment = rng.choice((of_device, of_device, by_the_clock))
        case _:
            moment, device = rng.choice((of_deployment, of_device, by_the_clock)), ""
    pause_s = rng.uniform(*(_LONG_PAUSES_S if rng.random() < _LONG_PAUSE_SHARE else _SHORT_PAUSES_S))
    lasts = kind not in ("kill-worker", "out-of-memory")
    return Fault(kind=kind, moment=moment, device=device, pause_s=round(pause_s, 2) if lasts else 0.0)


def _delay(rng: random.Random) -> float:
    """Mostly at once: what follows an event at once is what breaks most easily."""
    return round(rng.choice((0.0, rng.uniform(0.0, 0.05), rng.uniform(0.0, _LONGEST_DELAY_S))), 3)


def break_deployment(crew: Crew, observer: Observer, script: Script, *, old: str, new: str) -> Survived:
    """Deploy `new` where all devices serve `old`, do what `script` says, and look at what is left.

    `observer`: with its `blocks`.
    """
    site, began = crew.site, time.monotonic()
    watch = Watch(site)
    brief = any(fault.moment.what == INSTALLING for fault in script.faults)
    look_s = _BRIEF_LOOK_S if brief else LOOK_S
    crew.coordinator = crew.command("deploy", FEDERATION_FILE, new)
    crew.coordinator.start()
    with Ways(site.broker.settings, (), script) as nobodys, closing(Progress(site)) as progress:
        injector = Injector(script, cast=crew, ways=nobodys, disks=dict(crew.disks), began=began)
        restarts, problem = 0, ""
        while not problem:
            now = time.monotonic()
            for sign in progress.look():
                injector.notice(sign, now)
            injector.act(now)
            watch.look()
            status, killed = crew.coordinator.status, crew.coordinator.killed
            if status is not None and not killed:
                if status != BrokerError.exit_code or restarts > _MOST_FAULTS:
                    break
                restarts += 1  # it never found its broker, which we had killed
                crew.coordinator.start()
            if now - began > COMMAND_TIMEOUT_S:
                problem = f"deploy has not ended after {COMMAND_TIMEOUT_S:g} s: {crew.coordinator.obituary()}"
            time.sleep(look_s)
        injector.end()
    seconds = time.monotonic() - began
    return _outcome(
        crew, observer, script, injector, watch, problem, seconds=seconds, restarts=restarts, old=old, new=new
    )


def _outcome(
    crew: Crew,
    observer: Observer,
    script: Script,
    injector: Injector,
    watch: Watch,
    problem: str,
    *,
    seconds: float,
    restarts: int,
    old: str,
    new: str,
) -> Survived:
    wrong = [problem] if problem else []
    state, deployment, all_answered = "", "", False
    try:
        record, devices = latest_deployment(crew.site)
    except ReftError as exc:
        wrong.append(str(exc))
    else:
        state, deployment = record.state, record.deployment
        all_answered = all(device.state in _ANSWERS for device in devices)
    wrong += _settled(crew, watch, deployment, undone=state == "rolled_back", old=old, new=new)
    if all_answered and observer.blocks():
        wrong.append(f"all have answered, and the broker still holds {observer.blocks()} blocks")
    status = crew.coordinator.status
    if (state, status) not in (("done", 0), ("rolled_back", FederationError.exit_code)):
        wrong.append(f"the deployment is {state or 'unknown'}, and: {crew.coordinator.obituary()}")
    starved = {fault.device for fault in injector.injected if fault.kind == "out-of-memory"}
    wrong += [*crew.died(), *cries(crew.site, starved=starved)]
    refused = [device for device in crew.site.devices if _said_no(crew.site, device, deployment)]
    return Survived(
        faults=tuple(str(fault) for fault in script.faults),
        injected=tuple(fault.kind for fault in injector.injected),
        missed=tuple(fault.kind for fault in injector.missed),
        seconds=seconds,
        state=state,
        status=-1 if status is None else status,
        restarts=restarts,
        refused=len(refused),
        complaints=tuple(wrong),
    )


def _settled(crew: Crew, watch: Watch, deployment: str, *, undone: bool, old: str, new: str) -> list[str]:
    """What is still wrong with what is served once all is as it should be, or after a while."""
    end = time.monotonic() + ALIKE_WITHIN_S
    while True:
        watch.look()
        site = crew.site
        stay = {device for device in site.devices if undone or _said_no(site, device, deployment)}
        wrong = complaints(site, {device: (old if device in stay else new,) for device in site.devices})
        wrong += left_over(site)
        if not wrong or time.monotonic() > end:
            return wrong
        time.sleep(LOOK_S)


def left_over(site: Site) -> list[str]:
    """Of what was fetched, nothing may stay once it is installed or of no use."""
    folders = {device: site.spool(device) / "blobs" for device in site.devices}
    return [f"{device} keeps {path.name}" for device, folder in folders.items() for path in sorted(folder.glob("*"))]


def cries(site: Site, *, starved: Collection[str] = ()) -> list[str]:
    """Lines of logs that say that something failed in a way that nobody foresaw.

    Workers of `starved` devices got no memory from some moment on, and perhaps not enough to say more than that. That a
    disk is full, where it is, is no news.
    """
    logs = sorted((site.directory / "logs").iterdir())
    spared = {log_path(site.directory, f"agent-{device}") for device in starved}
    lines = [(path.name, line) for path in logs if path not in spared for line in _lines(path)]
    bad = ("Traceback (most recent call last)", " ERROR ")
    told = [(name, line) for name, line in lines if any(words in line for words in bad) and _FULL_DISK not in line]
    return [f"{name}: {line.strip()[:300]}" for name, line in told]


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()


def _said_no(site: Site, device: str, deployment: str) -> bool:
    state = _state(site, device)
    attempt = None if state is None else state.attempt
    return attempt is not None and attempt.deployment == deployment and attempt.state in ("refused", "failed")


def _is_installing(site: Site, device: str) -> bool:
    """Whether a slot is there that has no description yet."""
    slots = [site.spool(device) / SERVING / name for name in ("a", "b")]
    return any(slot.is_dir() and not (slot / "slot.json").exists() for slot in slots)


def _state(site: Site, device: str) -> _State | None:
    try:
        return msgspec.json.decode((site.spool(device) / _STATE_FILE).read_bytes(), type=_State)
    except (OSError, msgspec.MsgspecError):
        return None
