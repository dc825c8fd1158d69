"""Disks that fail, lie, are slow or end the process, and one that remembers what a power cut would have left.

Each stands in for `files.DISK`. All number the operations that pass through them, from 0, those of the thread that
saves apart from all others: so a number says which one it is, however fast the other thread was. The subclasses break
the one that they are told to.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pocketlm.disk import Disk
from pocketlm.training.saving import THREAD

KILLED = 137  # what a shell says of a process that SIGKILL ended


class Quick(Disk):
    """The real disk without its waits: nothing that a test asserts depends on what outlives this machine's power."""

    def sync(self, descriptor: int) -> None:
        os.fstat(descriptor)

    def sync_folder(self, path: Path) -> None:
        assert path.is_dir()


REAL = Quick()


@dataclass(frozen=True)
class Operation:
    """One change of the disk. `data` is what a write brings, `target` the new name of a rename."""

    kind: str
    path: Path
    data: bytes = b""
    target: Path | None = None
    size: int = 0
    beside: bool = field(default_factory=lambda: threading.current_thread().name == THREAD)
    """Whether it is of the thread that saves."""

    def __str__(self) -> str:
        return f"{self.kind} {self.path}"


class Counting(Disk):
    """Does everything, and keeps a list of it. Subclasses say what `act` does besides or instead."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.open: dict[int, Path] = {}
        self._seen_of = Counter[bool]()

    def act(self, number: int, operation: Operation, do: Callable[[], None]) -> None:
        """What becomes of an operation; `do` does it as a healthy disk would.

        Args:
            number: among the operations of its thread.
        """
        do()

    def change(self, operation: Operation, to: Operation) -> None:
        """What has become of an operation, where that is another one."""
        place = next(i for i in reversed(range(len(self.operations))) if self.operations[i] is operation)
        self.operations[place] = to

    def of(self, *, beside: bool) -> list[Operation]:
        """The operations of the thread that saves, or of the others."""
        return [operation for operation in self.operations if operation.beside == beside]

    def put(self, operation: Operation, descriptor: int, data: bytes) -> None:
        """Writes some of a write's bytes."""
        REAL.write(descriptor, data)

    def _pass(self, operation: Operation, do: Callable[[], None]) -> None:
        self.operations.append(operation)
        number = self._seen_of[operation.beside]
        self._seen_of[operation.beside] += 1
        self.act(number, operation, do)

    def create(self, path: Path) -> int:
        return self._opened(Operation("create", path), lambda: REAL.create(path))

    def append(self, path: Path) -> int:
        return self._opened(Operation("append", path), lambda: REAL.append(path))

    def _opened(self, operation: Operation, real: Callable[[], int]) -> int:
        descriptors: list[int] = []
        self._pass(operation, lambda: descriptors.append(real()))
        self.open[descriptors[0]] = operation.path
        return descriptors[0]

    def write(self, descriptor: int, data: bytes | memoryview) -> None:
        operation = Operation("write", self.open[descriptor], bytes(data))
        self._pass(operation, lambda: self.put(operation, descriptor, operation.data))

    def truncate(self, descriptor: int, size: int) -> None:
        self._pass(Operation("truncate", self.open[descriptor], size=size), lambda: REAL.truncate(descriptor, size))

    def sync(self, descriptor: int) -> None:
        self._pass(Operation("sync", self.open[descriptor]), lambda: REAL.sync(descriptor))

    def close(self, descriptor: int) -> None:
        """Closed in any case: so does Linux, whatever it answers."""
        operation = Operation("close", self.open.pop(descriptor))
        REAL.close(descriptor)
        self._pass(operation, lambda: None)

    def rename(self, source: Path, target: Path) -> None:
        self._pass(Operation("rename", source, target=target), lambda: REAL.rename(source, target))

    def remove_file(self, path: Path) -> None:
        self._pass(Operation("remove_file", path), lambda: REAL.remove_file(path))

    def make_folder(self, path: Path) -> None:
        self._pass(Operation("make_folder", path), lambda: REAL.make_folder(path))

    def remove_folder(self, path: Path) -> None:
        self._pass(Operation("remove_folder", path), lambda: REAL.remove_folder(path))

    def sync_folder(self, path: Path) -> None:
        self._pass(Operation("sync_folder", path), lambda: REAL.sync_folder(path))

    @property
    def kinds(self) -> Counter[str]:
        return Counter(operation.kind for operation in self.operations)


class Failing(Counting):
    """Refuses operation `at` with an errno, a write after its first `after_bytes`; with `on`, all that come later too.

    Where `only` is given, operations of other kinds go well and are not counted towards `at`.
    """

    def __init__(
        self, code: int, at: int, *, after_bytes: int = 0, on: bool = False, only: frozenset[str] = frozenset()
    ) -> None:
        super().__init__()
        self.code, self.at, self.after_bytes, self.on, self.only = code, at, after_bytes, on, only
        self.failed: list[Operation] = []
        self._seen = -1

    def act(self, number: int, operation: Operation, do: Callable[[], None]) -> None:
        if not self.only or operation.kind in self.only:
            self._seen += 1
            if self._seen == self.at or (self.on and self._seen > self.at):
                self.failed.append(operation)
                if operation.kind == "write":
                    descriptor = next(key for key, path in self.open.items() if path == operation.path)
                    REAL.write(descriptor, operation.data[: self.after_bytes])
                raise OSError(self.code, os.strerror(self.code), str(operation.path))
        do()


class Killing(Counting):
    """Ends the process as SIGKILL would: before operation `at`, or within it after so many hundredths of a write.

    `beside` says of which thread. `kind` is what the caller takes that operation for: if it is another, the count has
    gone astray.
    """

    def __init__(self, at: int, kind: str, percent: int = 0, *, beside: bool = False) -> None:
        super().__init__()
        self.at, self.kind, self.percent, self.beside = at, kind, percent, beside

    def act(self, number: int, operation: Operation, do: Callable[[], None]) -> None:
        if (number, operation.beside) != (self.at, self.beside):
            do()
            return
        assert operation.kind == self.kind, f"{operation} is no {self.kind}"
        if self.percent:
            descriptor = next(key for key, path in self.open.items() if path == operation.path)
            REAL.write(descriptor, operation.data[: len(operation.data) * self.percent // 100])
        os._exit(KILLED)


class KillingBesideSteps(Killing):
    """As `Killing`, in a save, and not before so many lines were written to the journal since that was begun."""

    def __init__(self, at: int, kind: str, num_lines: int) -> None:
        super().__init__(at, kind, beside=True)
        self.num_lines, self._lines, self._lines_before = num_lines, 0, 0
        self._line_came = threading.Condition()

    def act(self, number: int, operation: Operation, do: Callable[[], None]) -> None:
        of_journal = operation.path.name == "metrics.jsonl"
        with self._line_came:
            if operation.beside and of_journal:
                self._lines_before = self._lines
            if operation.beside and number == self.at:
                assert self._line_came.wait_for(lambda: self._lines - self._lines_before >= self.num_lines, 60)
        super().act(number, operation, do)
        with self._line_came:
            if not operation.beside and of_journal and operation.kind == "write":
                self._lines += 1
                self._line_came.notify_all()


class Lying(Counting):
    """Says that all went well, and writes something else: `spoil` makes of a write's bytes what reaches the disk."""

    def __init__(self, spoil: Callable[[int, bytes], bytes]) -> None:
        super().__init__()
        self.spoil = spoil

    def put(self, operation: Operation, descriptor: int, data: bytes) -> None:
        REAL.write(descriptor, self.spoil(len(self.operations) - 1, data))


class Waiting(Counting):
    """Holds operation `at` until `go` is set, and says by `reached` that it has come."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.reached, self.go = at, threading.Event(), threading.Event()

    def act(self, number: int, operation: Operation, do: Callable[[], None]) -> None:
        if number == self.at:
            self.reached.set()
            assert self.go.wait(60)
        do()
