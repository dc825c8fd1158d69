"""A polite stop: a signal asks, the loop answers at the next step boundary, a second signal ends the process.

Asked by Ctrl-C (SIGINT), schedulers (SIGTERM, SIGUSR1) and a terminal or connection that goes away (SIGHUP).
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


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


def exit_signal(received: signal.Signals) -> int:
    """The number whose exit code (128 + number) the process leaves with; all but Ctrl-C act as SIGTERM."""
    return signal.SIGINT if received == signal.SIGINT else signal.SIGTERM
