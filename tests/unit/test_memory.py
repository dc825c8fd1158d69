"""Available memory and cores on invented machines, each a folder with a /proc and a /sys; and the real one's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from pocketlm.limits import available_cores
from pocketlm.training.memory import available_bytes, available_here, peak_bytes

GB = 10**9
NAMELESS = "29 23 0:25 / /mnt rw - tmpfs  rw\n"  # of `mount -t tmpfs "" /mnt`
V2 = NAMELESS + "30 23 0:26 {within} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {within} /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
)


def machine(
    root: Path, *, free: int = 64 * GB, mounts: str = "", cgroup: str = "", groups: Mapping[str, Mapping[str, object]]
) -> Path:
    """A machine with `free` bytes and control groups: folder -> file -> content."""
    own = root / "proc" / "self"
    own.mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal:       99999999 kB\nMemAvailable:   {free // 1000 * 1000 // 1024} kB\n"
    )
    (own / "mountinfo").write_text(mounts)
    (own / "cgroup").write_text(cgroup)
    for folder, files in groups.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (root / folder / name).write_text(f"{content}\n")
    return root


def v2(limit: object, used: int, cache: int = 0, high: object = "max") -> dict[str, object]:
    stat = f"anon 5\nfile 9\ninactive_file {cache}\nactive_file 77"
    return {"memory.max": limit, "memory.high": high, "memory.current": used, "memory.stat": stat}


def v1(limit: int, used: int, cache: int = 0) -> dict[str, object]:
    stat = f"cache 9\ninactive_file 1\ntotal_inactive_file {cache}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


def test_without_control_groups_it_is_the_machines(tmp_path: Path) -> None:
    assert available_here(machine(tmp_path, free=8_192_000, groups={})) == 8_192_000


@pytest.mark.parametrize("own", ["/", "/a/b"])
def test_no_limit_is_none(own: str, tmp_path: Path) -> None:
    groups = {f"sys/fs/cgroup{own}": v2("max", 5 * GB)}
    root = machine(tmp_path, free=8_192_000, mounts=V2.format(within="/"), cgroup=f"0::{own}\n", groups=groups)
    assert available_here(root) == 8_192_000


def test_the_limit_of_ones_own_group(tmp_path: Path) -> None:
    groups = {"sys/fs/cgroup/job": v2(10 * GB, 4 * GB)}
    root = machine(tmp_path, mounts=V2.format(within="/"), cgroup="0::/job\n", groups=groups)
    assert available_here(root) == 6 * GB


def test_cached_files_count_as_free(tmp_path: Path) -> None:
    groups = {"sys/fs/cgroup/job": v2(10 * GB, 4 * GB, cache=3 * GB)}
    root = machine(tmp_path, mounts=V2.format(within="/"), cgroup="0::/job\n", groups=groups)
    assert available_here(root) == 9 * GB


def test_the_soft_limit_counts_where_it_is_lower(tmp_path: Path) -> None:
    groups = {"sys/fs/cgroup/job": v2(10 * GB, 4 * GB, high=5 * GB)}
    root = machine(tmp_path, mounts=V2.format(within="/"), cgroup="0::/job\n", groups=groups)
    assert available_here(root) == 1 * GB


@pytest.mark.parametrize("limited", ["slice", "slice/user", "slice/user/job", ""])
def test_the_tightest_of_all_parents_counts(limited: str, tmp_path: Path) -> None:
    folders = ["", "/slice", "/slice/user", "/slice/user/job"]
    tight = f"/{limited}" if limited else ""
    groups = {f"sys/fs/cgroup{each}": v2(3 * GB if each == tight else 40 * GB, 1 * GB) for each in folders}
    root = machine(tmp_path, mounts=V2.format(within="/"), cgroup="0::/slice/user/job\n", groups=groups)
    assert available_here(root) == 2 * GB


def test_a_sibling_does_not_count(tmp_path: Path) -> None:
    groups = {"sys/fs/cgroup/job": v2(9 * GB, 0), "sys/fs/cgroup/other": v2(1 * GB, 0)}
    root = machine(tmp_path, mounts=V2.format(within="/"), cgroup="0::/job\n", groups=groups)
    assert available_here(root) == 9 * GB


@pytest.mark.parametrize(
    ("within", "own"), [("/", "/"), ("/docker/1f", "/docker/1f"), ("/docker/1f", "/"), ("/", "/../..")]
)
def test_a_container_sees_its_group_at_the_top_of_the_mount(within: str, own: str, tmp_path: Path) -> None:
    groups = {"sys/fs/cgroup": v2(2 * GB, GB // 2)}
    root = machine(tmp_path, mounts=V2.format(within=within), cgroup=f"0::{own}\n", groups=groups)
    assert available_here(root) == 3 * GB // 2


def test_a_group_inside_a_container(tmp_path: Path) -> None:
    groups = {"sys/fs/cgroup/job": v2(2 * GB, GB)}
    root = machine(tmp_path, mounts=V2.format(within="/docker/1f"), cgroup="0::/docker/1f/job\n", groups=groups)
    assert available_here(root) == 1 * GB


def test_version_1(tmp_path: Path) -> None:
    unlimited = 9223372036854771712
    groups = {
        "sys/fs/cgroup/memory": v1(unlimited, 50 * GB),
        "sys/fs/cgroup/memory/batch": v1(8 * GB, 6 * GB, cache=1 * GB),
        "sys/fs/cgroup/memory/batch/job": v1(unlimited, 1 * GB),
        "sys/fs/cgroup/cpu,cpuacct/batch/job": v1(1, 0),
    }
    cgroup = "9:cpu,cpuacct:/batch/job\n4:memory:/batch/job\n0::/elsewhere\n"
    root = machine(tmp_path, mounts=V1.format(within="/"), cgroup=cgroup, groups=groups)
    assert available_here(root) == 3 * GB


def test_both_versions_at_once(tmp_path: Path) -> None:
    groups = {"sys/fs/cgroup/memory/job": v1(8 * GB, 0), "sys/fs/cgroup/job": v2(5 * GB, 0)}
    mounts = V1.format(within="/") + V2.format(within="/")
    root = machine(tmp_path, mounts=mounts, cgroup="4:memory:/job\n0::/job\n", groups=groups)
    assert available_here(root) == 5 * GB


def test_the_limit_of_address_space(tmp_path: Path) -> None:
    root = machine(tmp_path, groups={})
    head = "Limit                     Soft Limit           Hard Limit           Units\n"
    line = "Max address space         {:<21}unlimited            bytes\n"
    (root / "proc/self/status").write_text("VmPeak:\t 9999999 kB\nVmSize:\t 1000000 kB\n")
    (root / "proc/self/limits").write_text(head + line.format("unlimited"))
    assert available_here(root) > 60 * GB
    (root / "proc/self/limits").write_text(head + line.format(3_000_000 * 1024))
    assert available_here(root) == 2_000_000 * 1024


def test_more_taken_than_allowed_is_nothing_left(tmp_path: Path) -> None:
    groups = {"sys/fs/cgroup/job": v2(GB, 2 * GB)}
    root = machine(tmp_path, mounts=V2.format(within="/"), cgroup="0::/job\n", groups=groups)
    assert available_here(root) == 0


def cpu(quota: object) -> dict[str, object]:
    return {"cpu.max": f"{quota} 100000"}


def cpu_v1(quota: int) -> dict[str, object]:
    return {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": 50_000}


@pytest.mark.parametrize(
    ("groups", "cores"),
    [
        ({}, 64),
        ({"sys/fs/cgroup/a/b": cpu("max")}, 64),
        ({"sys/fs/cgroup/a/b": cpu(200_000)}, 2),
        ({"sys/fs/cgroup/a/b": cpu(150_000)}, 2),
        ({"sys/fs/cgroup/a/b": cpu(10_000)}, 1),
        ({"sys/fs/cgroup/a/b": cpu(9_900_000)}, 64),
        ({"sys/fs/cgroup/a/b": cpu("max"), "sys/fs/cgroup/a": cpu(300_000), "sys/fs/cgroup/c": cpu(100_000)}, 3),
        ({"sys/fs/cgroup/cpu,cpuacct/b": cpu_v1(-1)}, 64),
        ({"sys/fs/cgroup/cpu,cpuacct/b": cpu_v1(250_000)}, 5),
        ({"sys/fs/cgroup/cpu,cpuacct/b": cpu_v1(250_000), "sys/fs/cgroup": cpu(400_000)}, 4),
    ],
)
def test_threads_are_no_more_than_the_cpu_time_that_groups_give(
    groups: Mapping[str, Mapping[str, object]], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)  # macOS has none
    mounts = V1.format(within="/") + V2.format(within="/")
    cgroup = "9:cpu,cpuacct:/b\n4:memory:/m\n0::/a/b\n"
    assert available_cores(machine(tmp_path, mounts=mounts, cgroup=cgroup, groups=groups)) == cores


def test_of_the_real_machine_something_is_left() -> None:
    cpu = torch.device("cpu")
    assert 0 < available_bytes(cpu) < 2**50
    before = peak_bytes(cpu)
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_bytes(cpu) >= before
    assert peak_bytes(cpu) >= block.nbytes
