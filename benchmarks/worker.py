"""A contestant in a process of its own: prepared once, then stepped one optimizer step at a time by the driver.

    driver                          worker
    start                  ->       builds its model                     Ready
    Go                     ->       one optimizer step                   Step
    ...
    the pipe is closed     ->       leaves

The clock runs from "go" to the end of the step and to nothing else, so what a contestant does between two of its
steps (reading a batch, a scheduler) is inside. It runs in the worker: the pipe is outside.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
MIB = 1024.0


@dataclass(frozen=True)
class Task:
    """What all contestants of a table share."""

    preset: str
    rows: int
    context: int
    threads: int
    dataset: Path
    """A prepared data set, that pocketlm's own loader reads."""
    batches: Path
    """The same rows in the same order for the others: (steps, rows, context + 1) int32."""

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.rows * self.context


@dataclass(frozen=True)
class Ready:
    """A contestant that has built its model."""

    parameters: int
    flops_per_token: float


@dataclass(frozen=True)
class Step:
    """One optimizer step as it was measured."""

    seconds: float
    """By the clock on the wall."""
    cpu_s: float
    """Of all threads of this process."""
    foreign: float
    """CPUs that others used meanwhile, stolen time included."""
    loss: float
    peak_mib: float
    """The largest resident size of the process so far."""


class Finished(Exception):
    """The driver needs no more steps."""


class Boundary:
    """Where a contestant waits between two steps: it calls this object with the loss of the step it has just made."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def ready(self, parameters: int, flops_per_token: float) -> None:
        """The model is built; returns when the first step is wanted."""
        self.pipe.send(Ready(parameters, flops_per_token))
        self._wait()

    def __call__(self, loss: float) -> None:
        """A step is over; returns when the next is wanted.

        Raises:
            Finished: none is.
        """
        seconds, cpu_s = time.perf_counter() - self.began_at, time.process_time() - self.cpu_began_s
        foreign = (busy_s() - self.busy_began_s - cpu_s) / seconds
        self.pipe.send(Step(seconds, cpu_s, max(0.0, foreign), loss, peak_mib()))
        self._wait()

    def _wait(self) -> None:
        try:
            self.pipe.recv()
        except EOFError:
            raise Finished from None
        self.busy_began_s, self.cpu_began_s, self.began_at = busy_s(), time.process_time(), time.perf_counter()


def work(name: str, task: Task, pipe: Connection) -> None:
    """Runs in the worker process."""
    from contestants import PEERS  # here, so that the driver need not import any framework

    peer, _, rest = name.partition("+")
    flags = set(rest.split("+")) - {""}
    if "malloc" in flags:
        keep_freed_memory()
    import torch

    torch.set_num_threads(task.threads)
    warnings.simplefilter("ignore")  # what peers say of a data loader or an interface is not the subject
    with contextlib.suppress(Finished, BrokenPipeError):
        PEERS[peer](task, flags - {"malloc"}, Boundary(pipe))


def keep_freed_memory() -> None:
    """The setting that pocketlm makes for itself (`pocketlm.machine`), for a peer: before its first tensor."""
    assert platform.libc_ver()[0] == "glibc"
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def busy_s() -> float:
    """Seconds that all CPUs of this machine have worked, or were kept from us: all of `man proc_stat` but the idle."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def peak_mib() -> float:
    """VmHWM."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / MIB
