"""What the agent says to its broker: who it is, how it is, and what becomes of its task.

Profile, reports and condition are signed where the device has an identity. The status is not: the broker itself says
it in our place when we vanish (last will), so nobody may rely on it. Blocks are not: their hashes stand in signed
messages.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

import reft_edge
from reft_edge.agent.reasons import for_coordinator
from reft_edge.agent.session_words import Phase, SessionState
from reft_edge.agent.settings import AgentSettings
from reft_edge.agent.trust import Identity
from reft_edge.errors import ConfigError
from reft_edge.wire.deployment import Condition
from reft_edge.wire.messages import Failed, ProfileAnnouncement, Progress, Refused, Report, Status, encode
from reft_edge.wire.mqtt import MqttLink
from reft_edge.wire.signing import seal
from reft_edge.wire.topics import DeviceTopic, device_topic

PROGRESS_EXPIRES_S = 30.0
"""Progress that could not be told in time is not worth telling."""

STATUS_OF_PHASE: Mapping[Phase, Literal["idle", "fetching", "training", "uploading"]] = {
    Phase.IDLE: "idle",
    Phase.READING: "fetching",
    Phase.FETCHING: "fetching",
    Phase.TRAINING: "training",
    Phase.UPLOADING: "uploading",
}

OFFLINE = encode(Status(online=False))
"""The last will."""

logger = logging.getLogger(__name__)


class Voice:
    """Speaks through `link` for the device of `settings`, whose relative paths start from `base_dir`.

    Without an `identity` nothing is signed.
    """

    def __init__(self, link: MqttLink, settings: AgentSettings, identity: Identity | None, *, base_dir: Path) -> None:
        self._link = link
        self._folders = {base_dir, base_dir / settings.spool, base_dir / settings.data.path}
        self._settings = settings
        self._identity = identity
        self.certificate = "" if identity is None else identity.certificate()
        """As it was announced last."""
        self._said_status: Status | None = None

    def report(self, report: Report) -> None:
        if isinstance(report, Failed):
            logger.warning("task %s failed (%s): %s", report.task, report.kind, report.reason)
        elif not isinstance(report, Progress):
            logger.info("task %s: %s", report.task, getattr(report, "reason", type(report).__name__.lower()))
        if isinstance(report, Refused | Failed):
            report = msgspec.structs.replace(report, reason=for_coordinator(report.reason, self._folders))
        expires_s = PROGRESS_EXPIRES_S if isinstance(report, Progress) else None
        self._publish("report", self._sealed("report", encode(report)), expires_s=expires_s)

    def profile(self, announcement: ProfileAnnouncement) -> None:
        """Announce the device, with its certificate as it is now."""
        if self._identity is not None:
            try:
                self.certificate = self._identity.certificate()
            except ConfigError as exc:
                logger.error("%s; announcing the one before", exc)
        payload = self._sealed("profile", encode(announcement), certificate=self.certificate)
        self._publish("profile", payload, retain=True)

    def status(self, state: SessionState, *, again: bool = False) -> None:
        """Publish the status if it has changed; `again`: also if not, because the broker has said something else."""
        status = Status(
            online=True,
            version=reft_edge.__version__,
            state=STATUS_OF_PHASE[state.phase],
            task=state.task.task if state.task is not None and state.phase is not Phase.IDLE else None,
        )
        if (again or status != self._said_status) and self._link.connected:
            self._said_status = status
            self._publish("status", encode(status), retain=True)

    def condition(self, condition: Condition) -> None:
        """What is served, and how the device is. Retained: it holds until the next one."""
        if condition.attempt is not None:
            reason = for_coordinator(condition.attempt.reason, self._folders)
            attempt = msgspec.structs.replace(condition.attempt, reason=reason)
            condition = msgspec.structs.replace(condition, attempt=attempt)
        self._publish("condition", self._sealed("condition", encode(condition)), retain=True)

    def goodbye(self) -> None:
        if self._link.connected:
            self._publish("status", encode(Status(online=False, version=reft_edge.__version__)), retain=True)

    def transfer(self, payload: bytes) -> None:
        """Blocks and transfer control."""
        self._publish("up", payload, qos=0)

    def _sealed(self, topic: DeviceTopic, message: bytes, *, certificate: str = "") -> bytes:
        key = None if self._identity is None else self._identity.key
        return seal(self._topic(topic), message, key, certificate=certificate)

    def _publish(
        self, topic: DeviceTopic, payload: bytes, *, qos: int = 1, retain: bool = False, expires_s: float | None = None
    ) -> None:
        self._link.publish(self._topic(topic), payload, qos=qos, retain=retain, expires_s=expires_s)

    def _topic(self, topic: DeviceTopic) -> str:
        return device_topic(self._settings.federation, self._settings.device, topic)
