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

from pocketlm import __version__, devices
from pocketlm.config import TrainConfig
from pocketlm.distributed import ALONE, Ranks
from pocketlm.errors import UsageError
from pocketlm.field_types import Determinism
from pocketlm.limits import ROOT, available_cores

NVIDIA_FILES = ("dev/nvidia0", "usr/lib/wsl/lib/libcuda.so.1")  # the driver's, on Linux and in WSL2
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h

PROMISES: dict[Determinism, str] = {
    "bitwise": "a resumed run, and a second one with the same resolved.toml, are equal bit for bit on this machine",
    "same-data": "the same data in the same order; a second run may differ in the last bits",
    "off": "the same data in the same order; threads and kernels as they are fastest at each start",
}


BITWISE_ON = ("cpu", "cuda")
"""On no other device was PyTorch's deterministic mode held against the promise."""
RANKS_ON = ("cpu", "cuda")
"""What the backends of `distributed.join` reach."""


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
    device = default_device(train.device)
    if not ranks.alone and device.type not in RANKS_ON:
        raise UsageError(f"several ranks compute on {' or '.join(RANKS_ON)}, not on {device.type}: add --device cpu")
    if device.type == "cuda" and not ranks.alone:
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    auto: Determinism = "bitwise" if device.type == "cpu" else "same-data"
    determinism = begun_with or (auto if train.determinism == "auto" else train.determinism)
    if device.type not in BITWISE_ON:  # of a run that was begun elsewhere; a new one that asks for it is refused
        determinism = auto if determinism == "bitwise" else determinism
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


def default_device(wanted: str = "auto") -> torch.device:
    """The device that is asked for; by default a GPU if there is one, else the CPU.

    Raises:
        UsageError: it is not here.
    """
    here = devices.present()
    if wanted != "auto" and wanted not in here:
        raise UsageError(f"device: given {wanted}, which is not here; allowed is auto, {', '.join(here)}")
    device = torch.device(here[0] if wanted == "auto" else wanted)
    devices.claim(device)
    return device


def hold_threads() -> None:
    """For what no configuration says the threads of: PyTorch counts cores, and not the CPU time that a group gives."""
    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))


def omp_threads() -> int | None:
    """What OMP_NUM_THREADS asks for; None where it does not, or where torchrun has set it for each of its processes."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and "WORLD_SIZE" not in os.environ else None


def has_nvidia(root: Path = ROOT) -> bool:
    """Whether a GPU of NVIDIA is in the machine, usable or not, that CUDA_VISIBLE_DEVICES does not hide."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any((root / file).exists() for file in NVIDIA_FILES)


def versions() -> dict[str, str]:
    """What bit-exact arithmetic rests on beside the state."""
    return {
        "pocketlm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": f"{cpu_name()}, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "gpu": _gpu(),
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
    """The one that is in use, and the libraries that compute on it."""
    kind = next(iter(devices.in_use()), None)
    if kind is None:
        return "none"
    name = devices.gpu_name(torch.device(kind))
    if kind != "cuda":
        return f"{name}, {platform.platform() if kind == 'mps' else torch.version.xpu}"
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return f"{name}, CUDA {torch.version.cuda}, cuDNN {cudnn}"
