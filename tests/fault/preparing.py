"""A process that prepares a data set, and may die or wait at one operation of the disk (see test_preparation.py).

    python preparing.py CONFIG            CONFIG: a DataConfig as JSON
    python preparing.py CONFIG die 7      ends with exit code 137 at operation 7; of a write, half is done before
    python preparing.py CONFIG wait 7     says "held" before operation 7 and goes on once stdin is closed

It says "ready" before it begins, then what `prepare` says, then "operations N".
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from pocketlm import files
from pocketlm.config import DataConfig
from pocketlm.data.prepare import prepare
from pocketlm.disk import Disk
from pocketlm.text import bulk

OPERATIONS = [name for name in vars(Disk) if not name.startswith("_")]
Before = Callable[[int, str, tuple[Any, ...]], None]


class WatchedDisk(Disk):
    """Calls `before(number, name, arguments)` ahead of each operation. Numbers count from 1."""

    def __init__(self, before: Before) -> None:
        self.before = before
        self.count = 0


def _watched(name: str) -> Callable[..., Any]:
    def call(self: WatchedDisk, *arguments: Any) -> Any:
        self.count += 1
        self.before(self.count, name, arguments)
        return getattr(Disk, name)(self, *arguments)

    return call


for operation in OPERATIONS:
    setattr(WatchedDisk, operation, _watched(operation))


def say(line: str) -> None:
    print(line, flush=True)


def die(name: str, arguments: tuple[Any, ...]) -> None:
    if name == "write":
        descriptor, data = arguments
        os.write(descriptor, memoryview(data)[: len(data) // 2])
    os._exit(137)


def wait(name: str, arguments: tuple[Any, ...]) -> None:
    say("held")
    sys.stdin.read()


def main(config: str, kind: str = "", number: str = "0") -> None:
    def before(count: int, name: str, arguments: tuple[Any, ...]) -> None:
        if count == int(number):
            {"die": die, "wait": wait}[kind](name, arguments)

    bulk.SMALL_BYTES = 0  # a small corpus, too, takes the path of large ones
    disk = files.DISK = WatchedDisk(before)
    say("ready")
    prepare(DataConfig(**json.loads(config)), progress=say)
    say(f"operations {disk.count}")


if __name__ == "__main__":
    main(*sys.argv[1:])
