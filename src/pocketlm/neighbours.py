"""What else runs on a CPU's cores, and how PyTorch's threads wait for one another beside it.

At the end of each operation they wait for the slowest of them. GNU's OpenMP lets them look for it 300,000 times, some
milliseconds, before they sleep: best where each has a core. Where something else takes turns on a core, a thread that
only looks keeps its own from the one that it waits for: beside one busy process on two cores a step of `tiny` took
three to four times as long, and 1.9 times where they slept soon (docs/performance-log.md).

They look 100 times only while there are more of them than cores (libgomp, `gomp_throttled_spin_count_var`). So a thread
that has some of its own, and lets them stand, is all it takes. Other OpenMP libraries, and runs with threads for less
than half of the cores, are left as they are; what is computed is the same.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from pocketlm.limits import bound_cores

SPLIT = 1 << 17
"""Elements of an operation that PyTorch gives to all threads: it splits from 32,768 on."""
LOOK_EVERY_S = 0.5
CROWDED, FREE = 0.2, 0.1
"""Cores that threads would have taken and did not get: from where on there are neighbours, and where they have left."""
TASKS = Path("/proc/self/task")
THREAD = "pocketlm-neighbour"


def sleep_soon() -> None:
    """Until the calling thread ends, threads that wait for one another sleep soon. Not for one that computes itself.

    libgomp ends the process where the system gives it no threads: so as many are tried before.
    """
    num = torch.get_num_threads()
    if 2 * num - 1 > bound_cores() and _can_start(num - 1):
        torch.zeros(SPLIT).add_(1)


class Neighbours:
    """Looks between steps whether threads of this process have to wait for a core, and lets them sleep soon if so."""

    def __init__(self, threads: int) -> None:
        """threads: that PyTorch computes with."""
        self._threads = threads
        self._last = time.monotonic(), _waited_ns()
        self._crowd: Crowd | None = None

    def look(self) -> None:
        """Costs nothing but now and then a third of a millisecond."""
        now, (before, waited_before) = time.monotonic(), self._last
        if self._threads == 1 or now - before < LOOK_EVERY_S:
            return
        self._last = now, _waited_ns()
        more_ns = (waited - waited_before.get(task, waited) for task, waited in self._last[1].items())
        lacking = sum(more_ns) / 1e9 / (now - before)
        if self._crowd is None and lacking > CROWDED:
            self._crowd = Crowd()
        elif self._crowd and lacking < FREE:
            self._leave()

    def _leave(self) -> None:
        if self._crowd:
            self._crowd.end()
            self._crowd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()


class Crowd:
    """A thread that stands there with threads of its own, until its end."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._stand, name=THREAD, daemon=True)
        with contextlib.suppress(RuntimeError):  # the system gives none
            self._thread.start()

    def _stand(self) -> None:
        sleep_soon()
        self._ended.wait()

    def end(self) -> None:
        self._ended.set()
        if self._thread.ident:
            self._thread.join()


def _waited_ns() -> Mapping[str, int]:
    """How long each thread of this process could have run, and had no core (Linux: scheduler/sched-stats)."""
    waited = dict[str, int]()
    with contextlib.suppress(OSError):
        for task in TASKS.iterdir():
            with contextlib.suppress(OSError):  # it has just ended
                waited[task.name] = int((task / "schedstat").read_bytes().split()[1])
    return waited


def _can_start(number: int) -> bool:
    """Whether the system gives so many threads more."""
    go = threading.Event()
    threads = [threading.Thread(target=go.wait, daemon=True) for _ in range(number)]
    try:
        for thread in threads:
            thread.start()
    except RuntimeError:
        return False
    finally:
        go.set()
        for thread in threads:
            if thread.ident:
                thread.join()
    return True
