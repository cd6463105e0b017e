"""Care for the device's certificate beside the main loop: take in a renewed one, explain refusals, warn before its end.

All of it runs a child process for a second or so (the library for certificates stays out of this one), so it is done
in a thread of its own, one thing at a time, with a pause after what was refused: a broker that was taken over may send
what it likes, and must not keep the device busy with it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from reft_edge.agent.credentials import Credentials
from reft_edge.errors import ReftError

PAUSE_S = 30.0
"""After a certificate that was refused, before anything else is looked at."""

EXPLAIN_AGAIN_S = 600.0
"""While the broker's own words stay the same, our certificate is looked at again after this long: it may have expired
meanwhile."""

LOOK_EVERY_S = 86_400.0
"""A day: how often the certificate's end is looked at."""

logger = logging.getLogger(__name__)


class CertificateRenewed:
    """There is a new certificate: it should be announced."""


class CertificateCare:
    """Call it from one thread, with the monotonic clock in seconds; `events` receives `CertificateRenewed`."""

    def __init__(
        self,
        credentials: Credentials,
        events: queue.SimpleQueue[Any],
        *,
        now: float,
        pause_s: float = PAUSE_S,
    ) -> None:
        self._credentials = credentials
        self._events = events
        self._pause_s = pause_s
        self.look_at = now
        """When `tick` should be called, to see how long the certificate is good."""
        self._refusal = ""
        self._explained_at = float("-inf")
        self._thread: threading.Thread | None = None
        # What both threads use, under the lock of `_changed`:
        self._changed = threading.Condition()
        self._wishes: dict[Callable[..., None], tuple[Any, ...]] = {}
        """Step to its arguments: of several wishes of a kind the last counts."""
        self._explanation = ""
        self._stopping = False

    def renew(self, pem: bytes) -> None:
        """A certificate has arrived."""
        self._wish(self._take_in, pem)

    def explain(self, refusal: str, now: float) -> None:
        """The broker turned us away, saying `refusal`. What is wrong with our certificate is logged once."""
        if refusal == self._refusal and now < self._explained_at + EXPLAIN_AGAIN_S:
            return
        self._refusal, self._explained_at = refusal, now
        self._wish(self._look_for_faults)

    def connected(self) -> None:
        """The broker took us: the next refusal is a new one."""
        self._refusal = ""
        with self._changed:
            self._explanation = ""

    def tick(self, now: float) -> None:
        if now >= self.look_at:
            self.look_at = now + LOOK_EVERY_S
            self._wish(self._look_at_end)

    def stop(self) -> None:
        """Begin nothing any more. A child process that runs ends by itself."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _wish(self, step: Callable[..., None], *arguments: Any) -> None:
        with self._changed:
            self._wishes[step] = arguments
            if self._thread is None and not self._stopping:
                self._thread = threading.Thread(target=self._work, name="certificate", daemon=True)
                self._thread.start()

    # The thread.

    def _work(self) -> None:
        """Do what is wished, until nothing is."""
        while (wish := self._next_wish()) is not None:
            step, arguments = wish
            step(*arguments)

    def _next_wish(self) -> tuple[Callable[..., None], tuple[Any, ...]] | None:
        """None ends the thread."""
        with self._changed:
            if self._stopping or not self._wishes:
                self._thread = None
                return None
            step = next(iter(self._wishes))
            return step, self._wishes.pop(step)

    def _take_in(self, pem: bytes) -> None:
        try:
            line = self._credentials.accept_renewal(pem)
        except ReftError as exc:
            logger.warning("a certificate that came over the network is not used: %s", exc)
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, self._pause_s)
            return
        if line:
            logger.info("%s", line)
            self._events.put(CertificateRenewed())

    def _look_for_faults(self) -> None:
        explanation = self._credentials.explain_refusal()
        with self._changed:
            is_news = explanation != self._explanation
            self._explanation = explanation
        if explanation and is_news:
            logger.error("%s", explanation)

    def _look_at_end(self) -> None:
        warning = self._credentials.expiry_warning()
        if warning:
            logger.warning("%s", warning)
