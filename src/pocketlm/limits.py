"""What this process may take of the machine, where a control group (a container's limit is one) says how much.

The groups are read from /proc and /sys, of both versions and all the way up (man 7 cgroups). The functions with a
`root` read below it, and nothing else: tests give them invented machines.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def available_cores(root: Path = ROOT) -> int:
    """Cores that this process may use: those it is bound to, or fewer where a control group gives it less CPU time.

    So a container with the time of 2 CPUs on a machine of 64 has 2: of more threads all are stopped again and again.
    """
    return max(1, min([bound_cores(), *map(math.ceil, _cpus(root))]))


def bound_cores() -> int:
    """Cores that this process is bound to, whatever time a control group gives it on them; libgomp counts so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpus(root: Path) -> list[float]:
    """The CPU time of each group of this process that has a limit, in CPUs."""
    limits = [text_of(folder / "cpu.max") for folder in group_folders(root, "cgroup2", "cpu")]
    limits += [
        " ".join(text_of(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        for folder in group_folders(root, "cgroup", "cpu")
    ]
    words = (limit.split() for limit in limits)
    return [int(each[0]) / int(each[1]) for each in words if len(each) == 2 and each[0].isdecimal()]  # else "max", -1


def group_folders(root: Path, kind: str, controller: str) -> Iterator[Path]:
    """The folder of this process's control group and those above it, as far up as they are mounted.

    Args:
        kind: `cgroup2`, or `cgroup` for version 1 (both may be there).
        controller: what is limited, `memory` or `cpu`; in version 1 each has groups of its own.
    """
    for within, mount in _mounts(root, kind, controller):
        own = PurePosixPath(_own_group(root, kind, controller))
        # A container may see its own group as the root of the mount: then the path from the top does not lead there.
        below = own.relative_to(within) if own.is_relative_to(within) else PurePosixPath()
        folder = mount / below
        yield folder
        for _ in below.parts:
            folder = folder.parent
            yield folder


def _own_group(root: Path, kind: str, controller: str) -> str:
    """The path in /proc/self/cgroup: lines `0::/path` of version 2, `4:memory:/path` of version 1."""
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if (kind == "cgroup2" and not controllers) or (kind == "cgroup" and controller in controllers.split(",")):
            return path
    return "/"


def _mounts(root: Path, kind: str, controller: str) -> Iterator[tuple[str, Path]]:
    """(group at the top of the mount, where it is mounted): man 5 proc, /proc/[pid]/mountinfo."""
    for line in text_of(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        within, place = before.split()[3:5]
        type_, _, options = after.split(" ", 2)  # what was mounted may have no name
        if type_ == kind and (kind == "cgroup2" or controller in options.split(",")):
            yield within, root / place.lstrip("/")


def text_of(path: Path) -> str:
    """What a file of /proc or /sys says; nothing where the system has no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
