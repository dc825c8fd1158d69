"""What Lightning adds to a step: the same run by both engines, in turn.

    python benchmarks/engines.py [CASE ...] [--rounds 9] [--folder DIR]

A round is one short run by each engine, in one process, in an order that turns from round to round. A step is what is
between its record and the next one: all that an engine does there is in it, and no evaluation or checkpoint. It is
counted in CPU time on one thread, which others on the machine disturb least. Of a run the median step counts, from its
tenth on; of a case the median over the rounds of what was added, and of the ratio, each with the least and the most.
There is no bar, no logger and no callback.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pocketlm.config import Config
from pocketlm.training.log import Silent
from pocketlm.training.loop import train

WARM_UP = 10
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "debug, 8 rows of 32": ("debug", 160, {}),
    "tiny, 1 row of 64": ("tiny", 40, {"data.context": 64, "train.tokens_per_step": 64}),
    "smallm, 1 row of 256": ("smallm", 24, {"train.tokens_per_step": 256}),
}
"""Preset, steps of a run, and the size of a step: other fields are the preset's."""
ALIKE = {
    "data.source": "synthetic",
    "data.tokenizer": "byte",
    "data.segment_pieces": 0,
    "train.eval_every": 0,
    "train.eval_tokens": 256,
    "train.checkpoint_every": 10**6,
    "train.dtype": "fp32",
    "train.compile": "off",
    "train.threads": 1,
    "schedule.warmup_steps": 1,
    "sample.prompts": (),
}
ENGINES = ("torch", "lightning")


@dataclass
class Watch(Silent):
    """The process's CPU time at each step's record."""

    at: list[float] = field(default_factory=list)

    def record(self, record: Any) -> None:
        if record["kind"] == "train":
            self.at.append(time.process_time())


def step_ms(at: Sequence[float]) -> float:
    """The median step of a run, from the times of its records."""
    return 1000 * statistics.median(after - before for before, after in itertools.pairwise(at[WARM_UP:]))


def measured(case: str, engine: str) -> float:
    """CPU milliseconds of a step of one run."""
    preset, steps, fields = CASES[case]
    config = Config.preset(preset, ALIKE | fields | {"train.total_steps": steps, "train.engine": engine})
    watch = Watch()
    shutil.rmtree("run", ignore_errors=True)
    train(config, out=Path("run"), listener=watch)
    assert len(watch.at) == steps, "a step was skipped"
    return step_ms(watch.at)


def row(case: str, rounds: Sequence[tuple[float, float]]) -> str:
    """One line of the table, from milliseconds of (torch, lightning) of each round."""
    alone, driven = (statistics.median(each) for each in zip(*rounds, strict=True))
    added = spread([with_it - without for without, with_it in rounds], 2)
    ratio = spread([with_it / without for without, with_it in rounds], 3)
    return f"| {case} | {len(rounds)} | {alone:.2f} | {driven:.2f} | {added} | {ratio} |"


def spread(values: Sequence[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=f"default: {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path("runs/engines-benchmark"), help="where all of it happens")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.folder)
    print(f"load before: {os.getloadavg()[0]:.2f}")
    print("| case | rounds | torch, ms a step | lightning, ms | added, ms | ratio |")
    print("|-|-:|-:|-:|-:|-:|", flush=True)
    for case in arguments.cases:
        rounds = list[tuple[float, float]]()
        for number in range(arguments.rounds):
            order = ENGINES if number % 2 else ENGINES[::-1]
            taken = {engine: measured(case, engine) for engine in order}
            rounds.append((taken["torch"], taken["lightning"]))
        print(row(case, rounds), flush=True)
    print(f"load after: {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
