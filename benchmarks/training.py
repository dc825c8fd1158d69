"""Tokens per second of training, side by side with the peers: prints Markdown. README.md says how to install them.

    python benchmarks/training.py smollm2-512
    python benchmarks/training.py smollm2-512 --contestants pocketlm transformers+bf16
    python benchmarks/training.py smallm --threads 1        one thread, CPU time: for a machine that is not quiet

Contestants are taken in groups that fit into memory at once, pocketlm in each: ratios stand inside a group.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from peak import measure as measure_peak
from report import comparisons, figures, heading, introduction, own_memory, problems, write
from rounds import Measure, receive, run, spawned
from tables import TABLES, Table
from worker import Task

NUM_BATCHES = 64


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="by default the table's")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--by", choices=("wall", "cpu"), help="by default cpu with one thread, wall with more")
    parser.add_argument("--pairs", type=int, default=5, help="clean rounds of every pair (5)")
    parser.add_argument("--rounds", type=int, default=40, help="the most rounds of a group (40)")
    parser.add_argument("--gib", type=float, default=18.0, help="memory that a group may take (18)")
    parser.add_argument("--text", default="stdlib", help="stdlib, or files:GLOB")
    parser.add_argument("--tokenizer", help="a folder, where the preset's own needs a network")
    parser.add_argument("--write", action="store_true", help="also write the section into RESULTS.md")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    with tempfile.TemporaryDirectory() as folder:
        measure_table(given, Path(folder) / "batches.npy")


def measure_table(given: argparse.Namespace, batches: Path) -> None:
    table = TABLES[given.table]
    measure = Measure(by_cpu=given.by == "cpu" if given.by else given.threads == 1)
    names = given.contestants or table.contestants
    check(names)
    task, vocab_size = prepare(table, given.threads, given.text, given.tokenizer, batches)
    groups = []
    for together in packed(names, table, given.gib):
        say(f"group {len(groups) + 1}: {', '.join(together)}")
        groups.append(run(together, task, measure, given.pairs, given.rounds, say))

    say("the rate of bf16 products")
    with spawned(measure_peak, task.threads, measure.by_cpu) as pipe:
        peak = receive("peak", pipe, dict)
    loads = [step.foreign for group in groups for contestant in group for step in contestant.rounds]
    section = [heading(given.table, task, measure), "", *introduction(table, task, peak, loads)]
    section += [*comparisons(groups, table, measure), *own_memory(groups, table)]
    section += figures(groups, task, measure, peak)
    print("\n".join(section))
    if void := [problem for group in groups for problem in problems(group, table, vocab_size)]:
        raise SystemExit("not a fair comparison: " + "; ".join(void))
    if given.write:
        write(section)


def prepare(table: Table, threads: int, text: str, tokenizer: str | None, batches: Path) -> tuple[Task, int]:
    """The data set, and the rows that pocketlm's loader takes from it in a file that any contestant can read."""
    from contestants import SEED, config_of
    from pocketlm.config import Config
    from pocketlm.data.loader import Loader
    from pocketlm.data.prepare import prepare as prepare_data
    from pocketlm.data.shards import open_dataset

    plain = Config.preset(table.preset)
    changes = {"source": text, "tokenizer": tokenizer or plain.data.tokenizer}
    changes |= {"source": "synthetic"} if plain.data.source == "synthetic" else {}
    folder = prepare_data(plain.data.model_copy(update=changes), progress=say)
    task = Task(table.preset, table.rows, table.context, threads, folder, batches)
    loader = Loader(open_dataset(folder).train, task.context, SEED, config_of(task).data.order)
    rows = loader.read(0, NUM_BATCHES * task.rows).numpy().astype(np.int32)
    np.save(task.batches, rows.reshape(NUM_BATCHES, task.rows, task.context + 1))
    return task, plain.model.vocab_size


def check(names: Sequence[str]) -> None:
    from contestants import unknown

    if wrong := [line for line in map(unknown, names) if line]:
        raise SystemExit("\n".join(wrong))


def packed(names: Sequence[str], table: Table, gib: float) -> list[list[str]]:
    """Groups that fit: pocketlm's contestants in each, or each of them in groups of its own if that is too much."""
    ours = [name for name in names if name.partition("+")[0] == "pocketlm"]
    if not ours:
        raise SystemExit("name pocketlm among the contestants: ratios are over it")
    peers = [name for name in names if name not in ours]
    largest = max(map(table.gib_of, peers), default=0.0)
    if len(ours) > 1 and sum(map(table.gib_of, ours)) + largest > gib:
        return [group for own in ours for group in packed([own, *peers], table, gib)]
    groups: list[list[str]] = []
    for each in [[peer] for peer in peers] or [[]]:
        if groups and sum(map(table.gib_of, [*groups[-1], *each])) <= gib:
            groups[-1] += each
        else:
            groups.append([*ours, *each])
        if sum(map(table.gib_of, groups[-1])) > gib:
            raise SystemExit(f"{', '.join(groups[-1])} may not fit into {gib} GiB at once; give --gib, or fewer")
    return groups


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
