"""Selective updating, the third stage of FL-PQSU: a device is silent in a round that has not made it better.

Xu, Fang, Ding, Zou and Xiong, IEEE Access 9 (2021), 10.1109/ACCESS.2021.3063291. As in the published code, a device
sends its update only when its training loss is below that of the last update that it sent; the first always travels.

There the server averages the last known weights of all devices, silent ones too. Here a silent device is left out of
the round's mean, as in federated averaging with partial participation: its stale weights would pull the model back.
"""

from __future__ import annotations


class Selection:
    """Who speaks, over the rounds of one run."""

    def __init__(self) -> None:
        self._losses: dict[str, float] = {}

    def admits(self, device: str, loss: float) -> bool:
        """Whether the device sends what it has learned, given its mean loss in the last local epoch."""
        if device in self._losses and loss >= self._losses[device]:
            return False
        self._losses[device] = loss
        return True
