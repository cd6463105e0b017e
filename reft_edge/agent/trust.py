"""Whom the device obeys, and with what it signs: the files of [trust], and the check of what it is told to do.

A signed message is believed when the enrolled coordinator signed it for this device, and obeyed when it is not older
than what was obeyed before. That is a number in the message and one in the spool, not a clock: boards have none that
one may trust after a power cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from reft_edge.agent.session_words import Mark
from reft_edge.agent.settings import AgentSettings, AgentTrust
from reft_edge.errors import ConfigError, RemoteProtocolError
from reft_edge.wire.deployment import DeploymentMessage, decode_deployment
from reft_edge.wire.messages import TaskMessage, decode_task
from reft_edge.wire.signing import MAX_CERTIFICATE_BYTES, SigningKey, VerifyKey, unseal, verify

Said = TypeVar("Said", TaskMessage, DeploymentMessage)
"""Messages that carry a sequence."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What [trust] names, read and checked."""

    key: SigningKey
    coordinator: VerifyKey
    certificate_file: Path

    @classmethod
    def read(cls, trust: AgentTrust) -> Identity:
        """Raises `ConfigError` that names the file."""
        identity = cls(
            key=SigningKey.read(trust.key_file),
            coordinator=VerifyKey.read(trust.coordinator_key_file),
            certificate_file=Path(trust.certificate_file),
        )
        identity.certificate()
        return identity

    def certificate(self) -> str:
        """The certificate (PEM), read now: it is renewed while the agent runs. Raises `ConfigError`."""
        path = self.certificate_file
        try:
            with path.open(encoding="ascii") as file:
                text = file.read(MAX_CERTIFICATE_BYTES + 1)
        except (OSError, UnicodeDecodeError) as exc:
            reason = (exc.strerror if isinstance(exc, OSError) else None) or "not a text file"
            raise ConfigError(
                f"certificate_file {str(path)!r} cannot be read: {reason}; enrol this device again"
            ) from exc
        if len(text) > MAX_CERTIFICATE_BYTES or "-----BEGIN CERTIFICATE-----" not in text:
            raise ConfigError(
                f"certificate_file {str(path)!r} is not a certificate in PEM form; enrol this device again"
            )
        return text


def read_identity(settings: AgentSettings) -> Identity | None:
    """The device's identity; None where [trust] is not set. Raises `ConfigError`."""
    return None if settings.trust is None else Identity.read(settings.trust)


def open_task(
    topic: str, payload: bytes, *, coordinator: VerifyKey | None, mark: Mark | None
) -> tuple[TaskMessage, Mark]:
    """A message on `task`, and the mark to keep when it is obeyed; see `_open`.

    Obeying an old task would cost the update that was trained since. Without signatures that is prevented within a run.
    """
    return _open(
        topic, payload, decode_task, coordinator=coordinator, mark=mark, unsigned=lambda task: f"run {task.run}"
    )


def open_deployment(
    topic: str, payload: bytes, *, coordinator: VerifyKey | None, mark: Mark | None
) -> tuple[DeploymentMessage, Mark]:
    """A message on `deployment`, and the mark to keep when it is obeyed; see `_open`.

    Obeying an old one would bring back a model that was replaced or undone.
    """
    return _open(
        topic, payload, decode_deployment, coordinator=coordinator, mark=mark, unsigned=lambda _: "any deployment"
    )


def _open(
    topic: str,
    payload: bytes,
    decode: Callable[[bytes], Said],
    *,
    coordinator: VerifyKey | None,
    mark: Mark | None,
    unsigned: Callable[[Said], str],
) -> tuple[Said, Mark]:
    """Check who said it and that it is not old. Without a `coordinator` no signature is checked.

    `mark` is that of the last message on this topic that was obeyed. What is older is refused in any case: a broker
    that was killed may come back with the messages of a minute ago. `unsigned` says among which messages sequences are
    compared where nothing is signed. Raises `RemoteProtocolError` for what is not to be obeyed.
    """
    sealed = unseal(topic, payload)
    if coordinator is not None:
        verify(topic, sealed, coordinator)
    message = decode(sealed.message)
    signer = f"unsigned, {unsigned(message)}" if coordinator is None else coordinator.fingerprint
    if mark is not None and mark.signer == signer and message.sequence < mark.sequence:
        raise RemoteProtocolError(
            f"it is old, and somebody plays it again, or a broker that was restarted: "
            f"its sequence is {message.sequence}, and {mark.sequence} was obeyed"
        )
    return message, Mark(signer=signer, sequence=message.sequence)
