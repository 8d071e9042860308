"""The time that every system of a comparison may train."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import final

from torchcdm.errors import UserError, nearest

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.monotonic, "processor": time.process_time}
"""What a second is. Processor time counts all threads of this process and nothing that other jobs take: for machines
that are shared; work on a GPU escapes it."""


@final
class Budget:
    """Seconds that run from the moment it is made.

    Args:
        seconds: How long.
        clock: A name in :data:`CLOCKS`.

    Raises:
        UserError: No time at all, or an unknown clock.
    """

    def __init__(self, seconds: float, clock: str = "wall") -> None:
        if not seconds > 0:
            raise UserError(f"budget is {seconds:g} seconds; it must be positive")
        if clock not in CLOCKS:
            raise UserError(f"unknown clock '{clock}'; {nearest(clock, CLOCKS)}")
        self.seconds, self.clock = float(seconds), clock
        self.now = CLOCKS[clock]
        self._began = self.now()

    def restarted(self) -> Budget:
        """The same budget from now on."""
        return Budget(self.seconds, self.clock)

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return self.now() - self._began

    @property
    def share(self) -> float:
        """Of the time that has passed, 0 ... 1."""
        return min(1.0, self.elapsed / self.seconds)

    @property
    def spent(self) -> bool:
        """Whether the time is over."""
        return self.elapsed >= self.seconds
