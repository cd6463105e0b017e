"""When to tell the coordinator what is served and how the device is: little, and only what it does not know.

What is served and what became of a deployment is told at once, and after each connection. Counts and vitals are looked
at once in [serving] `report_every_s`, and told if they have changed enough to matter: an idle device is silent.
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
from reft_edge.wire.deployment import Attempt, Condition, Served, Vitals

TEMPERATURE_STEP_CELSIUS = 3.0
"""A board's temperature is never the same twice."""

BATTERY_STEP = 0.02
"""A share of its charge."""


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
        """Look at counts and vitals when it is time."""
        if self.look_at is None or now < self.look_at:
            return
        condition = self._now(attempt)
        if self._is_news(self._serving(attempt)) or self._has_changed(condition):
            self._tell(condition, now)
        else:
            self.look_at = now + self._settings.report_every_s

    def _tell(self, condition: Condition, now: float) -> None:
        self._told = condition
        self.look_at = now + self._settings.report_every_s
        self._say(condition)

    def _serving(self, attempt: Attempt | None) -> Condition:
        """All but counts and vitals, which take time to read."""
        current, previous = self._slots.current(), self._slots.previous()
        return Condition(
            serving=_served(current), previous=None if previous == current else _served(previous), attempt=attempt
        )

    def _now(self, attempt: Attempt | None) -> Condition:
        condition = self._serving(attempt)
        counts = None
        if condition.serving is not None and self._settings.report:
            counts = read_counts(self._counts_folder, condition.serving.version)
        return msgspec.structs.replace(condition, counts=counts, vitals=self._read_board())

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
