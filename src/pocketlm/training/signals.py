"""Signals: before the first step one ends the process at once, from then on it asks for a stop with a checkpoint.

Asked by Ctrl-C (SIGINT), schedulers (SIGTERM, SIGUSR1) and a terminal or connection that goes away (SIGHUP). All but
Ctrl-C act as SIGTERM. Signals reach the main thread only; a run in another thread leaves them to their owner.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

Handler = Callable[[int, FrameType | None], Any]


class Stopped(Exception):
    """Raised between two pieces of work once a stop was asked for. What was begun is dropped."""


class StopRequest:
    """The first signal only notes itself here, a second one ends the process."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def check(self) -> None:
        """
        Raises:
            Stopped: a signal came.
        """
        if self.received:
            raise Stopped

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self.received = signal.Signals(number)
        for watched in WATCHED:
            if signal.getsignal(watched) == self.note:
                signal.signal(watched, signal.SIG_DFL)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """While entered, signals ask for a stop; the handlers from before come back at the end."""
    request = StopRequest()
    with _handled_by(request.note):
        yield request


@contextlib.contextmanager
def leave_on_signal() -> Iterator[None]:
    """While entered, a signal ends the process at once, with its exit code: there is nothing yet that could be lost.

    It does not raise: an exception in the middle of an import may be caught by whoever is importing.
    """
    with _handled_by(_leave):
        yield


def _leave(number: int, frame: FrameType | None) -> None:
    received = signal.Signals(number)
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"pocketlm: stopped by {received.name}\n".encode())
    os._exit(128 + exit_signal(received))


@contextlib.contextmanager
def _handled_by(handler: Handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [number for number in WATCHED if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def exit_signal(received: signal.Signals) -> int:
    """The number whose exit code (128 + number) the process leaves with; all but Ctrl-C act as SIGTERM."""
    return signal.SIGINT if received == signal.SIGINT else signal.SIGTERM
