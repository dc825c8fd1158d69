"""`pocketlm runs [DIR]` lists runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from pocketlm.cli.arguments import Parser, print_json, print_table, say, shown

if TYPE_CHECKING:
    from pocketlm.training.runs import Glimpse

HEADINGS = ("run", "preset", "parameters", "step", "tokens", "validation", "bits/byte", "written", "state")
RUNS = "runs"


def run(argv: list[str]) -> int:
    parser = Parser("runs", "List the runs in a folder, the newest first.")
    parser.add_argument("folder", nargs="?", metavar="DIR", help=f"where they lie, or one of them (default: {RUNS})")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)

    from pocketlm.training.runs import find_runs

    folder = Path(arguments.folder or RUNS)
    runs = find_runs(folder) if arguments.folder or folder.exists() else []
    if arguments.json:
        print_json({"runs": [run.tree() for run in runs]})
    elif runs:
        now = time.time()
        print_table([HEADINGS, *(_row(run, now) for run in runs)])
        _say_damaged(runs)
    else:
        say(f"no runs in {folder}; begin with: pocketlm train tiny")
    return 0


def _row(run: Glimpse, now: float) -> tuple[str, ...]:
    from pocketlm.training.curve import short
    from pocketlm.training.log import duration

    tree = run.tree()
    return (
        shown(str(run.folder)),
        shown(tree["name"] or "-"),
        short(tree["parameters"]) if tree["parameters"] else "-",
        f"{run.step:,} / {run.total_steps:,}" if run.total_steps else "-",
        short(tree["tokens"]) if tree["tokens"] else "-",
        _figure(tree["val_loss"]),
        _figure(tree["bits_per_byte"]),
        f"{duration(max(0.0, now - run.written_at))} ago",
        run.state,
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _say_damaged(runs: list[Glimpse]) -> None:
    for run in runs:
        if run.state == "damaged":
            say(f"{run.folder} is damaged: {run.problem}")
