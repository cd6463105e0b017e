"""Whom the device obeys, and with what it signs: the files of [trust], and the check of every task.

A signed task is believed when the enrolled coordinator signed it for this device, and obeyed when it is not older than
what was obeyed before. That is a number in the message and one in the spool, not a clock: boards have none that one may
trust after a power cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reft_edge.agent.session_words import Mark
from reft_edge.agent.settings import AgentSettings, AgentTrust
from reft_edge.errors import ConfigError, RemoteProtocolError
from reft_edge.wire.messages import TaskMessage, decode_task
from reft_edge.wire.signing import MAX_CERTIFICATE_BYTES, SigningKey, VerifyKey, unseal, verify


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
    """A message on `task`, and the mark to keep when it is obeyed. Without a `coordinator` no signature is checked.

    `mark` is that of the last message that was obeyed. What is older is refused in any case: a broker that was killed
    may come back with the tasks of a minute ago, and obeying one would cost the update that was trained since. Without
    signatures that holds within a run. Raises `RemoteProtocolError` for what is not to be obeyed.
    """
    sealed = unseal(topic, payload)
    if coordinator is not None:
        verify(topic, sealed, coordinator)
    message = decode_task(sealed.message)
    signer = f"unsigned, run {message.run}" if coordinator is None else coordinator.fingerprint
    if mark is not None and mark.signer == signer and message.sequence < mark.sequence:
        raise RemoteProtocolError(
            f"it is old, and somebody plays it again, or a broker that was restarted: "
            f"its sequence is {message.sequence}, and {mark.sequence} was obeyed"
        )
    return message, Mark(signer=signer, sequence=message.sequence)
