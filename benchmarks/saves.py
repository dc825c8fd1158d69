"""What a checkpoint costs a run: seconds of training lost to one save, and their share at a save a minute.

    python benchmarks/saves.py [PRESET ...] [--saves 5] [--folder DIR]

A run saves so rarely that each save has long ended when the next begins. So each window, from one save to the next, has
a disturbed beginning and a quiet second half:

    cost of a save = seconds of the window - its steps x the median step of its second half

which holds the time in which the state is copied, and what writing, hashing and pruning take from the steps beside
them. The first window is left out: it has the warm-up. `still` is how long training stands still at a save, `beside`
how long the save goes on after that. The text is Python's own library.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pocketlm.config import Config
from pocketlm.training import saving
from pocketlm.training.log import Silent
from pocketlm.training.loop import train

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "tiny": (60, {}),
    "smallm": (10, {"train.tokens_per_step": 7936}),
    "smollm2-135m": (10, {"data.context": 512, "train.tokens_per_step": 2048}),
}
"""Steps between saves, and a short step of each: other fields are the preset's."""
TEXT = {"data.source": "stdlib", "data.tokenizer": "bpe:4096", "sample.prompts": (), "train.dtype": "auto"}
PRUNED = {"train.keep_last": 2, "train.keep_best": 0}
"""Each save that is counted removes a checkpoint, as those of a long run do."""
MINUTE_S = 60.0


@dataclass
class Watch(Silent):
    """When each step's record came; at a boundary it comes before what is done there."""

    at: list[float] = field(default_factory=list)
    elapsed_s: list[float] = field(default_factory=list)

    def record(self, record: Any) -> None:
        if record["kind"] == "train":
            self.at.append(time.perf_counter())
            self.elapsed_s.append(record["elapsed_s"])


def costs(at: Sequence[float], elapsed_s: Sequence[float], every: int) -> list[float]:
    """Seconds that each save but the first cost, from the instant and the summed step seconds of each step's record."""
    found = []
    for begin in range(every - 1, len(at) - every, every):
        end = begin + every
        quiet = [elapsed_s[i + 1] - elapsed_s[i] for i in range(begin + every // 2, end)]
        found.append(at[end] - at[begin] - every * statistics.median(quiet))
    return found


def row(preset: str, saves: int) -> str:
    """One line of the table."""
    every, fields = CASES[preset]
    steps = (saves + 1) * every
    run = {"train.total_steps": steps, "train.checkpoint_every": every, "train.eval_every": 0, "train.eval_tokens": 512}
    config = Config.preset(preset, TEXT | PRUNED | fields | run | {"schedule.warmup_steps": 1})
    watch, still, beside = Watch(), list[float](), list[float]()
    shutil.rmtree(preset, ignore_errors=True)
    with noted(still, beside):
        train(config, out=Path(preset), listener=watch)
    assert len(watch.at) == steps, "a step was skipped: the windows would not lie between saves"
    each = costs(watch.at, watch.elapsed_s, every)
    median = statistics.median(each)
    spread = f"{min(each):.2f} to {max(each):.2f}"
    return (
        f"| {preset} | {len(each)} | {median:.2f} ({spread}) | {100 * median / MINUTE_S:.2f} % | "
        f"{statistics.median(still):.3f} | {statistics.median(beside):.2f} |"
    )


@contextmanager
def noted(still: list[float], beside: list[float]) -> Iterator[None]:
    """Notes how long each save holds up the run, and how long it goes on beside it."""
    real = {"begin": saving.Saver.begin, "_write": saving.Saver._write}
    for (name, method), seconds in zip(real.items(), (still, beside), strict=True):
        setattr(saving.Saver, name, _watched(method, seconds))
    try:
        yield
    finally:
        for name, method in real.items():
            setattr(saving.Saver, name, method)


def _watched(real: Callable[..., None], seconds: list[float]) -> Callable[..., None]:
    def method(saver: saving.Saver, *arguments: Any, **options: Any) -> None:
        began_at = time.perf_counter()
        real(saver, *arguments, **options)
        seconds.append(time.perf_counter() - began_at)

    return method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=list(CASES), help=f"default: {' '.join(CASES)}")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/saves-benchmark"), help="where all of it happens")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.folder)
    print("| preset | saves | s a save, median (spread) | at one a minute | still, s | beside, s |")
    print("|-|-:|-:|-:|-:|-:|", flush=True)
    for preset in arguments.presets:
        print(row(preset, arguments.saves), flush=True)


if __name__ == "__main__":
    main()
