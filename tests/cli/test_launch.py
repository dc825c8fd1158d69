"""`pocketlm train --devices N`: which processes there are, which code they end with, and that none is left.

Most of it with ranks that train nothing (rank_program.py), under the real torchrun; the last test trains.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

from pocketlm.cli.launch import Plan

PROGRAM = Path(__file__).parent / "rank_program.py"
GONE_S = 60.0
"""What is still there then was left behind."""
TERM, KILL = signal.SIGTERM, signal.SIGKILL
PLAN = Plan(2)


class Launched:
    """A launcher, what it and its ranks have said so far, and every process that was seen below it."""

    def __init__(self, *words: str) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, *words], stdout=pipe, stderr=pipe, text=True)
        self.said: list[str] = []
        self.seen: dict[int, psutil.Process] = {}

    @classmethod
    def program(cls, folder: Path, *attempts: str, **plan: Any) -> Self:
        return cls(str(PROGRAM), "launch", json.dumps({"devices": 2} | plan), str(folder), *attempts)

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

    def ranks(self) -> list[int]:
        """Pids, by rank, as far as they have said something."""
        return [tree["pid"] for tree in sorted(self.trees(), key=lambda tree: tree["rank"]) if tree["what"] == "there"]

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


# --- ranks that end by themselves


def test_ranks_that_end_well(tmp_path: Path) -> None:
    """The words reach them to the letter, stdout is the first one's, and nothing is said or left beside it."""
    code, printed, said = (it := Launched.program(tmp_path / "run", "done,done", "${local_rank} $$ a b")).end()
    assert (code, said) == (0, "")
    assert json.loads(printed) == {"argv": ["done,done", "${local_rank} $$ a b"]}
    assert [tree["rank"] for tree in sorted(it.trees(), key=lambda tree: tree["rank"])] == [0, 1]
    assert not (tmp_path / "run" / "ranks").exists()


def test_a_refusal_of_any_rank_starts_nothing_anew(tmp_path: Path) -> None:
    code, _, said = Launched.program(tmp_path / "run", "done,refuse", max_restarts=2).end()
    assert (code, said) == (3, "pocketlm: rank 1 is refused\n")


def test_a_crash_starts_all_ranks_anew_and_as_often_as_it_may(tmp_path: Path) -> None:
    """Also one that is only missed by the others; and how the last attempt ended is what is said."""
    it = Launched.program(tmp_path / "run", "miss,die", "raise,miss", max_restarts=1)
    code, _, said = it.end()
    assert code == 1
    assert "all go on from the newest checkpoint: 1 of 1\n" in said
    assert said.count("ZeroDivisionError: nobody expects it") == 2, "where it happened, and at the end"
    log = tmp_path / "run" / "ranks" / f"host-{os.uname().nodename}.log"
    assert "rank 0 has ended: ZeroDivisionError: nobody expects it; the same command goes on" in said.splitlines()[-1]
    assert said.splitlines()[-1].endswith(f"(details: {log})")
    assert "exitcode: -9" in log.read_text(), "torchrun's own words of the first attempt"


# --- ranks that are ended


@pytest.mark.parametrize(("number", "code"), [(TERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_a_signal_is_passed_on_once(number: signal.Signals, code: int, tmp_path: Path) -> None:
    it = Launched.program(tmp_path / "run", "wait,wait", max_restarts=1)
    it.until(is_there, times=2)
    it.process.send_signal(number)
    assert it.end()[::2] == (code, f"pocketlm: stopped by {number.name}, nothing lost\n")
    assert [tree["what"] for tree in it.trees()].count("signal") == 2


def test_a_scheduler_may_send_a_signal_to_every_process(tmp_path: Path) -> None:
    it = Launched.program(tmp_path / "run", "wait,wait", max_restarts=1)
    it.until(is_there, times=2)
    it.look()
    for pid in (*it.seen, it.process.pid):
        os.kill(pid, TERM)
    assert it.end()[::2] == (143, "pocketlm: stopped by SIGTERM, nothing lost\n")


def test_a_second_signal_ends_all_at_once(tmp_path: Path) -> None:
    it = Launched.program(tmp_path / "run", "deaf,deaf")
    it.until(is_there, times=2)
    it.process.send_signal(TERM)
    it.until(lambda line: '"signal"' in line, times=2)
    it.process.send_signal(TERM)
    assert it.end()[::2] == (143, "pocketlm: stopped by SIGTERM\n")


def test_a_signal_before_the_ranks_can_hear_it_starts_nothing_anew(tmp_path: Path) -> None:
    """The first rank dies of it, as a Python does that is just coming up."""
    it = Launched.program(tmp_path / "run", "fresh,wait", "wait,wait", max_restarts=1)
    it.until(is_there, times=2)
    it.process.send_signal(TERM)
    assert it.end()[::2] == (143, "pocketlm: stopped by SIGTERM, nothing lost\n")


@pytest.mark.parametrize("whom", ["launcher", "torchrun", "rank"])
def test_kill_9_leaves_nothing_behind(whom: str, tmp_path: Path) -> None:
    it = Launched.program(tmp_path / "run", "wait,miss")
    it.until(is_there)
    it.look()
    rank = psutil.Process(it.trees()[0]["pid"])
    victim = {"launcher": it.process.pid, "torchrun": rank.ppid(), "rank": rank.pid}[whom]
    os.kill(victim, KILL)
    code, _, said = it.end()
    assert code == {"launcher": -9, "torchrun": 1, "rank": 1}[whom]
    who = {"launcher": "", "torchrun": "torchrun was ended by SIGKILL", "rank": "rank 0 was ended by SIGKILL"}[whom]
    assert who in said
    assert said.count("\n") == (whom != "launcher")
