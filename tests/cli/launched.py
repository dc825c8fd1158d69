"""A launcher in a process of its own: what it says, and every process that was seen below it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

PROGRAM = Path(__file__).parent / "rank_program.py"
GONE_S = 60.0
"""What is still there then was left behind."""


class Launched:
    """A launcher, what it and its ranks have said so far, and every process that was seen below it."""

    def __init__(self, *words: str, stdout: int = subprocess.PIPE) -> None:
        self.process = subprocess.Popen([sys.executable, *words], stdout=stdout, stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        self.seen: dict[int, psutil.Process] = {}

    @classmethod
    def program(cls, folder: Path, *attempts: str, stdout: int = subprocess.PIPE, **plan: Any) -> Self:
        words = [str(PROGRAM), "launch", json.dumps({"devices": 2} | plan), str(folder), *attempts]
        return cls(*words, stdout=stdout)

    def lines(self) -> Iterator[str]:
        """Each line that is said, until nobody is left who could say one."""
        assert self.process.stderr
        torn = b""
        while True:
            assert select.select([self.process.stderr], [], [], GONE_S)[0], f"nothing more after\n{''.join(self.said)}"
            data = os.read(self.process.stderr.fileno(), 1 << 16)
            if not data:
                assert not torn
                return
            *whole, torn = (torn + data).split(b"\n")
            self.look()
            for line in whole:
                self.said.append(line.decode() + "\n")
                yield self.said[-1]

    def until(self, is_there: Callable[[str], bool], times: int = 1) -> None:
        """Returns when so many lines have been said."""
        for line in self.lines():
            times -= is_there(line)
            if times == 0:
                return
        pytest.fail(f"it has ended before:\n{''.join(self.said)}")

    def look(self) -> None:
        if self.process.poll() is None:
            below = psutil.Process(self.process.pid).children(recursive=True)
            self.seen |= {process.pid: process for process in below}

    def trees(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.said if line.startswith("{")]

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout, and what was said to the person; then nothing is left that it has started."""
        for _ in self.lines():
            pass
        printed, _ = self.process.communicate()
        code = self.process.returncode
        _, left = psutil.wait_procs(self.seen.values(), GONE_S)
        for process in left:
            process.kill()
        assert not left, "left behind"
        return code, printed, "".join(line for line in self.said if not line.startswith("{"))


def is_there(line: str) -> bool:
    return '"there"' in line
