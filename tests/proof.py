"""Proof by count: how many cases of a goal of reliability were tried and passed (a pytest plugin).

    @pytest.mark.goal("R9")                      # the goals that the test proves a part of, by tests/goals.py
    def test_x(proof):
        for case in proof.cases(100, 1000):      # 100 in `make test`, 1,000 in `make prove`
            rng = proof.random(case)             # of the case's own: case 731 is the same alone as in a thousand

A case is passed when the body of the loop is left without an error. A marked test that counts nothing is one case.
`make prove` runs the long counts and writes the scoreboard (tests/scoreboard.py) after each test: until a goal's last
test has ended it stands there as unproven, so whatever ends the run early, nothing is shown that was not done.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from goals import GOALS
from scoreboard import Outcome, Row, load, marked_tests, save, this_machine

SEED = 20261120


@dataclass
class Proof:
    """A test's own count. long: whether this is `make prove`. case: the one that is being tried."""

    long: bool
    seed: int
    only: int | None = None
    passed: int = 0
    total: int = 0
    case: int | None = None
    notes: list[str] = field(default_factory=list)

    def size(self, short: int, long: int) -> int:
        """The number of the two that holds here."""
        return long if self.long else short

    def cases(self, short: int, long: int) -> Iterator[int]:
        """0, 1, 2, ...: the numbers of the cases. Each counts as passed once the next is asked for."""
        numbers = range(self.size(short, long)) if self.only is None else [self.only]
        self.total += len(numbers)
        for self.case in numbers:
            yield self.case
            self.passed += 1
        self.case = None

    def count(self, num_passed: int = 1) -> None:
        """For a test that counts its own cases: these have passed."""
        self.passed += num_passed
        self.total += num_passed

    def random(self, case: int) -> random.Random:
        return random.Random(f"{self.seed} {case}")

    def note(self, text: str) -> None:
        """A remark that belongs to the figure, for the scoreboard; it may have several lines."""
        self.notes.append(text)


PROOF = pytest.StashKey[Proof]()


@pytest.fixture
def proof(request: pytest.FixtureRequest) -> Proof:
    """The count of this test."""
    option = request.config.getoption
    counted = Proof(option("--prove"), option("--proof-seed"), option("--proof-case"))
    request.node.stash[PROOF] = counted
    return counted


# --- options and marks


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("proof")
    group.addoption("--prove", action="store_true", help="the long counts")
    group.addoption("--proof-seed", type=int, default=SEED, metavar="N", help=f"of the random cases (default: {SEED})")
    group.addoption("--proof-case", type=int, metavar="N", help="this case alone")
    group.addoption("--goals", default="", metavar='"R1 R9"', help="only the tests of these goals")
    group.addoption("--scoreboard", type=Path, metavar="JSON", help="write what came out here; a page beside it")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "goal(name, ...): the goals of reliability that the test proves a part of")
    asked = config.getoption("--goals").split()
    if unknown := [name for name in asked if name not in GOALS]:
        raise pytest.UsageError(f"no goal {', '.join(unknown)}; the goals are {', '.join(GOALS)}")
    board = config.getoption("--scoreboard")
    if board is None:
        return
    narrowed = config.args_source is config.ArgsSource.ARGS or config.getoption("--proof-case") is not None
    if narrowed or not config.getoption("--prove"):
        raise pytest.UsageError("--scoreboard takes --prove, and no files and no single case: a goal is proven whole")
    config.pluginmanager.register(Recorder(config, config.rootpath / board, asked or list(GOALS)), "scoreboard")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("goal"):
            if not mark.args or not set(mark.args) <= GOALS.keys():
                raise pytest.UsageError(f"{item.nodeid}: no goal {mark.args}; the goals are {', '.join(GOALS)}")
    if asked := set(config.getoption("--goals").split()):
        config.hook.pytest_deselected(items=[item for item in items if not asked & goals_of(item)])
        items[:] = [item for item in items if asked & goals_of(item)]


def goals_of(item: pytest.Item) -> set[str]:
    return {name for mark in item.iter_markers("goal") for name in mark.args}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure says which case it was, and how to try that one alone."""
    report = yield
    counted = item.stash.get(PROOF, None)
    if report.failed and counted is not None and counted.case is not None:
        again = f"pytest '{item.nodeid}' --proof-seed {counted.seed} --proof-case {counted.case}"
        text = f"case {counted.case}, {counted.passed} of {counted.total} passed; this one alone: {again}"
        report.sections.append(("proof", text + " --prove" * counted.long))
    return report


# --- the scoreboard


@dataclass
class Taken:
    """A test as it goes: what is known of it so far."""

    item: pytest.Item
    outcome: Outcome
    notes: list[str] = field(default_factory=list)
    failed: str = ""
    skipped: str = ""
    seconds: float = 0.0

    def take(self, report: pytest.TestReport) -> None:
        """One of setup, call and teardown; after the last the outcome stands."""
        counted = self.item.stash.get(PROOF, None)
        self.seconds += report.duration
        if report.failed:
            self.failed = self.failed or self.where(counted)
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
            self.skipped = f"`{self.item.nodeid}` ({reason})"
        if report.when == "teardown":
            self.notes = counted.notes if counted else []
            self.outcome = self.ended(counted)

    def where(self, counted: Proof | None) -> str:
        case = "" if counted is None or counted.case is None else f" at case {counted.case}, seed {counted.seed}"
        return f"`{self.item.nodeid}`{case}"

    def ended(self, counted: Proof | None) -> Outcome:
        bad = bool(self.failed or self.skipped)
        passed, total = (counted.passed, counted.total) if counted else (0, 0)
        if total == 0 and not self.skipped:
            passed, total = int(not bad), 1
        if self.failed and passed == total:
            total += 1  # what failed was outside the counted cases
        cut = "" if bad or passed == total else f"`{self.item.nodeid}` (left after {passed:,} of {total:,} cases)"
        failed, left = (tuple(filter(None, [text])) for text in (self.failed, self.skipped or cut))
        return Outcome(passed, total, round(self.seconds, 3), failed, left)


def not_run(item: pytest.Item, why: str) -> Taken:
    return Taken(item, Outcome(not_run=(f"`{function_of(item)}` ({why})",)))


def function_of(item: pytest.Item) -> str:
    """ "file::function", whatever the parameters."""
    return item.nodeid.partition("[")[0]


class Recorder:
    """Writes the scoreboard's rows of the goals that were asked for; the other rows stay as they are."""

    def __init__(self, config: pytest.Config, path: Path, asked: list[str]) -> None:
        folders = [config.rootpath / name for name in config.getini("testpaths")] or [config.rootpath]
        self.path, self.asked, self.seed = path, asked, config.getoption("--proof-seed")
        self.board = load(path)
        self.marked = marked_tests(*folders, root=config.rootpath)
        self.taken: dict[str, Taken] = {}
        self.machine, self.date = this_machine(), datetime.now(UTC).date().isoformat()

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.taken |= {item.nodeid: not_run(item, "left out") for item in items}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.taken |= {item.nodeid: not_run(item, "not reached") for item in session.items}
        self.write()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        self.taken[item.nodeid].take(report)
        if report.when == "teardown" and goals_of(item):
            self.write()
        return report

    def write(self) -> None:
        for name in self.asked:
            self.board.pop(name, None)
            if self.marked.get(name):
                self.board[name] = self.row(name)
        save(self.path, self.board, self.marked)

    def row(self, name: str) -> Row:
        row = Row(self.seed, self.date, self.machine)
        for taken in self.taken.values():
            if name in goals_of(taken.item):
                row.add(function_of(taken.item), taken.outcome)
                row.notes += taken.notes
        for test in self.marked[name] - row.tests.keys():
            row.add(test, Outcome(not_run=(f"`{test}` (not collected)",)))
        return row
