"""Where a run computes: device, threads, and what is promised of its determinism.

A process computes on one device. What several of them say to one another is in distributed.py.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from pocketlm import __version__
from pocketlm.config import TrainConfig
from pocketlm.distributed import ALONE, Ranks
from pocketlm.field_types import Determinism
from pocketlm.limits import available_cores

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h

PROMISES: dict[Determinism, str] = {
    "bitwise": "a resumed run, and a second one with the same resolved.toml, are equal bit for bit on this machine",
    "same-data": "the same data in the same order; a second run may differ in the last bits",
    "off": "the same data in the same order; threads and kernels as they are fastest at each start",
}


@dataclass(frozen=True)
class Runtime:
    """Where a run computes, decided once at its start."""

    device: torch.device
    threads: int
    determinism: Determinism
    ranks: int = 1
    """Processes of the run, of which each is on a device."""
    ranks_here: int = 1
    """Those on this machine."""


def start(train: TrainConfig, begun_with: Determinism | None = None, ranks: Ranks = ALONE) -> Runtime:
    """Sets device, threads and determinism for this process.

    `bitwise` holds for a number of threads fixed at the start; the number is part of the run's resolved settings.

    Args:
        begun_with: the level of a run that goes on; by default the one that is asked for, `auto` resolved.
        ranks: each takes the device of its number here, and its share of the cores.
    """
    keep_freed_memory()
    device = default_device()
    if device.type == "cuda" and not ranks.alone:
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    auto: Determinism = "bitwise" if device.type == "cpu" else "same-data"
    determinism = begun_with or (auto if train.determinism == "auto" else train.determinism)
    if determinism == "bitwise":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with a fixed workspace
    threads = max(1, available_cores() // ranks.local_size) if train.threads == "auto" else train.threads
    torch.set_num_threads(threads)
    # The same as use_deterministic_algorithms, without its import of PyTorch's compiler: a second.
    torch.set_deterministic_debug_mode("error" if determinism == "bitwise" else "default")
    torch.backends.cudnn.benchmark = determinism == "off"  # tries kernels, and takes the fastest of the day
    # Deterministic mode would also fill every fresh tensor with NaN: a debugging aid that costs a pass over memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return Runtime(device, threads, determinism, ranks.size, ranks.local_size)


def keep_freed_memory() -> None:
    """Tells glibc to keep the memory that tensors free: 15 % more tokens/s for `tiny`. Other C libraries: nothing.

    By default glibc maps every block above 32 MiB anew and gives the top of the heap back, so that the kernel clears
    the same pages again at each step (`man mallopt`).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def keep_threads(runtime: Runtime, threads: int) -> Runtime:
    """The same, with the number of threads that the run began with: sums are split by it. `off` takes today's."""
    if runtime.determinism == "off":
        return runtime
    torch.set_num_threads(threads)
    return replace(runtime, threads=threads)


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def versions() -> dict[str, str]:
    """What bit-exact arithmetic rests on beside the state."""
    return {
        "pocketlm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": f"{cpu_name()}, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "gpu": _gpu() if torch.cuda.is_available() else "none",
    }


def changes(then: Mapping[str, object], device: torch.device) -> list[str]:
    """What is not as it was where a run began, one phrase each.

    Args:
        then: its `versions()`, and its device's type as "device".
    """
    now = versions() | {"device": device.type}
    return [f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]


@cache
def cpu_name() -> str:
    """What the CPU calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _gpu() -> str:
    """The first one, and the libraries that compute on it."""
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {cudnn}"
