"""The one exception tree.

Every error a caller can act on derives from `ReftError`. A message names the offender, what was expected and the way
out, because the command line prints it as the only line a person sees. `exit_code` is what the process ends with.

Two protocol errors are kept apart, after h11: `LocalProtocolError` is our own misuse of a state machine (a bug);
`RemoteProtocolError` is garbage from the network (drop the message, log it, go on).
"""

from __future__ import annotations

MAX_MESSAGE_CHARACTERS = 2000
"""As long as a reason in a report may be. What a peer sent may stand in an error: it must not fill a log."""


def one_line(text: str) -> str:
    """`text` as one bounded line that a terminal and a log only show: control characters become spaces.

    Reasons and names come from devices and files of others; a line break in one would forge the next line of a log, and
    an escape sequence would command the terminal.
    """
    shown = text if len(text) <= MAX_MESSAGE_CHARACTERS else text[: MAX_MESSAGE_CHARACTERS - 1] + "…"
    return shown if shown.isprintable() else "".join(each if each.isprintable() else " " for each in shown)


class ReftError(Exception):
    """Base of all errors that reft-edge raises on purpose. Its text is one line."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class ConfigError(ReftError):
    """A setting, a command-line argument or a configuration file is wrong."""

    exit_code = 2


class DataError(ReftError):
    """Training, public or test data cannot be read or does not fit the model."""

    exit_code = 3


class ModelError(ReftError):
    """A model cannot be loaded, pruned, compiled or exported."""

    exit_code = 4


class PlanError(ReftError):
    """No sub-model fits a device, or no device can take part."""

    exit_code = 5


class BundleError(ReftError):
    """A bundle or a tensor container is malformed, too large, or not what its hash says."""

    exit_code = 6


class BrokerError(ReftError):
    """The MQTT broker cannot be reached, refuses us, or cannot be started."""

    exit_code = 7


class FederationError(ReftError):
    """A federation could not finish, for example because a round never reached its quorum."""

    exit_code = 8


class ResourceError(ReftError):
    """This machine ran out of memory or disk, or lacks what the work needs."""

    exit_code = 9


class LocalProtocolError(ReftError):
    """Our own code asked a state machine for a transition that does not exist."""


class RemoteProtocolError(ReftError):
    """A peer sent bytes that break the protocol: malformed, too large, or out of place."""
