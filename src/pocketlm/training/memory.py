"""How much memory there still is, and how much this process has taken.

On a CPU nothing raises when memory runs out: the kernel kills. So what is left is read beforehand, from everything that
sets a bound: the machine, each control group on the way up from this process (a container's limit is one), and the
process's own limit of address space. Cached files count as free where the kernel drops them on demand.

The functions with a `root` read /proc and /sys below it, and nothing else: tests give them invented machines.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from pocketlm.limits import ROOT, group_folders, text_of

COUNTED = ("cuda", "xpu")
"""Devices with memory of their own, whose peak PyTorch counts."""
V2_LIMITS = ("memory.max", "memory.high")
V1_LIMITS = ("memory.limit_in_bytes",)


def available_bytes(device: torch.device) -> int:
    """Bytes that this process can still take on a device."""
    if device.type in COUNTED:
        gpu = torch.get_device_module(device)
        free, _ = gpu.mem_get_info(device)
        return int(free + gpu.memory_reserved(device) - gpu.memory_allocated(device))
    here = available_here(ROOT)
    if device.type == "mps":  # the machine's memory, of which Metal recommends to take no more than a share
        return max(0, min(here, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()))
    return here


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held so far: allocated on a GPU, resident on a CPU."""
    if device.type in COUNTED:
        return int(torch.get_device_module(device).max_memory_allocated(device))
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # what it has cached counts, so it seldom shrinks
    if peak := _kilobytes(ROOT / "proc/self/status", "VmHWM:"):
        return peak
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) of each
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak(device: torch.device) -> None:
    """Begins the count anew, where that can be done: on a GPU that counts. A process's own peak stays."""
    if device.type in COUNTED:
        torch.get_device_module(device).reset_peak_memory_stats(device)


def available_here(root: Path) -> int:
    """Bytes of main memory that this process can still take: the least of all bounds below `root`."""
    machine = _kilobytes(root / "proc/meminfo", "MemAvailable:") or psutil.virtual_memory().available
    bounds = [machine, *_control_groups(root), *_address_space(root)]
    return max(0, min(bounds))


def _control_groups(root: Path) -> Iterator[int]:
    """What is left in each control group of this process that has a limit, its parents' too."""
    for folder in group_folders(root, "cgroup2", "memory"):
        yield from _left_in(folder, V2_LIMITS, "memory.current", "inactive_file")
    for folder in group_folders(root, "cgroup", "memory"):
        yield from _left_in(folder, V1_LIMITS, "memory.usage_in_bytes", "total_inactive_file")


def _left_in(folder: Path, limits: tuple[str, ...], used: str, cache: str) -> Iterator[int]:
    if not (used_text := text_of(folder / used).strip()).isdecimal():
        return
    dropped_on_demand = _words(text_of(folder / "memory.stat")).get(cache, "0")
    for name in limits:
        if (limit := text_of(folder / name).strip()).isdecimal():  # "max" is none
            yield int(limit) - int(used_text) + int(dropped_on_demand)


def _address_space(root: Path) -> Iterator[int]:
    """What RLIMIT_AS leaves."""
    for line in text_of(root / "proc/self/limits").splitlines():
        if line.startswith("Max address space") and (soft := line.split()[3]).isdecimal():
            yield int(soft) - _kilobytes(root / "proc/self/status", "VmSize:")


def _kilobytes(path: Path, name: str) -> int:
    """Bytes of a line `name  1234 kB`; 0 where there is none."""
    return 1024 * int(_words(text_of(path)).get(name, "0 kB").split()[0])


def _words(text: str) -> Mapping[str, str]:
    """Lines as first word to the rest."""
    return {first: rest for first, _, rest in (line.partition(" ") for line in text.replace("\t", " ").splitlines())}
