"""SIGKILL anywhere, any number of times: the run that is taken up again is the run that was never killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import oracle
import pytest
from aim import draw, fell, histogram, start, strike
from rig import Rig, Zygote, nobodys, shared_memory
from world import KEPT, STEPS, TRAIN, Whole


class Killer:
    """Kills runs and remembers where."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.aims, self.falls = Counter[str](), Counter[str]()

    def kill(self, rig: Rig, rng: random.Random) -> None:
        """Starts or goes on with the run in the rig's folder, and kills it."""
        aim = draw(rng, rig.folder / "run")
        child = start(rig, aim)
        strike(child, aim, self.seconds, signal.SIGKILL)
        assert child.wait() in (0, -signal.SIGKILL), child.stderr
        self.aims[aim.phase] += 1
        self.falls[fell(child, aim)] += 1

    def histogram(self) -> str:
        return f"{self.aims.total()} kills {histogram(self.aims, self.falls)}"


def complete(run: Path) -> bool:
    return oracle.steps(run)[-1:] == [STEPS]


@pytest.mark.goal("R1")
def test_killed_anywhere_it_goes_on_bit_for_bit(
    proof: Any, zygote: Zygote, tmp_path: Path, whole: Whole, seconds: dict[str, float]
) -> None:
    killer = Killer(seconds)
    for case in proof.cases(12, 100):
        folder = tmp_path / str(case)
        folder.mkdir()
        with Rig(zygote, folder) as rig:
            rng = proof.random(case)
            for _ in range(rng.choice((1, 1, 2, 3))):
                if not complete(folder / "run"):
                    killer.kill(rig, rng)
            rig.run(TRAIN)
        oracle.assert_equal(folder / "run", whole.run)
        assert len(oracle.steps(folder / "run")) <= KEPT + 1, "one more only where the last pruning was killed"
        shutil.rmtree(folder)
    proof.note(killer.histogram())


@pytest.mark.goal("R21")
def test_kills_leave_no_litter(proof: Any, rig: Rig, whole: Whole, seconds: dict[str, float]) -> None:
    memory = shared_memory()
    killer = Killer(seconds)
    for case in proof.cases(5, 50):
        killer.kill(rig, proof.random(case))  # which has seen its group of processes end
        if complete(rig.folder / "run"):
            shutil.rmtree(rig.folder / "run")
    rig.run(TRAIN, fresh=True)
    oracle.assert_equal(rig.folder / "run", whole.run)
    assert not list(rig.folder.rglob("*.tmp-*"))
    assert not nobodys(shared_memory() - memory)
    assert not list(rig.temporary.rglob("*"))
    assert sorted(path.name for path in rig.folder.iterdir()) == ["data", "output", "run", "tmp"]
    proof.note(killer.histogram())


@pytest.mark.goal("R21")
def test_a_second_run_in_the_folder_is_refused_and_harms_nothing(rig: Rig, whole: Whole) -> None:
    first = rig.start(TRAIN, holds=[("save", 2)])
    first.reach("save", 2)
    second = rig.run(TRAIN, code=3)
    assert f"run is in use by pid {first.pid} on {socket.gethostname()}" in second.stderr
    first.release()
    assert first.wait() == 0
    oracle.assert_equal(rig.folder / "run", whole.run)


@pytest.mark.goal("R21")
def test_what_a_dead_process_left_in_the_lock_blocks_nobody(rig: Rig, whole: Whole) -> None:
    dead = rig.start(TRAIN, holds=[("step", 8)])
    dead.reach("step", 8)
    dead.kill()
    dead.wait()
    lock = rig.folder / "run" / "run.lock"
    assert str(dead.pid) in lock.read_text()
    lock.write_text(f"pid {os.getpid()} on {socket.gethostname()}, which is alive and does not hold it\n")
    rig.run(TRAIN)
    oracle.assert_equal(rig.folder / "run", whole.run)
