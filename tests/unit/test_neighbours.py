"""How threads wait for one another beside others, by what Linux counts: how often each has slept, and waited."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pocketlm import neighbours
from pocketlm.neighbours import CROWDED, FREE, LOOK_EVERY_S, THREAD, Crowd, Neighbours

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
    now = {"at": 0.0, "waited": 0.0}
    monkeypatch.setattr(neighbours.time, "monotonic", lambda: now["at"])
    monkeypatch.setattr(neighbours, "_waited_s", lambda: now["waited"])

    def passes(seconds: float, waited: float) -> None:
        now["at"] += seconds
        now["waited"] += waited

    return passes


def is_crowded() -> bool:
    return THREAD in {thread.name for thread in threading.enumerate()}


def test_a_crowd_stands_as_long_as_there_are_neighbours(clock: Callable[[float, float], None]) -> None:
    with Neighbours(threads=2) as there:
        seen = []
        for share in (0.5 * CROWDED, 1.1 * CROWDED, 1.1 * FREE, 0.9 * FREE, 0.0, 1.0):
            clock(1.0, 2 * share)
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


@pytest.fixture
def busy() -> Iterator[None]:
    """Two processes for each core that do nothing but run."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(2 * len(os.sched_getaffinity(0)))]
    yield
    for process in processes:
        process.kill()
        process.wait()


@LINUX
@pytest.mark.usefixtures("busy")
def test_real_neighbours_are_seen() -> None:
    """What they take is what a thread that always runs does not get."""
    stop = threading.Event()
    runs = threading.Thread(target=lambda: [None for _ in iter(stop.is_set, True)])
    runs.start()
    with Neighbours(threads=2) as there:
        while not is_crowded():
            time.sleep(0.05)
            there.look()
    stop.set()
    runs.join()


def test_where_linux_tells_nothing_nobody_has_waited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(neighbours, "TASKS", tmp_path / "none")
    assert neighbours._waited_s() == 0
    monkeypatch.setattr(neighbours, "TASKS", tmp_path)
    for name, text in {"1": "5 2000000000 9\n", "2": "7 500000000 9\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(text)
    (tmp_path / "3").mkdir()
    assert neighbours._waited_s() == 2.5
