"""Where the broker is and how to log in: the `[broker]` table of both settings files, and `--broker` of the commands.

Knows nothing of MQTT packets and loads no MQTT client, so that checking a settings file is cheap.
"""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from reft_edge.errors import ConfigError

PLAIN_PORT = 1883
TLS_PORT = 8883
"""The ports that IANA registered for MQTT without and with TLS."""

MAX_PASSWORD_BYTES = 4096
"""A password file larger than this is some other file."""


class BrokerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[broker]` table. Relative paths are resolved by `resolved_in`."""

    host: Annotated[str, Meta(min_length=1, max_length=253)] = "localhost"
    port: Annotated[int, Meta(ge=1, le=65_535)] = PLAIN_PORT
    username: str | None = None
    password_file: str | None = None
    """File whose first line is the password; a password itself does not belong into a settings file."""
    tls: bool = False
    """Use TLS with the system's certificate authorities; naming `ca_file` implies it."""
    ca_file: str | None = None
    certificate_file: str | None = None
    key_file: str | None = None
    keepalive_s: Annotated[int, Meta(ge=5, le=600)] = 30
    mqtt_version: Literal["auto", "5", "3.1.1"] = "auto"
    """`auto` tries MQTT 5 and falls back to 3.1.1, which is all that the embedded broker speaks."""
    session_expiry_s: Annotated[int, Meta(ge=0, le=4_000_000)] = 86_400
    """How long a broker with MQTT 5 keeps messages for us while we are away."""
    connect_timeout_s: Annotated[float, Meta(ge=0.1, le=120)] = 10.0

    def __post_init__(self) -> None:
        if self.host.count(":") == 1:  # more of them are an IPv6 address
            raise ValueError(f"host = {self.host!r} has a port in it; write it as a key of its own: port = 1883")
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("certificate_file and key_file belong together; set both or none")
        if self.password_file is not None and self.username is None:
            raise ValueError("password_file needs a username")

    @property
    def address(self) -> str:
        """`host:port`, as messages to people show it."""
        return f"{self.host}:{self.port}"

    @property
    def uses_tls(self) -> bool:
        return self.tls or self.ca_file is not None or self.certificate_file is not None

    @property
    def is_on_this_machine(self) -> bool:
        """Whether nobody else can listen on the way to the broker."""
        return self.host in ("localhost", "::1") or re.fullmatch(r"127(\.[0-9]{1,3}){3}", self.host) is not None

    def resolved_in(self, base_dir: Path) -> BrokerSettings:
        """The same with file names made absolute, relative ones below `base_dir`."""
        names = ("password_file", "ca_file", "certificate_file", "key_file")
        paths = {name: str(base_dir / value) for name in names if (value := getattr(self, name)) is not None}
        return msgspec.structs.replace(self, **paths)

    def password(self) -> str | None:
        """The password, read now (it may have been renewed). Raises `ConfigError`."""
        if self.password_file is None:
            return None
        try:
            with Path(self.password_file).open(encoding="utf-8") as file:
                return file.readline(MAX_PASSWORD_BYTES).rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"password_file {self.password_file!r} cannot be read: {_why(exc)}") from exc

    def tls_context(self) -> ssl.SSLContext | None:
        """TLS 1.2 or later with the broker's name checked; None for plain TCP. Raises `ConfigError`."""
        if not self.uses_tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except (OSError, ssl.SSLError) as exc:
            raise ConfigError(f"ca_file {self.ca_file!r} cannot be used: {_why(exc)}") from exc
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.certificate_file is not None:
            try:
                context.load_cert_chain(self.certificate_file, self.key_file)
            except (OSError, ssl.SSLError) as exc:
                files = f"certificate_file {self.certificate_file!r} with key_file {self.key_file!r}"
                raise ConfigError(f"{files} cannot be used: {_why(exc)}") from exc
        return context


def parse_broker(address: str) -> BrokerSettings:
    """Settings for `HOST`, `HOST:PORT`, `mqtt://HOST:PORT` or `mqtts://HOST:PORT`. Raises `ConfigError`."""
    scheme, separator, rest = address.rpartition("://")
    if separator and scheme not in ("mqtt", "mqtts"):
        raise ConfigError(f"broker address {address!r} must begin with mqtt:// or mqtts://, or have no scheme")
    tls = scheme == "mqtts"
    host, separator, port = rest.rstrip("/").rpartition(":")
    if not separator or rest.endswith("]"):
        host, port = rest.rstrip("/"), str(TLS_PORT if tls else PLAIN_PORT)
    if not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65_535:
        raise ConfigError(f"broker address {address!r} is not HOST or HOST:PORT, for example localhost:1883")
    return BrokerSettings(host=host.strip("[]"), port=int(port), tls=tls)


def _why(exc: Exception) -> str:
    if isinstance(exc, ssl.SSLError) and exc.reason:
        return exc.reason.replace("_", " ").lower()  # without the line in Python's sources
    return (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
