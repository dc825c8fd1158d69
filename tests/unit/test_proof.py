"""The counting of proofs and the scoreboard, on small suites of their own; and the committed scoreboard against itself.

The suites are run by pytest's `pytester` in a folder of their own. What the real goals still lack is taken away here,
so that a goal can be proven by one test.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import goals
import scoreboard
from goals import GOALS, Goal
from proof import SEED, Proof
from scoreboard import Outcome, Row, judge, marked_tests, page, tree_of

MACHINE = {"cpu": "abacus", "cores": 2, "system": "Linux", "python": "3.11.9", "torch": "2.13.0"}
PLUGINS = ("-p", "proof", "-p", "no:hypothesispytest")  # Hypothesis takes ten times as long to load as all the rest
TWO_GOALS = """
import pytest

@pytest.mark.goal("R9")
def test_flips(proof):
    for case in proof.cases(2, 5):
        proof.random(case)
    proof.note("bits: 1 | 2")

@pytest.mark.goal("R1", "R9")
@pytest.mark.parametrize("step", [1, 2, 3])
def test_kills(step):
    pass

def test_of_no_goal():
    assert False
"""

Prove = Callable[..., dict[str, Any]]


@pytest.fixture
def prove(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Prove:
    """Runs a suite as `make prove` does and returns the scoreboard; "ret" is pytest's exit code."""
    for name, goal in GOALS.items():
        monkeypatch.setitem(goals.GOALS, name, replace(goal, remains=""))

    def run(suite: str, *options: str) -> dict[str, Any]:
        pytester.makepyfile(test_suite=suite)
        words = (*PLUGINS, "--strict-markers", "--prove", "-m", "goal", "--scoreboard", "board.json", *options)
        result = pytester.runpytest_inprocess(*words)
        board = Path("board.json")
        tree = json.loads(board.read_text()) if board.exists() else {}
        if tree:
            assert Path("board.md").read_text() == page(tree)
        return tree | {"ret": result.ret, "out": "\n".join(result.outlines + result.errlines)}

    return run


def figures(entry: dict[str, Any]) -> tuple[str, int, int]:
    return entry["status"], entry["passed"], entry["total"]


# --- what is counted


def test_a_case_counts_once_its_body_is_left() -> None:
    counted = Proof(long=False, seed=1)
    numbers = []
    for case in counted.cases(4, 1000):
        numbers.append((case, counted.passed))
    assert numbers == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert (counted.passed, counted.total, counted.case) == (4, 4, None)
    for case in counted.cases(3, 1000):
        if case == 1:  # as an error would
            break
    assert (counted.passed, counted.total, counted.case) == (5, 7, 1)


def test_the_long_count_is_asked_for() -> None:
    assert list(Proof(long=True, seed=1).cases(2, 7)) == list(range(7))
    assert Proof(long=True, seed=1).size(2, 7) == 7
    assert Proof(long=False, seed=1).size(2, 7) == 2


def test_a_cases_numbers_are_its_own() -> None:
    def draw(seed: int, case: int) -> float:
        return Proof(long=False, seed=seed).random(case).random()

    assert draw(1, 731) == draw(1, 731)
    assert len({draw(seed, case) for seed in range(10) for case in range(100)}) == 1000


def test_one_case_alone() -> None:
    counted = Proof(long=True, seed=1, only=731)
    assert list(counted.cases(2, 1000)) == [731]
    assert (counted.passed, counted.total) == (1, 1)


# --- what is written


def test_two_tests_of_one_goal_and_two_goals_of_one_test(prove: Prove) -> None:
    board = prove(TWO_GOALS)
    assert board["ret"] == 0, board["out"]
    assert figures(board["R9"]) == ("proven", 8, 8)
    assert figures(board["R1"]) == ("proven", 3, 3)
    assert board["R9"]["notes"] == ["bits: 1 | 2"]
    assert board["R1"]["notes"] == []
    assert (board["R9"]["seed"], board["R9"]["machine"]["cores"]) == (SEED, os.cpu_count())
    assert board["R2"] == {"goal": GOALS["R2"].text, "status": "unproven", "why": "no test yet"}


def test_a_failure_in_the_middle_names_the_case_and_the_seed(prove: Prove) -> None:
    board = prove(
        """
        import pytest

        @pytest.mark.goal("R9")
        def test_flips(proof):
            for case in proof.cases(2, 50):
                assert case != 17

        @pytest.mark.goal("R9")
        def test_whole():
            pass
        """,
        "--proof-seed=7",
    )
    assert board["ret"] == 1
    assert figures(board["R9"]) == ("failed", 18, 51)
    assert board["R9"]["why"] == "`test_suite.py::test_flips` at case 17, seed 7"
    assert "this one alone: pytest 'test_suite.py::test_flips' --proof-seed 7 --proof-case 17 --prove" in board["out"]


@pytest.mark.parametrize(
    "body",
    [
        "    for case in proof.cases(2, 3):\n        pass\n    assert False",
        "    proof.count(3)\n    assert False",
        "    for case in proof.cases(2, 3):\n        pass\n    request.addfinalizer(lambda: 1 / 0)",
    ],
    ids=["after the cases", "of a test that counts for itself", "at the teardown"],
)
def test_a_failure_outside_the_cases_is_one_more(prove: Prove, body: str) -> None:
    board = prove(f"import pytest\n\n@pytest.mark.goal('R9')\ndef test_x(proof, request):\n{body}\n")
    assert board["ret"] == 1
    assert figures(board["R9"]) == ("failed", 3, 4)


def test_what_is_skipped_was_not_run(prove: Prove) -> None:
    board = prove(
        """
        import pytest

        @pytest.mark.goal("R9")
        def test_flips(proof):
            for case in proof.cases(2, 5):
                pass

        @pytest.mark.goal("R9")
        @pytest.mark.parametrize("device", ["cpu", "gpu"])
        def test_device(device):
            if device == "gpu":
                pytest.skip("no GPU here")

        @pytest.mark.goal("R1")
        @pytest.mark.xfail(reason="one day")
        def test_not_yet():
            assert False
        """
    )
    assert board["ret"] == 0
    assert figures(board["R9"]) == ("unproven", 6, 6)
    assert board["R9"]["why"] == "not run: `test_suite.py::test_device[gpu]` (Skipped: no GPU here)"
    assert figures(board["R1"]) == ("unproven", 0, 0)


def test_leaving_the_cases_early_proves_nothing(prove: Prove) -> None:
    board = prove(
        """
        import pytest

        @pytest.mark.goal("R9")
        def test_flips(proof):
            for case in proof.cases(2, 5):
                if case == 3:
                    break
        """
    )
    assert board["ret"] == 0
    assert figures(board["R9"]) == ("unproven", 3, 5)
    assert "left after 3 of 5 cases" in board["R9"]["why"]


def test_some_goals_alone_leave_the_other_rows(prove: Prove) -> None:
    before = prove(TWO_GOALS, "--proof-seed=3")
    after = prove(TWO_GOALS, "--proof-seed=4", "--goals=R1")
    assert after["ret"] == 0
    assert after["R9"] == before["R9"]
    assert (before["R1"]["seed"], after["R1"]["seed"]) == (3, 4)
    assert figures(after["R1"]) == ("proven", 3, 3)


@pytest.mark.parametrize("options", [["-k", "flips"], ["--deselect", "test_suite.py::test_kills[2]"], ["-k", "[1]"]])
def test_a_goal_of_which_a_part_was_left_out_is_unproven(prove: Prove, options: list[str]) -> None:
    assert prove(TWO_GOALS)["R9"]["status"] == "proven"
    board = prove(TWO_GOALS, *options)
    assert (board["R9"]["status"], board["R1"]["status"]) == ("unproven", "unproven")
    assert "(left out)" in board["R9"]["why"]


def test_a_file_that_cannot_be_collected_is_not_run(prove: Prove) -> None:
    assert prove(TWO_GOALS)["R9"]["status"] == "proven"
    board = prove("import pocketlm_of_tomorrow\n" + TWO_GOALS)
    assert board["ret"] == pytest.ExitCode.INTERRUPTED
    assert (board["R9"]["status"], board["R1"]["status"]) == ("unproven", "unproven")
    assert "(not collected)" in board["R9"]["why"]


@pytest.mark.parametrize(
    ("end", "code"), [("raise KeyboardInterrupt", pytest.ExitCode.INTERRUPTED), ("__import__('os')._exit(137)", 137)]
)
def test_what_was_not_reached_is_unproven(
    end: str, code: int, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(scoreboard.__file__).parent), prepend=os.pathsep)
    words = (*PLUGINS, "--prove", "-m", "goal", "--scoreboard", "board.json")
    pytester.makepyfile(test_suite=TWO_GOALS)
    assert pytester.runpytest_subprocess(*words).ret == 0
    tree = json.loads(Path("board.json").read_text())
    assert figures(tree["R9"])[1:] == (8, 8)
    assert tree["R9"]["status"] != "unproven"

    pytester.makepyfile(test_suite=TWO_GOALS.replace("    pass", f"    if step == 2: {end}", 1))
    assert pytester.runpytest_subprocess(*words).ret == code
    tree = json.loads(Path("board.json").read_text())
    assert figures(tree["R9"]) == ("unproven", 6, 6)
    assert figures(tree["R1"]) == ("unproven", 1, 1)
    assert tree["R1"]["why"] == "not run: `test_suite.py::test_kills` (not reached)"
    assert Path("board.md").read_text() == page(tree)


def test_an_ordinary_run_writes_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_suite=TWO_GOALS.replace("assert False", "pass"))
    pytester.runpytest_inprocess(*PLUGINS).assert_outcomes(passed=5)
    pytester.runpytest_inprocess(*PLUGINS, "--prove", "-m", "goal").assert_outcomes(passed=4, deselected=1)
    assert not list(pytester.path.glob("*.md"))
    assert not list(pytester.path.glob("*.json"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--goals=R1 R31"], "no goal R31; the goals are R1, R2"),
        (["test_suite.py"], "no files and no single case"),
        (["--proof-case=3"], "no files and no single case"),
    ],
)
def test_what_would_not_be_whole_is_refused(prove: Prove, options: list[str], words: str) -> None:
    board = prove(TWO_GOALS, *options)
    assert board["ret"] == pytest.ExitCode.USAGE_ERROR
    assert words in board["out"]
    assert board.keys() == {"ret", "out"}


def test_the_scoreboard_is_of_the_long_counts(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_suite=TWO_GOALS)
    result = pytester.runpytest_inprocess(*PLUGINS, "--scoreboard", "board.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--scoreboard takes --prove" in "\n".join(result.errlines)


@pytest.mark.parametrize("names", ['"R31"', ""])
def test_a_mark_names_goals_that_are_there(prove: Prove, names: str) -> None:
    board = prove(f"import pytest\n\n@pytest.mark.goal({names})\ndef test_x():\n    pass\n")
    assert board["ret"] == pytest.ExitCode.USAGE_ERROR
    assert "test_suite.py::test_x: no goal" in board["out"]


# --- what it is called


WHOLE = {"a::x": Outcome(5, 5, 1.0), "a::y": Outcome(3, 3, 2.0)}


@pytest.mark.parametrize(
    ("remains", "tests", "marked", "expected"),
    [
        ("", WHOLE, {"a::x", "a::y"}, ("proven", "")),
        ("a GPU", WHOLE, {"a::x", "a::y"}, ("partly", "still without a GPU")),
        ("a GPU", WHOLE | {"a::y": Outcome(2, 3, 1.0, ("y at 2",), ("z",))}, {"a::x"}, ("failed", "y at 2")),
        (
            "a GPU",
            WHOLE | {"a::y": Outcome(0, 0, 0, (), ("y (skipped)",))},
            set(),
            ("unproven", "not run: y (skipped)"),
        ),
        ("", WHOLE, {"a::x", "a::y", "b::z"}, ("unproven", "not run: `b::z`")),
        ("", {"a::x": Outcome(0, 0)}, {"a::x"}, ("unproven", "not run to its end")),
        ("", {"a::x": Outcome(4, 5)}, {"a::x"}, ("unproven", "not run to its end")),
        ("", {}, {"a::x"}, ("unproven", "not run")),
        ("a GPU", {}, set(), ("unproven", "no test yet")),
        ("all of it: no GPU", {}, set(), ("unproven", "all of it: no GPU")),
        ("", {f"a::{n}": Outcome(0, 1, 0, (str(n),)) for n in range(5)}, set(), ("failed", "0; 1; 2; and 2 more")),
    ],
)
def test_only_what_was_run_whole_is_proven(
    remains: str, tests: dict[str, Outcome], marked: set[str], expected: tuple[str, str]
) -> None:
    assert judge(Goal("", remains), Row(1, "", {}, [], tests), marked) == expected


def test_the_page_has_a_line_for_every_goal_and_says_where_it_was_run() -> None:
    other = MACHINE | {"cores": 64}
    notes = ["kills: start 10 | save 35", "``` ends nothing"]
    cut = Outcome(17, 1000, 7300.0, ("`a::y[1|2]` at case 17,\nseed 6",))
    board = {
        "R7": Row(5, "2026-11-20", MACHINE, notes, {"a::x": Outcome(1000, 1000, 90)}),
        "R9": Row(6, "2026-11-21", other, [], {"a::y": cut}),
    }
    text = page(tree_of(board, {"R7": {"a::x"}, "R9": {"a::y"}}))
    rows = [line for line in text.splitlines() if line.startswith("| R")]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == list(GOALS)
    assert rows[6].endswith("| **proven** | 1,000/1,000 | 5 | 2026-11-20 | 90 s | 1 |")
    assert rows[8].endswith("| **failed**: `a::y[1\\|2]` at case 17, seed 6 | 17/1,000 | 6 | 2026-11-21 | 2.0 h | 2 |")
    assert "**1 proven, 0 partly, 1 failed, 28 unproven.**" in text
    assert "1. abacus, 2 cores, Linux, Python 3.11.9, PyTorch 2.13.0\n2. abacus, 64 cores" in text
    assert "### R7\n\n```text\nkills: start 10 | save 35\n''' ends nothing\n```\n" in text


@pytest.mark.parametrize(("seconds", "said"), [(0.02, "1 s"), (119.4, "119 s"), (120, "2 min"), (9000, "2.5 h")])
def test_durations(seconds: float, said: str) -> None:
    assert scoreboard.duration(seconds) == said


def test_marks_are_found_in_the_source(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        "import pytest\n"
        "pytestmark = [pytest.mark.long, pytest.mark.goal('R1')]\n"
        "@pytest.mark.goal('R2', 'R3')\n"
        "def test_x(): ...\n"
        "@pytest.mark.parametrize('n', [1, pytest.param(2, marks=pytest.mark.goal('R4'))])\n"
        "def test_y(n): ...\n"
        "def helper(): ...\n"
    )
    x, y = "test_a.py::test_x", "test_a.py::test_y"
    assert marked_tests(tmp_path, root=tmp_path) == {"R1": {x, y}, "R2": {x}, "R3": {x}, "R4": {y}}


# --- what is committed


@pytest.fixture(scope="module")
def marked() -> dict[str, set[str]]:
    return marked_tests(scoreboard.ROOT / "tests")


def test_every_goal_that_is_not_left_whole_has_a_test(marked: dict[str, set[str]]) -> None:
    assert list(GOALS) == [f"R{number}" for number in range(1, 31)]
    assert marked.keys() <= GOALS.keys()
    assert [name for name, goal in GOALS.items() if not goal.remains and name not in marked] == []
    assert [name for name, goal in GOALS.items() if goal.remains.startswith("all of it") and name in marked] == []


def test_the_committed_scoreboard_is_up_to_date(marked: dict[str, set[str]]) -> None:
    again = "run: python tests/scoreboard.py"
    written = json.loads(scoreboard.BOARD.read_text(encoding="utf-8"))
    tree = json.loads(json.dumps(tree_of(scoreboard.load(scoreboard.BOARD), marked)))
    assert written == tree, again
    assert scoreboard.BOARD.with_suffix(".md").read_text(encoding="utf-8") == page(tree), again
