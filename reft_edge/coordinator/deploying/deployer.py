"""Brings a deployment to its end: the loop around the state machine, with the network and the store.

What is decided is in the store before a device is told, and what a device was told is a function of what is stored.
So a process that is killed at any moment loses nothing: the next one says the same again and goes on. A deployment that
is interrupted by a person stays as it is; what was said stays said.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from reft_edge.coordinator.deploying import rollout
from reft_edge.coordinator.deploying.answers import word_for
from reft_edge.coordinator.deploying.rollout import Phase, Rollout, RolloutRules
from reft_edge.coordinator.deploying.standing import message_for
from reft_edge.coordinator.network_events import Disowned, FromDevice, LinkDown, LinkUp
from reft_edge.coordinator.records import DeployedDevice, DeploymentRecord
from reft_edge.wire.deployment import Condition

if TYPE_CHECKING:
    from reft_edge.coordinator.deploying.site import Site
    from reft_edge.coordinator.settings import FederationSettings

MAX_WAIT_S = 1.0
"""How long at most to wait for a message before the clock is looked at again."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How a deployment stands."""

    record: DeploymentRecord
    devices: Sequence[DeployedDevice]
    """All of them, by name."""
    changed: Sequence[DeployedDevice]
    """Those of them whose part is not what it was when this was told last."""


Listener: TypeAlias = Callable[[Progress], None]


def new_deployment_id(now: float) -> str:
    """Names the roll-out in topics and on devices. `now`: Unix seconds."""
    return f"d{time.strftime('%Y%m%d', time.gmtime(now))}-{secrets.token_hex(4)}"


def rollout_rules(settings: FederationSettings) -> RolloutRules:
    wanted = settings.deployment
    return RolloutRules(
        soak_s=wanted.soak_s,
        timeout_s=wanted.timeout_s,
        max_failed_canaries=wanted.max_failed_canaries,
        max_failed=wanted.max_failed,
        absent_s=settings.absent_s,
    )


class Deployer:
    """One deployment that is in the store, from the state that it is in. Use `play` once.

    `of_some`: only some of its devices are undone, which does not change how the deployment stands.
    """

    def __init__(
        self, site: Site, record: DeploymentRecord, state: Rollout, *, listener: Listener, of_some: bool = False
    ) -> None:
        self._site = site
        self._record = record
        self._state = state
        self._listener = listener
        self._of_some = of_some
        self._connected = site.network.connected
        self._said: dict[str, tuple[str, str]] = {}
        """Device -> word and model, as they were said over this connection."""

    def play(self) -> Progress:
        """Bring it to its end. A `KeyboardInterrupt` leaves it for another process to go on with."""
        self._save(list(self._state.parts.values()))
        try:
            self._hear_what_is_known()
            while self._state.phase not in rollout.ENDED:
                self._step()
        except KeyboardInterrupt:
            self._interrupted()
            raise
        return self._progress(())

    def _step(self) -> None:
        """Wait for an event of the network or of the clock, and act on it."""
        event = self._site.listen(self._patience_s())
        now = self._site.clock()
        match event:
            case FromDevice(device=device, message=Condition() as condition):
                self._hear(device, condition, now)
            case FromDevice(device=device) | Disowned(device=device):
                self._note_presence(device, now)
            case LinkDown():
                self._connected = False
            case LinkUp():
                self._connected = True
                self._said.clear()  # the broker may have lost what was retained
                self._advance(rollout.Resumed(now=now))
                self._say()
                self._site.standing.keep_up(now)  # of devices that are no part of this, too
        if self._connected:  # while the broker is away nobody can answer, and nobody is late
            self._advance(rollout.Tick(now=now))

    def _patience_s(self) -> float:
        due = self._state.next_deadline
        if due is None or not self._connected:
            return MAX_WAIT_S
        return min(MAX_WAIT_S, max(0.0, due - self._site.clock()))

    def _hear_what_is_known(self) -> None:
        """Who is there and what they have told, since this process listens."""
        now = self._site.clock()
        for device in sorted(self._site.present() & self._state.parts.keys()):
            self._advance(rollout.Present(device=device, now=now))
        for device, condition in sorted(self._site.conditions.items()):
            self._hear(device, condition, now)
        self._say()

    def _hear(self, device: str, condition: Condition, now: float) -> None:
        """Whom this has not asked goes by what it was told before."""
        part = self._state.parts.get(device)
        if part is None or part.asked_at is None:
            self._site.standing.hear(device, condition, now)
        else:
            self._advance(rollout.Heard(device=device, now=now, condition=condition))

    def _note_presence(self, device: str, now: float) -> None:
        if device in self._state.parts:
            seen = rollout.Present if device in self._site.present() else rollout.Absent
            self._advance(seen(device=device, now=now))

    def _advance(self, event: rollout.Event) -> None:
        """Apply an event, save what it changed, and then say it."""
        before = self._state
        self._state = rollout.advance(before, event)
        changed = [part for device, part in self._state.parts.items() if part != before.parts[device]]
        if changed or self._state.phase is not before.phase:
            self._save(changed)
            self._say()

    def _save(self, changed: Sequence[DeployedDevice]) -> None:
        phase = self._state.phase
        if not self._of_some:
            ended = phase in rollout.ENDED
            self._record = msgspec.structs.replace(
                self._record,
                state=phase.value,
                reason=self._state.reason,
                since=self._state.since,
                ended_at=self._state.since if ended else None,
            )
        self._site.store.save_deployment(self._record, changed)
        self._listener(self._progress(changed))

    def _say(self) -> None:
        """Tell every device what it should have been told by now, and has not been over this connection."""
        new: list[tuple[DeployedDevice, tuple[str, str]]] = []
        for device, part in self._state.parts.items():
            word = word_for(part)
            if word is not None and self._said.get(device) != (word, part.model):
                new.append((part, (word, part.model)))
        if not new:
            return
        self._site.standing.offer()
        record = msgspec.structs.replace(self._record, reason=self._state.reason)
        sequence = self._site.store.next_sequence(self._site.clock())
        for part, said in new:
            self._site.network.send_deployment(part.device, message_for(record, part, sequence=sequence))
            self._said[part.device] = said

    def _interrupted(self) -> None:
        if self._state.phase in (Phase.CANARY, Phase.SOAKING, Phase.ROLLING_OUT):
            reason = "a person interrupted it"
            self._record = msgspec.structs.replace(self._record, state="interrupted", reason=reason)
            self._site.store.save_deployment(self._record)

    def _progress(self, changed: Sequence[DeployedDevice]) -> Progress:
        devices = [part for _, part in sorted(self._state.parts.items())]
        return Progress(record=self._record, devices=devices, changed=changed)
