"""Signals: before the first step one ends the process at once, from then on it asks for a stop with a checkpoint.

Asked by Ctrl-C (SIGINT), schedulers (SIGTERM, SIGUSR1) and a terminal or connection that goes away (SIGHUP). All but
Ctrl-C act as SIGTERM. Signals reach the main thread only; a run in another thread leaves them to their owner.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
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
    """The first signal only notes itself here, a second one ends the process.

    SIGHUP is never a second one: of a terminal that is closed the shell tells, and at once the kernel, too.
    """

    def __init__(self, most: Callable[[int], int] = int, *, second_ends: bool = True) -> None:
        """
        Args:
            most: of several ranks, the largest of their numbers, by which one that got a signal stops all of them.
            second_ends: a rank may get one and the same stop twice, from the launcher and from a scheduler that sends
                it to every process; if it is to end at once, the launcher kills it.
        """
        self.received: signal.Signals | None = None
        self.watched: list[signal.Signals] = []
        """Which it is asked by."""
        self._came_here = False
        self.second_ends = second_ends
        self._most = most

    def check(self) -> None:
        """Every rank calls it at the same places.

        Raises:
            Stopped: a signal came, to this rank or to another.
        """
        if number := self._most(self.received or 0):
            self.received = signal.Signals(number)
            raise Stopped

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self.received, self._came_here = self.received or signal.Signals(number), True
        self.take_signals()

    def take_signals(self) -> None:
        """Handles its signals from here on, also those that somebody else has taken meanwhile."""
        for watched in self.watched:
            ends = self._came_here and self.second_ends and watched != signal.SIGHUP
            signal.signal(watched, signal.SIG_DFL if ends else self.note)


@contextlib.contextmanager
def stop_on_signal(most: Callable[[int], int] = int, *, second_ends: bool = True) -> Iterator[StopRequest]:
    """While entered, signals ask for a stop, as `StopRequest` says; the handlers from before come back at the end."""
    request = StopRequest(most, second_ends=second_ends)
    with _second_ends() if second_ends else contextlib.nullcontext(), handled_by(request.note) as request.watched:
        yield request


@contextlib.contextmanager
def _second_ends() -> Iterator[None]:
    """A second signal ends the process also while the first waits for a long operation: handlers run in between only.

    Python's own handler writes each signal's number to a socket at once, and a thread reads it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    threading.Thread(target=_leave_at_second, args=(reader,), daemon=True).start()
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()


def _leave_at_second(reader: socket.socket) -> None:
    with reader:
        numbers = (number[0] for number in iter(lambda: reader.recv(1), b""))
        next((number for number in numbers if number in WATCHED), None)
        second = next((number for number in numbers if number in WATCHED and number != signal.SIGHUP), None)
    if second:
        _leave(second, None)


@contextlib.contextmanager
def leave_on_signal(*, says: bool = True) -> Iterator[None]:
    """While entered, a signal ends the process at once, with its exit code: there is nothing yet that could be lost.

    It does not raise: an exception in the middle of an import may be caught by whoever is importing.

    Args:
        says: whether a line tells of it.
    """
    with handled_by(_leave if says else _leave_silently):
        yield


def _leave(number: int, frame: FrameType | None) -> None:
    received = signal.Signals(number)
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"pocketlm: stopped by {received.name}\n".encode())
    _leave_silently(number, frame)


def _leave_silently(number: int, frame: FrameType | None) -> None:
    os._exit(128 + exit_signal(signal.Signals(number)))


@contextlib.contextmanager
def handled_by(handler: Handler) -> Iterator[list[signal.Signals]]:
    """While entered, the handler has the signals, all but those that are ignored; which it has."""
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    before = {number: signal.getsignal(number) for number in WATCHED}
    # nohup ignores SIGHUP; None is a handler of another language
    handled = [number for number, earlier in before.items() if earlier not in (signal.SIG_IGN, None)]
    try:
        for number in handled:
            signal.signal(number, handler)
        yield handled
    finally:
        for number, earlier in before.items():
            if earlier is not None:
                signal.signal(number, earlier)


def exit_signal(received: signal.Signals) -> int:
    """The number whose exit code (128 + number) the process leaves with; all but Ctrl-C act as SIGTERM."""
    return signal.SIGINT if received == signal.SIGINT else signal.SIGTERM
