"""What one other busy process costs a run, with `pocketlm.neighbours` and without.

    python benchmarks/neighbours.py [PRESET ...] [--rounds 4] [--folder DIR]

One run a preset, whose steps take turns: alone and beside a process that hashes without end; threads that wait for one
another look 300,000 times (libgomp's own), or as pocketlm lets them. The first steps of each turn are left out: the
neighbour has to be seen first. Medians of seconds a step, with their range. The text is Python's own library.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from pocketlm import neighbours
from pocketlm.config import Config
from pocketlm.training.log import Silent
from pocketlm.training.loop import train
from saves import TEXT

CASES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "smallm": {"train.tokens_per_step": 2048},
    "smollm2-135m": {"data.context": 256, "train.tokens_per_step": 512},
}
STEPS = 10
"""Of a turn."""
LEFT_OUT = 4
HASHES = "import hashlib\ndata = bytes(1 << 26)\nwhile True:\n    hashlib.sha256(data)"
OWN = {name: getattr(neighbours, name) for name in ("CROWDED", "FREE")}
NEVER = {"CROWDED": math.inf, "FREE": math.inf}
Turn = tuple[bool, bool]
"""Whether there is a neighbour, and whether it is looked for."""
TURNS: tuple[Turn, ...] = ((False, False), (True, False), (True, True), (False, True))
"""At the end the neighbour leaves while it is looked for."""


class Turns(Silent):
    """Changes with the steps what is beside them, and notes how long they take."""

    def __init__(self) -> None:
        self.seconds: dict[Turn, list[float]] = {turn: [] for turn in TURNS}
        self._neighbour: subprocess.Popen[bytes] | None = None
        self._last_s = 0.0
        self.begin(TURNS[0])

    def record(self, record: Any) -> None:
        if record["kind"] != "train":
            return
        step, seconds = record["step"] - 1, record["elapsed_s"] - self._last_s
        self._last_s = record["elapsed_s"]
        if step % STEPS >= LEFT_OUT:
            self.seconds[self._turn].append(seconds)
        if step % STEPS == STEPS - 1:
            self.begin(TURNS[(step // STEPS + 1) % len(TURNS)])

    def begin(self, turn: Turn) -> None:
        self.close()
        self._turn = turn
        beside, looks = turn
        for name, value in (OWN if looks else NEVER).items():
            setattr(neighbours, name, value)
        if beside:
            self._neighbour = subprocess.Popen([sys.executable, "-c", HASHES])

    def close(self) -> None:
        if self._neighbour:
            self._neighbour.kill()
            self._neighbour.wait()
            self._neighbour = None


def row(preset: str, rounds: int) -> str:
    """One line of the table."""
    run = {"train.total_steps": rounds * len(TURNS) * STEPS, "train.checkpoint_every": 10**6, "train.eval_every": 0}
    config = Config.preset(preset, TEXT | CASES[preset] | run | {"train.eval_tokens": 512, "schedule.warmup_steps": 1})
    shutil.rmtree(preset, ignore_errors=True)
    with contextlib.closing(Turns()) as taken:
        train(config, out=Path(preset), listener=taken)
    shutil.rmtree(preset)
    cells = (f"{statistics.median(each):.3f} ({min(each):.3f} to {max(each):.3f})" for each in taken.seconds.values())
    return f"| {preset} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=list(CASES), help=f"default: {' '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each kind")
    parser.add_argument("--folder", type=Path, default=Path("runs/neighbours-benchmark"), help="where it happens")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.folder)
    print("| preset | alone, libgomp's | beside a process, libgomp's | beside a process, ours | alone, ours |")
    print("|-|-:|-:|-:|-:|", flush=True)
    for preset in arguments.presets:
        print(row(preset, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
