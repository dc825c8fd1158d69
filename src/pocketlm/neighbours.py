"""What else runs on a CPU's cores, and how PyTorch's threads wait for one another beside it.

At the end of each operation they wait for the slowest of them. GNU's OpenMP lets them look for it 300,000 times, some
milliseconds, before they sleep: best where each has a core. Where something else takes turns on a core, a thread that
only looks keeps its own from the one that it waits for: beside one busy process on two cores a step of `tiny` took 3.8
times as long, and 1.9 times where they slept at once (docs/performance-log.md).

They look 100 times only while there are more of them than cores (libgomp, `gomp_throttled_spin_count_var`). So a thread
that has some of its own, and lets them stand, is all it takes. Other OpenMP libraries, and one thread, are left as they
are; what is computed is the same.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

SPLIT = 1 << 17
"""Elements of an operation that PyTorch gives to all threads: it splits from 32,768 on."""
LOOK_EVERY_S = 0.5
CROWDED, FREE = 0.1, 0.03
"""Of the time of all threads, what they waited for a core: from where on there are neighbours, and where they left."""
TASKS = Path("/proc/self/task")
THREAD = "pocketlm-neighbour"


def sleep_soon() -> None:
    """Until the calling thread ends, threads that wait for one another sleep soon. Not for one that computes itself."""
    torch.zeros(SPLIT).add_(1)


class Neighbours:
    """Looks between steps whether threads of this process have to wait for a core, and lets them sleep soon if so."""

    def __init__(self, threads: int) -> None:
        """threads: that PyTorch computes with."""
        self._threads = threads
        self._last = time.monotonic(), _waited_s()
        self._crowd: Crowd | None = None

    def look(self) -> None:
        """Costs nothing but now and then a third of a millisecond."""
        now, (before, waited_before) = time.monotonic(), self._last
        if self._threads == 1 or now - before < LOOK_EVERY_S:
            return
        self._last = now, _waited_s()
        share = (self._last[1] - waited_before) / (now - before) / self._threads
        if self._crowd is None and share > CROWDED:
            self._crowd = Crowd()
        elif self._crowd and share < FREE:
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


def _waited_s() -> float:
    """How long the threads of this process could have run and had no core (Linux); else 0."""
    waited_ns = 0
    with contextlib.suppress(OSError):
        for task in TASKS.iterdir():
            with contextlib.suppress(OSError):  # it has just ended
                waited_ns += int((task / "schedstat").read_bytes().split()[1])
    return waited_ns / 1e9
