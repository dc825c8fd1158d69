"""Where a run is to be struck: the phase is drawn first, then which of those that are left, then the instant in it.

A uniformly random instant would almost always fall into a step, and almost never between two files of a checkpoint.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import oracle
from rig import Child, Rig
from world import EVERY, PHASES, STEPS, TRAIN

WEIGHTS = {"start-up": 10, "step": 30, "evaluation": 15, "save": 35, "prune": 10}


@dataclass(frozen=True)
class Aim:
    """A share of the time that the nth of a phase typically takes."""

    phase: str
    occurrence: int
    share: float


def draw(rng: random.Random, run: Path) -> Aim:
    """An aim in what the next process has left to do.

    Only the prunings that remove something are drawn: those after the second checkpoint.
    """
    (phase,) = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
    found = oracle.steps(run)
    left = STEPS - (found[-1] if found else 0)
    first = max(1, 3 - len(found)) if phase == "prune" else 1
    return Aim(phase, rng.randint(first, left if phase == "step" else -(-left // EVERY)), rng.random())


def start(rig: Rig, aim: Aim, python: Sequence[str] = ()) -> Child:
    """A new Python where its start-up is aimed at, else a fork that says where it is."""
    if aim.phase == "start-up":
        return rig.start(TRAIN, fresh=True, python=python)
    return rig.start(TRAIN, phases=PHASES, holds=[(aim.phase, aim.occurrence)])


def strike(child: Child, aim: Aim, seconds: Mapping[str, float], number: int) -> None:
    """Sends the signal at the instant aimed at."""
    if aim.phase != "start-up":
        child.reach(aim.phase, aim.occurrence)
        child.release()  # held at the door: on a busy machine it would be through before that is known here
    child.listen(aim.share * seconds[aim.phase])
    child.kill(number)


def fell(child: Child, aim: Aim) -> str:
    """Where it was struck, `step + save` if a save was beside a step.

    A new Python tells only by its lines: the first one of a step stands after its start-up.
    """
    if aim.phase == "start-up":
        return "later" if has_stepped(child.stderr_when_struck) else "start-up"
    main, beside = (child.inside(thread)[-1:] for thread in ("main", "beside"))
    return " + ".join([*(main or ["between"]), *beside])


def start_up_seconds(rig: Rig) -> float:
    """What a new Python takes to come to the end of its first step."""
    started_at = time.monotonic()
    child = rig.start(TRAIN, fresh=True)
    child.wait_for_output(has_stepped)
    child.kill()
    child.wait()
    return child.struck_at - started_at


def has_stepped(text: str) -> bool:
    return "\nstep " in text


def histogram(aims: Counter[str], falls: Counter[str]) -> str:
    """`fell in (aimed at): step 31 (30), ...`"""
    order = [*WEIGHTS, "sample", "between", "later"]
    places = sorted(aims | falls, key=lambda place: [order.index(part) for part in place.split(" + ")])
    return "fell in (aimed at): " + ", ".join(f"{place} {falls[place]} ({aims[place]})" for place in places)
