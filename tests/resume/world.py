"""The run that most tests of this folder stop or kill, small enough for hundreds of them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import oracle
from rig import Child, Rig, flags

# Two micro-batches a step; of 1,812 rows 32 a step, so that an epoch ends inside step 57; what is due is due often.
FIELDS = {"train.tokens_per_step": 1024, "train.micro_batch": 16, "sample.every": 10, "sample.max_new_tokens": 16}
TRAIN = ["train", "debug", "--out", "run", *flags(FIELDS)]
STEPS, EVERY, MICRO_BATCHES = 60, 5, 2
KEPT = 3  # the last two and the best
PHASES = ("step", "evaluation", "sample", "save", "prune")


@dataclass(frozen=True)
class Whole:
    """The uninterrupted run, and how long each phase of it typically took."""

    run: Path
    seconds: dict[str, float]


def run_whole(rig: Rig) -> Whole:
    """Trains it, and sees that it is what the tests take it for."""
    child = rig.run(TRAIN, phases=PHASES)
    run = rig.folder / "run"
    records = oracle.journal(run)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if r["kind"] == "eval"] == list(range(EVERY, STEPS + 1, EVERY))
    assert [r["step"] for r in records if r["kind"] == "sample"] == list(range(10, STEPS + 1, 10))
    assert records[0]["loss"] > records[-3]["loss"] + 1, "it learns nothing: the states may not differ"
    assert len(oracle.steps(run)) <= KEPT, "nothing was pruned"
    return Whole(run, _seconds(child))


def _seconds(child: Child) -> dict[str, float]:
    """The median of each phase, which must have come as often as it was due."""
    lasted, entered = defaultdict[str, list[float]](list), dict[str, float]()
    for event in child.events:
        if event.what == "enter":
            entered[event.phase] = event.at
        else:
            lasted[event.phase].append(event.at - entered[event.phase])
    due = STEPS // EVERY
    times = {"step": STEPS, "evaluation": due, "sample": STEPS // 10, "save": due, "prune": due}
    too_few = {phase: len(lasted[phase]) for phase in times if len(lasted[phase]) < times[phase]}
    assert not too_few, "no longer called through the names that zygote.PHASES has"
    return {phase: median(seconds) for phase, seconds in lasted.items()}


def trained(run: Path) -> int:
    """The last step that the journal tells of; 0 before the first."""
    if not (run / "metrics.jsonl").exists():
        return 0
    return max((record["step"] for record in oracle.journal(run) if record["kind"] == "train"), default=0)
