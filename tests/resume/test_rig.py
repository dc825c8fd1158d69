"""The rig notices what it is there to notice."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
from pathlib import Path

import oracle
import pytest
from rig import Rig, left_of_group, nobodys, shared_memory
from world import STEPS, TRAIN, Whole


def test_what_hangs_is_ended_and_its_stacks_are_told(rig: Rig) -> None:
    child = rig.start(TRAIN, holds=[("step", 2)])
    child.reach("step", 2)
    with pytest.raises(AssertionError, match=r"not gone after 0\.1 s(.|\n)*in wait_if_held(.|\n)*in train"):
        child.wait(0.1)
    assert not left_of_group(child.pid)


@pytest.mark.parametrize(
    ("first", "limit_s", "said"),
    [("", 0.5, r"not gone after 0\.5 s"), ("os.closerange(3, 99); ", 20, "has left processes behind")],
    ids=["with the line", "without it"],
)
def test_a_process_that_is_left_behind_is_noticed(first: str, limit_s: float, said: str, rig: Rig) -> None:
    sleeper = f"""'import os, time; {first}time.sleep(1000)'"""
    child = rig.start(["--version"], fresh=True, shell=f'"$1" -c {sleeper} & exec "$@"')
    with pytest.raises(AssertionError, match=said):
        child.wait(limit_s)
    for pid in left_of_group(child.pid):
        os.kill(pid, signal.SIGKILL)


def test_a_place_that_is_never_reached_is_noticed(rig: Rig) -> None:
    child = rig.start(TRAIN, phases=["step"])
    with pytest.raises(AssertionError, match=f"never did: enter step {STEPS + 1}"):
        child.reach("step", STEPS + 1)
    assert child.wait() == 0


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm here")
def test_shared_memory_that_nobody_has_is_noticed(tmp_path: Path) -> None:
    path = Path("/dev/shm") / f"pocketlm-{tmp_path.name}-{tmp_path.stat().st_ino}"
    before = shared_memory()
    path.write_bytes(b"x" * mmap.PAGESIZE)
    try:
        assert path in nobodys(shared_memory() - before)
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0):
            assert path not in nobodys(shared_memory() - before)
    finally:
        path.unlink()


@pytest.mark.parametrize("damage", ["lost", "doubled", "changed"])
def test_another_journal_is_noticed(damage: str, whole: Whole, tmp_path: Path) -> None:
    run = shutil.copytree(whole.run, tmp_path / "run")
    oracle.assert_equal(run, whole.run)
    *before, line, last = (run / "metrics.jsonl").read_text().splitlines()
    other = json.dumps(json.loads(line) | {"step": STEPS + 1})
    lines = [*before, *{"lost": [], "doubled": [line, line], "changed": [other]}[damage], last]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(AssertionError, match=r"metrics\.jsonl"):
        oracle.assert_equal(run, whole.run)


def test_another_state_is_noticed(whole: Whole, tmp_path: Path) -> None:
    run = shutil.copytree(whole.run, tmp_path / "run")
    path = oracle.newest(run) / "training" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AssertionError, match=r"differs in \['training/optimizer\.safetensors:"):
        oracle.assert_equal(run, whole.run)
