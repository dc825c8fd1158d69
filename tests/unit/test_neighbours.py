"""How threads wait for one another beside others, by what Linux counts: how often each has slept, and waited."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pocketlm import neighbours
from pocketlm.config import Config
from pocketlm.limits import bound_cores
from pocketlm.neighbours import CROWDED, FREE, LOOK_EVERY_S, THREAD, Crowd, Neighbours
from pocketlm.training import saving
from pocketlm.training.log import Silent
from pocketlm.training.loop import train

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
OPERATIONS = 200
SLEEPS = f"""
import os, resource, time, torch
from pocketlm.neighbours import Crowd

def sleeps():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    for _ in range({OPERATIONS}):
        numbers.add_(1)
        until = time.perf_counter() + 3e-4
        while time.perf_counter() < until:
            pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before

def is_reached(most, least=0):  # threads come and go when they do
    return any(least <= sleeps() < most for _ in range(100))

torch.set_num_threads(len(os.sched_getaffinity(0)))
numbers = torch.zeros(1 << 17)
print(is_reached(most={OPERATIONS // 10}))
crowd = Crowd()
print(is_reached(most=1e9, least={OPERATIONS // 2}))
crowd.end()
print(is_reached(most={OPERATIONS // 10}))
"""


@LINUX
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one thread waits for no other")
def test_threads_sleep_soon_while_there_is_a_crowd() -> None:
    """They are told to look for ever; what lies between two operations is longer than 100 looks."""
    env = os.environ | {"GOMP_SPINCOUNT": "INFINITE"}
    run = subprocess.run([sys.executable, "-c", SLEEPS], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "True", "True"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """Lets seconds pass, in which the threads have waited for some."""
    now = {"at": 0.0, "1": 0, "2": 0}
    monkeypatch.setattr(neighbours.time, "monotonic", lambda: now["at"])
    monkeypatch.setattr(neighbours, "_waited_ns", lambda: {task: int(now[task]) for task in ("1", "2")})

    def passes(seconds: float, waited: float) -> None:
        now["at"] += seconds
        for task in ("1", "2"):
            now[task] += waited * 1e9 / 2

    return passes


def is_crowded() -> bool:
    return THREAD in {thread.name for thread in threading.enumerate()}


def test_a_crowd_stands_as_long_as_there_are_neighbours(clock: Callable[[float, float], None]) -> None:
    with Neighbours(threads=2) as there:
        seen = []
        for cores in (0.5 * CROWDED, 1.1 * CROWDED, 1.1 * FREE, 0.9 * FREE, 0.0, 1.0):
            clock(2.0, 2.0 * cores)
            there.look()
            seen.append(is_crowded())
        assert seen == [False, True, True, False, False, True]
        clock(0.9 * LOOK_EVERY_S, 0.0)
        there.look()
        assert is_crowded(), "so little time tells nothing"
    assert not is_crowded()


def test_one_thread_waits_for_no_other(clock: Callable[[float, float], None]) -> None:
    with Neighbours(threads=1) as there:
        clock(1.0, 1.0)
        there.look()
        assert not is_crowded()


def test_where_the_system_gives_no_thread_there_is_no_crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    crowd = Crowd()
    crowd.end()
    assert not is_crowded()


def test_where_the_system_gives_fewer_threads_than_libgomp_would_take_it_is_not_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would end the process."""
    started = list[threading.Thread]()
    start = threading.Thread.start

    def only_two(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(neighbours.torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(neighbours, "bound_cores", lambda: 4)
    monkeypatch.setattr(neighbours.torch, "zeros", lambda size: pytest.fail("it was asked"))
    with monkeypatch.context() as short:
        short.setattr(threading.Thread, "start", only_two)
        neighbours.sleep_soon()
    assert len(started) == 2
    assert not any(thread.is_alive() for thread in started)
    monkeypatch.setattr(neighbours, "bound_cores", lambda: 7)
    neighbours.sleep_soon()  # no more threads than cores: it would do nothing


def test_a_thread_that_ends_takes_nothing_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had waited in its life is not what the others have waited less; nor does a new one bring its life."""
    waited = [{"1": 0, "2": 10**12}, {"1": 10**9, "3": 10**12}, {"1": 2 * 10**9, "3": 10**12}]
    clock = iter(range(3))
    monkeypatch.setattr(neighbours, "_waited_ns", lambda: waited.pop(0))
    monkeypatch.setattr(neighbours.time, "monotonic", lambda: float(next(clock)))
    with Neighbours(threads=2) as there:
        for _ in range(2):
            there.look()
            assert is_crowded()


@pytest.fixture
def busy() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes for each core that do nothing but run."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(2 * bound_cores())]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@LINUX
def test_real_neighbours_are_seen_and_seen_to_leave(busy: list[subprocess.Popen[bytes]]) -> None:
    """What they take is what a thread that always runs does not get."""
    if not any(neighbours._waited_ns().values()):
        pytest.skip("this Linux tells no thread's waiting")
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            pass

    threading.Thread(target=run, daemon=True).start()
    deadline = time.monotonic() + 60
    try:
        with Neighbours(threads=2) as there:
            for crowded in (True, False):
                while is_crowded() != crowded:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                    there.look()
                for process in busy:
                    process.kill()
    finally:
        stop.set()


def test_linux_is_asked_for_each_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(neighbours, "TASKS", tmp_path / "none")
    assert neighbours._waited_ns() == {}
    monkeypatch.setattr(neighbours, "TASKS", tmp_path)
    for name, text in {"1": "5 2000000000 9\n", "2": "7 500000000 9\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(text)
    (tmp_path / "3").mkdir()
    assert neighbours._waited_ns() == {"1": 2 * 10**9, "2": 5 * 10**8}


# --- in a run

RUN = {"train.threads": 2, "train.total_steps": 3, "train.eval_every": 0, "sample.prompts": ()}


class Sees(Silent):
    """Whether there was a crowd at each record; and perhaps an error that ends the run there."""

    def __init__(self, *, raises: bool) -> None:
        self.seen = list[bool]()
        self.raises = raises

    def record(self, record: Any) -> None:
        self.seen.append(is_crowded())
        if self.raises and is_crowded():
            raise ZeroDivisionError


@pytest.mark.parametrize("raises", [False, True])
def test_a_run_looks_for_neighbours_until_it_ends(
    raises: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = count()
    monkeypatch.setattr(neighbours, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(neighbours, "_waited_ns", lambda: {"1": 10**12 * next(calls)})
    sees = Sees(raises=raises)
    with pytest.raises(ZeroDivisionError) if raises else contextlib.nullcontext():
        train(Config.preset("debug", RUN), out=tmp_path / "run", listener=sees)
    assert sees.seen[-1]
    assert not is_crowded()


def test_the_thread_of_a_save_lets_the_others_sleep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called_by = set[str]()
    monkeypatch.setattr(saving, "sleep_soon", lambda: called_by.add(threading.current_thread().name))
    train(Config.preset("debug", RUN), out=tmp_path / "run")
    assert called_by == {saving.THREAD}
