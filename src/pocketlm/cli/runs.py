"""`pocketlm runs [DIR]` lists runs, `pocketlm runs compare A B` draws them over each other."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pocketlm.cli.arguments import Parser, print_json, print_table, say, shown

if TYPE_CHECKING:
    from pocketlm.training.compare import Comparison
    from pocketlm.training.runs import Glimpse

HEADINGS = ("run", "preset", "parameters", "step", "tokens", "validation", "bits/byte", "written", "state")
RUNS = "runs"
MARKS = {"●": "cyan", "○": "yellow", "▲": "green", "△": "magenta", "◆": "red", "◇": "blue"}
"""What each run of a comparison is drawn in, and in which colour where there are any."""
MIN_WIDTH, MAX_WIDTH, CHART_HEIGHT = 40, 120, 16


def run(argv: list[str]) -> int:
    return _compare(argv[1:]) if argv[:1] == ["compare"] else _list(argv)


def _list(argv: list[str]) -> int:
    parser = Parser(
        "runs",
        "List the runs in a folder, the newest first.",
        epilog="two of them side by side: pocketlm runs compare A B",
    )
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


# --- comparing


def _compare(argv: list[str]) -> int:
    parser = Parser("runs compare", "Draw the losses of some runs, and say where they differ.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run; two or more")
    parser.add_argument("--html", metavar="FILE", help="write the comparison as a page too")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments = parser.parse_args(argv)

    from pocketlm.training.compare import compare
    from pocketlm.training.compare_words import write_page

    comparison = compare([Path(name) for name in arguments.runs])
    if arguments.html:
        write_page(comparison, Path(arguments.html))
    if arguments.json:
        print_json(comparison.tree())
        return 0
    _draw(comparison)
    _print_tables(comparison)
    for line in (*comparison.verdicts(), *(f"note: {note}" for note in comparison.notes)):
        print(shown(line))
    return 0


def _draw(comparison: Comparison) -> None:
    """A chart over tokens and one over seconds, where there is an evaluation."""
    from rich.console import Console

    from pocketlm.training.compare_words import AXES, MEASURES
    from pocketlm.training.curve import terminal_curves

    width = max(MIN_WIDTH, min(MAX_WIDTH, Console().width))
    names = zip(MARKS, (side.name for side in comparison.sides), strict=False)
    legend = "   ".join(f"{mark} {shown(name)}" for mark, name in names)
    for axis, label in AXES.items():
        curves = dict(zip(MARKS, comparison.curves(axis), strict=False))
        if chart := terminal_curves(curves, width, CHART_HEIGHT, x_label=label):
            _print_in_colour(f"{MEASURES[comparison.measure]}\n{legend}\n")
            _print_in_colour("\n".join(chart) + "\n")


def _print_in_colour(text: str) -> None:
    """The marks have colours on a terminal that has."""
    if not sys.stdout.isatty():
        print(text)
        return
    from rich.console import Console
    from rich.text import Text

    coloured = Text(text)
    for mark, colour in MARKS.items():
        coloured.highlight_regex(mark, colour)
    Console().print(coloured, highlight=False, soft_wrap=True)


def _print_tables(comparison: Comparison) -> None:
    from pocketlm.training.compare_words import tables

    for heading, head, rows in tables(comparison):
        print_table([(heading, *map(shown, head[1:])), *(tuple(map(shown, row)) for row in rows)])
        print()
