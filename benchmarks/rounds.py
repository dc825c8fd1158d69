"""Rounds: every contestant makes one step in turn, in an order drawn anew each time, while the others wait.

A step is clean when other processes took less than `QUIET` CPUs meanwhile; a ratio counts only rounds in which both of
a pair were clean. So the two figures of a ratio are seconds apart, on a machine that was idle but for them.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from worker import Ready, Step, Task, work

Say = Callable[[str], None]

QUIET = 0.15  # CPUs
SETTLE_S = 0.05  # GNU OpenMP's threads spin for some milliseconds after a parallel region (OMP_WAIT_POLICY)
WARM_UP_STEPS = 3
START_S = 1200  # compiling a whole model takes minutes


@dataclass(frozen=True)
class Measure:
    """What counts as a step's time."""

    by_cpu: bool
    """CPU seconds, which the scheduler cannot touch: for one thread on a busy machine. Then every step is clean."""

    def seconds(self, step: Step) -> float:
        return step.cpu_s if self.by_cpu else step.seconds

    def clean(self, step: Step) -> bool:
        return self.by_cpu or step.foreign < QUIET


@dataclass
class Contestant:
    """A worker, and what it has measured."""

    name: str
    pipe: Connection
    ready: Ready
    warm_up: list[Step] = field(default_factory=list)
    rounds: list[Step] = field(default_factory=list)

    @property
    def is_ours(self) -> bool:
        return self.name.partition("+")[0] == "pocketlm"

    @property
    def peak_mib(self) -> float:
        return max(step.peak_mib for step in self.warm_up + self.rounds)

    def step(self) -> Step:
        time.sleep(SETTLE_S)
        self.pipe.send("go")
        return receive(self.name, self.pipe, Step)


@dataclass(frozen=True)
class Summary:
    """A median with its spread."""

    median: float
    least: float
    most: float
    count: int


def summary(values: Sequence[float]) -> Summary:
    return Summary(statistics.median(values), min(values), max(values), len(values))


def clean_times(contestant: Contestant, measure: Measure) -> list[float]:
    """Seconds of the clean steps."""
    return [measure.seconds(step) for step in contestant.rounds if measure.clean(step)]


def ratios(ours: Contestant, peer: Contestant, measure: Measure) -> list[float]:
    """How many times as fast ours was, for every round in which both steps were clean."""
    pairs = zip(ours.rounds, peer.rounds, strict=True)
    clean = [(mine, theirs) for mine, theirs in pairs if measure.clean(mine) and measure.clean(theirs)]
    return [measure.seconds(theirs) / measure.seconds(mine) for mine, theirs in clean]


def pairs_of(contestants: Sequence[Contestant]) -> list[tuple[Contestant, Contestant]]:
    """Each of ours with each other."""
    pairs = itertools.permutations(contestants, 2)
    return [(ours, peer) for ours, peer in pairs if ours.is_ours and (not peer.is_ours or ours.name > peer.name)]


def run(names: Sequence[str], task: Task, measure: Measure, clean_pairs: int, most: int, say: Say) -> list[Contestant]:
    """Steps the contestants until every pair has `clean_pairs` clean rounds, or `most` rounds are over."""
    order = random.Random(0)
    with ExitStack() as stack:
        contestants = [stack.enter_context(started(name, task, say)) for name in names]
        for number in range(1, most + 1):
            for contestant in order.sample(contestants, len(contestants)):
                contestant.rounds.append(contestant.step())
            least = min((len(ratios(*pair, measure)) for pair in pairs_of(contestants)), default=number)
            steps = ", ".join(f"{c.name} {measure.seconds(c.rounds[-1]):.2f} s" for c in contestants)
            foreign = max(c.rounds[-1].foreign for c in contestants)
            say(f"round {number}: {steps}; foreign load up to {foreign:.2f}; {least} clean")
            if least >= clean_pairs:
                break
    return contestants


@contextmanager
def started(name: str, task: Task, say: Say) -> Iterator[Contestant]:
    """A contestant past its first steps, where compilers and caches are at work."""
    with spawned(work, name, task) as pipe:
        contestant = Contestant(name, pipe, receive(name, pipe, Ready))
        contestant.warm_up = [contestant.step() for _ in range(WARM_UP_STEPS)]
        first, last = contestant.warm_up[0], contestant.warm_up[-1]
        say(
            f"{name}: {contestant.ready.parameters:,} parameters, loss {first.loss:.3f}, "
            f"first step {first.seconds:.1f} s, step {WARM_UP_STEPS} {last.seconds:.2f} s, {last.peak_mib:,.0f} MiB"
        )
        yield contestant


@contextmanager
def spawned(target: Callable[..., None], *arguments: Any, patience_s: float = 30) -> Iterator[Connection]:
    """A fresh process that is given `arguments` and one end of a pipe; it leaves when the other is closed.

    Args:
        patience_s: how long it may take to leave.
    """
    context = get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=target, args=(*arguments, theirs), daemon=False)
    process.start()
    theirs.close()
    try:
        yield mine
    finally:
        mine.close()
        process.join(patience_s)
        if process.is_alive():
            process.kill()
            process.join()


def receive(name: str, pipe: Connection, kind: type[Any], seconds: float = START_S) -> Any:
    """What a worker sends next."""
    if not pipe.poll(seconds):
        raise SystemExit(f"{name} has said nothing for {seconds:.0f} s")
    try:
        value = pipe.recv()
    except EOFError:
        raise SystemExit(f"{name} has ended; the reason stands above") from None
    assert isinstance(value, kind), (name, value)
    return value
