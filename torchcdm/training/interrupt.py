"""Leaving cleanly on SIGTERM, SIGINT and SIGHUP."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import final


class Interrupted(KeyboardInterrupt):
    """A signal asked the training to stop; its state is saved. No ``Exception``, so that nothing swallows it.

    A process that the signal ``number`` ends exits with 128 + number.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@final
class SignalWatch:
    """Remembers the first signal that would end the process, in ``received``; a second one has its usual effect.

    Signals that are ignored, as SIGHUP is under nohup, stay ignored. Outside the main thread, where Python takes no
    handlers, nothing is watched.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> SignalWatch:
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
        for number in numbers if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()
