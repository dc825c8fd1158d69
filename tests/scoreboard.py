"""The scoreboard: what was proven where and when, kept as JSON and shown as a page.

    python tests/scoreboard.py        writes the page anew, after a change of tests/goals.py or of a marked test

`make prove` writes both (tests/proof.py). The JSON holds what happened, test by test; whether a goal is proven follows
from that, from the goal's own remains, and from the tests that are marked with it today: a test that joined since was
not run, so its goal is unproven until it is.
"""

from __future__ import annotations

import ast
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

from goals import GOALS, Goal

ROOT = Path(__file__).parents[1]
BOARD = ROOT / "docs" / "reliability-scoreboard.json"

INTRODUCTION = """# The reliability scoreboard

<!-- Written by `make prove` from docs/reliability-scoreboard.json. Do not edit. -->

[Reliability](reliability.md) says what is promised and what these words mean. Each figure is that of the machine and
the day beside it; nothing else is claimed.

"""
HEADER = (
    "| goal | what it asks | status | passed | seed | day (UTC) | took | machine |\n"
    "|-|-|-|-:|-:|-|-:|-|\n"
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of one test, or of several. failed, not_run: which, and why."""

    passed: int = 0
    total: int = 0
    seconds: float = 0.0
    failed: tuple[str, ...] = ()
    not_run: tuple[str, ...] = ()

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            self.passed + other.passed,
            self.total + other.total,
            round(self.seconds + other.seconds, 3),
            tuple(dict.fromkeys(self.failed + other.failed)),
            tuple(dict.fromkeys(self.not_run + other.not_run)),
        )


@dataclass
class Row:
    """What became of a goal's tests (by "file::function", all parameters together), and where."""

    seed: int
    date: str
    machine: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    tests: dict[str, Outcome] = field(default_factory=dict)

    def add(self, test: str, outcome: Outcome) -> None:
        self.tests[test] = self.tests.get(test, Outcome()) + outcome

    @property
    def sum(self) -> Outcome:
        return reduce(Outcome.__add__, self.tests.values(), Outcome())


Board = dict[str, Row]
Marked = dict[str, set[str]]


def judge(goal: Goal, row: Row | None, marked: set[str]) -> tuple[str, str]:
    """proven, partly, failed or unproven, and why.

    Args:
        goal: what is asked.
        row: what was run, or None.
        marked: the tests that bear the goal's mark today.
    """
    if row is None or not row.tests:
        nothing = goal.remains if goal.remains.startswith("all of it") else "no test yet"
        return "unproven", "not run" if marked else nothing
    total = row.sum
    if total.failed:
        return "failed", _some(total.failed)
    not_run = [*total.not_run, *(f"`{test}`" for test in sorted(marked - row.tests.keys()))]
    if not_run:
        return "unproven", f"not run: {_some(not_run)}"
    if total.passed != total.total or total.total == 0:
        return "unproven", "not run to its end"
    return ("partly", f"still without {goal.remains}") if goal.remains else ("proven", "")


def _some(texts: Sequence[str], shown: int = 3) -> str:
    more = [f"and {len(texts) - shown} more"] if len(texts) > shown else []
    return "; ".join([*texts[:shown], *more])


# --- the JSON


def load(path: Path) -> Board:
    """The rows of goals that were run; none if there is no file."""
    trees = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: _row(tree) for name, tree in trees.items() if tree.get("tests")}


def _row(tree: dict[str, Any]) -> Row:
    tests = {
        test: Outcome(**outcome | {"failed": tuple(outcome["failed"]), "not_run": tuple(outcome["not_run"])})
        for test, outcome in tree["tests"].items()
    }
    return Row(tree["seed"], tree["date"], tree["machine"], tree["notes"], tests)


def tree_of(board: Board, marked: Marked) -> dict[str, Any]:
    """Every goal, run or not, with its status."""
    return {name: _tree(goal, board.get(name), marked.get(name, set())) for name, goal in GOALS.items()}


def _tree(goal: Goal, row: Row | None, marked: set[str]) -> dict[str, Any]:
    status, why = judge(goal, row, marked)
    tree: dict[str, Any] = {"goal": goal.text, "status": status, "why": why}
    if row is not None:
        total = row.sum
        tree |= {"passed": total.passed, "total": total.total, "seconds": total.seconds} | asdict(row)
    return tree


def save(path: Path, board: Board, marked: Marked) -> None:
    """Writes the JSON and, beside it, the page; each appears whole."""
    tree = tree_of(board, marked)
    _replace(path, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
    _replace(path.with_suffix(".md"), page(tree))


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def marked_tests(*folders: Path, root: Path = ROOT) -> Marked:
    """Goals to the tests that bear their mark, by the source: also those that were not collected.

    A test is "file::function". The mark stands as a decorator, or in a module's `pytestmark`.
    """
    marked: Marked = {}
    for path in sorted({path for folder in folders for path in folder.rglob("test_*.py")}):
        module = ast.parse(path.read_text(encoding="utf-8"))
        of_all = [name for line in module.body if _is_pytestmark(line) for name in _goals_in(line)]
        for function in (line for line in module.body if isinstance(line, ast.FunctionDef)):
            if function.name.startswith("test"):
                for name in [*of_all, *(name for node in function.decorator_list for name in _goals_in(node))]:
                    marked.setdefault(name, set()).add(f"{path.relative_to(root).as_posix()}::{function.name}")
    return marked


def _is_pytestmark(line: ast.stmt) -> bool:
    return isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "pytestmark"


def _goals_in(tree: ast.AST) -> list[str]:
    """The words of every `pytest.mark.goal(...)` in an expression."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        ast.literal_eval(word) for call in calls if ast.unparse(call.func) == "pytest.mark.goal" for word in call.args
    ]


def this_machine() -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# --- the page


def page(tree: dict[str, Any]) -> str:
    """The JSON as Markdown."""
    machines = _machines(tree)
    statuses = [entry["status"] for entry in tree.values()]
    counts = ", ".join(f"{statuses.count(word)} {word}" for word in ("proven", "partly", "failed", "unproven"))
    rows = [_line(name, entry, machines) for name, entry in tree.items()]
    return "".join([INTRODUCTION, f"Of {len(tree)} goals: **{counts}.**\n\n", HEADER, *rows, _below(tree, machines)])


def _machines(tree: dict[str, Any]) -> list[dict[str, Any]]:
    machines: list[dict[str, Any]] = []
    for entry in tree.values():
        if "machine" in entry and entry["machine"] not in machines:
            machines.append(entry["machine"])
    return machines


def _line(name: str, entry: dict[str, Any], machines: list[dict[str, Any]]) -> str:
    why = f": {entry['why']}" if entry["why"] else ""
    cells = [name, entry["goal"], f"**{entry['status']}**{why}"]
    if "machine" in entry:
        figures = f"{entry['passed']:,}/{entry['total']:,}"
        place = str(machines.index(entry["machine"]) + 1)
        cells += [figures, str(entry["seed"]), entry["date"], duration(entry["seconds"]), place]
    else:
        cells += [""] * 5
    cells = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(cells)} |\n"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _below(tree: dict[str, Any], machines: list[dict[str, Any]]) -> str:
    """The machines and the notes; notes stand as they were written."""
    text = "\n## Machines\n\n" if machines else ""
    for number, machine in enumerate(machines, 1):
        text += "{}. {cpu}, {cores} cores, {system}, Python {python}, PyTorch {torch}\n".format(number, **machine)
    noted = {name: entry["notes"] for name, entry in tree.items() if entry.get("notes")}
    text += "\n## Notes\n" if noted else ""
    for name, notes in noted.items():
        text += f"\n### {name}\n\n```text\n" + "\n".join(notes).replace("```", "'''") + "\n```\n"
    return text


if __name__ == "__main__":
    save(BOARD, load(BOARD), marked_tests(ROOT / "tests"))
