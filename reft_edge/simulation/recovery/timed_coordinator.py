"""The coordinator as `reft-edge coordinator` runs it, saying when it has done what. A process, told which TOML.

Nothing but the standard library is imported before the first word, so that imports are seen.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reft_edge.coordinator.events import Event


def main() -> None:
    say("python")
    from reft_edge.coordinator.preparation import prepare
    from reft_edge.coordinator.server import Coordinator
    from reft_edge.coordinator.settings import load_federation

    say("imports")
    path = Path(sys.argv[1])
    preparation = prepare(load_federation(path), path.resolve().parent)
    say("prepare")
    logging.getLogger("reft_edge.wire.mqtt").addHandler(_Connected())
    logging.getLogger("reft_edge.wire.mqtt").setLevel(logging.INFO)
    Coordinator(preparation, listener=_tell).run()


def say(stage: str) -> None:
    """To standard output, with the system's monotonic clock."""
    print(json.dumps({"stage": stage, "at": time.monotonic()}), flush=True)


def _tell(event: Event) -> None:
    from reft_edge.coordinator.events import Started, UpdateSeen

    if isinstance(event, Started):
        say("store")
    elif isinstance(event, UpdateSeen) and event.state == "received":
        say("update")


class _Connected(logging.Handler):
    """The link's log says when the broker has accepted us."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("connected to broker"):
            say("connect")


if __name__ == "__main__":
    main()
