"""Leaving cleanly on SIGTERM and SIGINT."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import final


class Interrupted(KeyboardInterrupt):
    """A signal asked the training to stop; its state is saved. No ``Exception``, so that nothing swallows it.

    Attributes:
        number: The signal; a process that it ends exits with 128 + number.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@final
class SignalWatch:
    """Remembers the first SIGTERM or SIGINT instead of dying of it; a second one has its usual effect.

    Outside the main thread, where Python takes no handlers, it watches nothing.

    Attributes:
        received: The signal, 0 when there was none.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
