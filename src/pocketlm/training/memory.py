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
from pathlib import Path, PurePosixPath

import psutil  # type: ignore[import-untyped]
import torch

ROOT = Path("/")
V2_LIMITS = ("memory.max", "memory.high")
V1_LIMITS = ("memory.limit_in_bytes",)


def available_bytes(device: torch.device) -> int:
    """Bytes that this process can still take on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return available_here(ROOT)


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if peak := _kilobytes(ROOT / "proc/self/status", "VmHWM:"):
        return peak
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) of each
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak(device: torch.device) -> None:
    """Begins the count anew, where that can be done: on a GPU. A process's own peak stays."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def available_here(root: Path) -> int:
    """Bytes of main memory that this process can still take: the least of all bounds below `root`."""
    machine = _kilobytes(root / "proc/meminfo", "MemAvailable:") or psutil.virtual_memory().available
    bounds = [machine, *_control_groups(root), *_address_space(root)]
    return max(0, min(bounds))


def _control_groups(root: Path) -> Iterator[int]:
    """What is left in each control group of this process that has a limit, its parents' too."""
    for folder in _group_folders(root, "cgroup2"):
        yield from _left_in(folder, V2_LIMITS, "memory.current", "inactive_file")
    for folder in _group_folders(root, "cgroup"):
        yield from _left_in(folder, V1_LIMITS, "memory.usage_in_bytes", "total_inactive_file")


def _left_in(folder: Path, limits: tuple[str, ...], used: str, cache: str) -> Iterator[int]:
    if not (used_text := _text(folder / used).strip()).isdecimal():
        return
    dropped_on_demand = _words(_text(folder / "memory.stat")).get(cache, "0")
    for name in limits:
        if (limit := _text(folder / name).strip()).isdecimal():  # "max" is none
            yield int(limit) - int(used_text) + int(dropped_on_demand)


def _group_folders(root: Path, kind: str) -> Iterator[Path]:
    """The folder of this process's memory control group and those above it, as far up as they are mounted.

    Args:
        kind: `cgroup2`, or `cgroup` for version 1 (both may be there: man 7 cgroups).
    """
    for within, mount in _mounts(root, kind):
        own = PurePosixPath(_own_group(root, kind))
        # A container may see its own group as the root of the mount: then the path from the top does not lead there.
        below = own.relative_to(within) if own.is_relative_to(within) else PurePosixPath()
        folder = mount / below
        yield folder
        for _ in below.parts:
            folder = folder.parent
            yield folder


def _own_group(root: Path, kind: str) -> str:
    """The path in /proc/self/cgroup: lines `0::/path` of version 2, `4:memory:/path` of version 1."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if (kind == "cgroup2" and not controllers) or (kind == "cgroup" and "memory" in controllers.split(",")):
            return path
    return "/"


def _mounts(root: Path, kind: str) -> Iterator[tuple[str, Path]]:
    """(group at the top of the mount, where it is mounted): man 5 proc, /proc/[pid]/mountinfo."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        within, place = before.split()[3:5]
        type_, _, options = after.split(maxsplit=2)
        if type_ == kind and (kind == "cgroup2" or "memory" in options.split(",")):
            yield within, root / place.lstrip("/")


def _address_space(root: Path) -> Iterator[int]:
    """What RLIMIT_AS leaves."""
    for line in _text(root / "proc/self/limits").splitlines():
        if line.startswith("Max address space") and (soft := line.split()[3]).isdecimal():
            yield int(soft) - _kilobytes(root / "proc/self/status", "VmSize:")


def _kilobytes(path: Path, name: str) -> int:
    """Bytes of a line `name  1234 kB`; 0 where there is none."""
    return 1024 * int(_words(_text(path)).get(name, "0 kB").split()[0])


def _words(text: str) -> Mapping[str, str]:
    """Lines as first word to the rest."""
    return {first: rest for first, _, rest in (line.partition(" ") for line in text.replace("\t", " ").splitlines())}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # no such limit on this system
        return ""
