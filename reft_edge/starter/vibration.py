"""Made-up vibration of machines, for the starter project: three accelerations, and what is wrong with the machine.

A shaft turns at 25 times a second, a little differently in every machine. `good` is that turn in noise; `imbalance`
adds to it across the shaft; `bearing` adds short knocks at a rate of its own. Not a model of anything real: it is there
so that the project runs before its data are replaced.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reft_edge.errors import ResourceError

if TYPE_CHECKING:
    from reft_edge.types import FloatArray

READINGS_PER_S = 200
WINDOW = 64
"""Readings that are one sample: a third of a second, eight turns of the shaft."""
WINDOWS_IN_A_STRETCH = 4
"""A state of the machine lasts so long."""
COLUMNS = ("acceleration_x", "acceleration_y", "acceleration_z")
TARGET_COLUMN = "state"
STATES = ("good", "imbalance", "bearing")

SHAFT_HZ = 25.0
KNOCK_HZ = 8.0
RING_HZ = 70.0
"""A knock makes the housing ring at this rate."""


def stretch(state: str, n_readings: int, machine: float, rng: np.random.Generator) -> FloatArray:
    """Readings of one state, float32 (n_readings, 3). `machine` from -1 to 1 is what sets one apart from the others."""
    seconds = np.arange(n_readings) / READINGS_PER_S
    turn = 2 * np.pi * SHAFT_HZ * (1 + 0.04 * machine) * seconds + rng.uniform(0, 2 * np.pi)
    readings = rng.normal(0, 0.35, (n_readings, len(COLUMNS)))
    readings += 0.5 * np.stack([np.cos(turn), np.sin(turn), 0.3 * np.sin(2 * turn)], axis=1)
    if state == "imbalance":
        readings += 0.45 * np.stack([np.cos(turn), np.sin(turn), np.zeros(n_readings)], axis=1)
    elif state == "bearing":
        since = (seconds + rng.uniform(0, 1)) % (1 / (KNOCK_HZ * (1 + 0.1 * machine)))
        ring = np.exp(-40 * since) * np.sin(2 * np.pi * RING_HZ * since)
        readings += 2.4 * ring[:, None] * np.array([0.4, 0.4, 1.0])
    readings *= 1 + 0.05 * machine
    result: FloatArray = readings.astype(np.float32)
    return result


def write_recording(
    path: Path, *, stretches: Sequence[tuple[str, float]], rng: np.random.Generator, labelled: bool = True
) -> None:
    """A CSV with a header: a stretch of readings for each state and machine in `stretches`, one after the other.

    Raises `ResourceError` where the file cannot be written.
    """
    header = [*COLUMNS, TARGET_COLUMN] if labelled else list(COLUMNS)
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            for state, machine in stretches:
                for row in stretch(state, WINDOW * WINDOWS_IN_A_STRETCH, machine, rng):
                    values = [f"{value:.3f}" for value in row]
                    writer.writerow([*values, state] if labelled else values)
    except OSError as exc:
        raise ResourceError(f"{path} cannot be written: {exc.strerror or exc}") from exc
