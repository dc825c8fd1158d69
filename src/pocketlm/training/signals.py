"""A polite stop: SIGINT, SIGTERM and SIGUSR1 ask, the loop answers at the next step boundary, a second one ends."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While entered, the first signal only notes itself; the handlers from before come back at the end."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in WATCHED:
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for watched in WATCHED:
            signal.signal(watched, signal.SIG_DFL)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_signal(self) -> int:
        """The number whose exit code (128 + number) the process leaves with; SIGUSR1 acts as SIGTERM."""
        return signal.SIGINT if self.received == signal.SIGINT else signal.SIGTERM
