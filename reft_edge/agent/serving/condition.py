"""When to tell the coordinator what is served and how the device is: little, and only what it does not know.

What is served and what became of a deployment is told at once, and after each connection. Counts and vitals are looked
at once in [serving] `report_every_s`, and told if they have changed enough to matter: an idle device is silent.

Errors of what has just been switched to are what a coordinator waits for while it watches its canaries, for seconds or
for hours: nobody here knows how long. So they are looked at whenever a tenth of the time since the switch has passed,
and told at once if there are more: soon after the switch within a second, later no more often than all else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import msgspec

from reft_edge.agent.serving.counts import read_counts
from reft_edge.agent.serving.slots import InstalledModel, Slots
from reft_edge.agent.settings import ServingSettings
from reft_edge.profiling.vitals import read_vitals
from reft_edge.wire.deployment import Attempt, Condition, PredictionCounts, Served, Vitals

TEMPERATURE_STEP_CELSIUS = 3.0
"""A board's temperature is never the same twice."""

BATTERY_STEP = 0.02
"""A share of its charge."""

WATCH_SHARE = 0.1
"""Of the time since the switch: after this errors are looked at again."""

WATCH_AT_LEAST_S = 1.0


class ConditionReport:
    """Tells through `say`. `counts_folder` is where predicting processes count. `now`: monotonic clock in seconds."""

    def __init__(
        self,
        slots: Slots,
        settings: ServingSettings,
        *,
        counts_folder: Path,
        say: Callable[[Condition], None],
        read_board: Callable[[], Vitals] = lambda: Vitals(**asdict(read_vitals())),
    ) -> None:
        self._slots = slots
        self._settings = settings
        self._counts_folder = counts_folder
        self._say = say
        self._read_board = read_board
        self._told: Condition | None = None
        self._watched = ""
        """The deployment that is served."""
        self._watched_since = 0.0
        self._report_at = 0.0
        """When counts and vitals are looked at; errors are at `look_at` already."""
        self.look_at: float | None = None
        """When to call `tick`; None while there is nobody to tell."""

    def connected(self, attempt: Attempt | None, now: float) -> None:
        """Say everything: the broker may have lost what was said before."""
        self._tell(self._now(attempt), now)

    def disconnected(self) -> None:
        self.look_at = None

    def update(self, attempt: Attempt | None, now: float, *, again: bool = False) -> None:
        """Say what is served and what became of the deployment, if that is news, or if somebody asked `again`."""
        if self.look_at is not None and (again or self._is_news(self._serving(attempt))):
            self._tell(self._now(attempt), now)

    def tick(self, attempt: Attempt | None, now: float) -> None:
        """Look at errors, counts and vitals when it is time."""
        if self.look_at is None or now < self.look_at:
            return
        serving = self._serving(attempt)
        if self._is_news(serving) or self._has_failed(serving):
            self._tell(self._now(attempt), now)
            return
        if now >= self._report_at:
            condition = self._now(attempt)
            if self._has_changed(condition):
                self._tell(condition, now)
                return
            self._report_at = now + self._settings.report_every_s
        self._look_later(now)

    def _tell(self, condition: Condition, now: float) -> None:
        deployment = "" if condition.serving is None else condition.serving.deployment
        if deployment != self._watched:
            self._watched, self._watched_since = deployment, now
        self._told = condition
        self._report_at = now + self._settings.report_every_s
        self._look_later(now)
        self._say(condition)

    def _look_later(self, now: float) -> None:
        self.look_at = self._report_at
        if self._watched:
            watch_s = max(WATCH_AT_LEAST_S, WATCH_SHARE * (now - self._watched_since))
            self.look_at = min(self.look_at, now + watch_s)

    def _serving(self, attempt: Attempt | None) -> Condition:
        """All but counts and vitals, which take time to read."""
        current, previous = self._slots.current(), self._slots.previous()
        return Condition(
            serving=_served(current), previous=None if previous == current else _served(previous), attempt=attempt
        )

    def _now(self, attempt: Attempt | None) -> Condition:
        condition = self._serving(attempt)
        return msgspec.structs.replace(condition, counts=self._counts(condition.serving), vitals=self._read_board())

    def _counts(self, served: Served | None) -> PredictionCounts | None:
        if served is None:
            return None
        errors_only = not self._settings.report
        return read_counts(self._counts_folder, served.deployment, served.version, errors_only=errors_only)

    def _has_failed(self, serving: Condition) -> bool:
        """Whether there are more errors than were told."""
        now, told = self._counts(serving.serving), None if self._told is None else self._told.counts
        return now is not None and now.errors > (0 if told is None else told.errors)

    def _is_news(self, serving: Condition) -> bool:
        told = self._told
        return told is None or serving != msgspec.structs.replace(told, counts=None, vitals=None)

    def _has_changed(self, condition: Condition) -> bool:
        """Whether counts or vitals are worth a message."""
        told = self._told or Condition()
        now, then = condition.vitals or Vitals(), told.vitals or Vitals()
        return (
            condition.counts != told.counts
            or (now.throttled, now.on_battery) != (then.throttled, then.on_battery)
            or _moved(now.temperature_celsius, then.temperature_celsius, TEMPERATURE_STEP_CELSIUS)
            or _moved(now.battery_share, then.battery_share, BATTERY_STEP)
        )


def _served(model: InstalledModel | None) -> Served | None:
    if model is None:
        return None
    slot = model.slot
    return Served(
        deployment=slot.deployment,
        version=slot.version,
        model=slot.model,
        precision=slot.precision,
        sha256=slot.sha256,
    )


def _moved(now: float | None, then: float | None, step: float) -> bool:
    if now is None or then is None:
        return now is not then
    return abs(now - then) >= step
