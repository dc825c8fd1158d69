"""Work in a thread of its own, beside what goes on here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Beside(Generic[T]):
    """Begins some work; where the system gives no thread, does it here and now.

    A `with` ends when the work is done, and raises what it raised, unless something else was raised before.
    """

    def __init__(self, name: str, work: Callable[[], T]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = threading.Thread(target=self._do, name=name)
        try:
            self._thread.start()
        except RuntimeError:
            self._thread = None
            self._do()

    def _do(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:  # is raised again where the result is asked for
            self._error = error

    def result(self) -> T:
        """What the work returned, when it is done; or what it raised."""
        self._wait()
        if self._error:
            raise self._error
        return self._result

    def _wait(self) -> None:
        if self._thread:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wait()
        if kind is None:
            self.result()
