"""Runs beside each other: every number here is worked out by hand, from journals that were made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pages import check_inert

from pocketlm.config import FREE_FIELDS, Config, differing
from pocketlm.errors import FileError, UsageError
from pocketlm.training import curve
from pocketlm.training.compare import Comparison, compare
from pocketlm.training.compare_words import tables, write_page


def run_of(
    folder: Path,
    losses: dict[int, float],
    *,
    rate: float = 512,
    tokenizer: str = "same",
    scored: int = 1000,
    **fields: Any,
) -> Path:
    """A run of 256 tokens a step and `rate` tokens a second, with the validation losses by step; 2 bits a nat."""
    config = Config.preset("debug", {name.replace("__", "."): value for name, value in fields.items()})
    records = []
    for step in range(1, max(losses) + 1):
        elapsed = {"tokens_per_s": rate * (1 + step % 2), "elapsed_s": step * 256 / rate}
        records.append({"kind": "train", "step": step, "loss": 5 - step / 100, "smoothed_loss": 4.5, **elapsed})
        if step in losses:
            bits = {"bits_per_byte": losses[step] * 2, "bytes": scored}
            records.append({"kind": "eval", "step": step, "loss": losses[step], **bits})
    checkpoint = folder / "checkpoints" / "step-00000000"
    checkpoint.mkdir(parents=True)
    (checkpoint / "tokenizer.json").write_text(tokenizer)
    (folder / "config.toml").write_text(config.to_toml())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def two(home: Path, **slow: Any) -> Comparison:
    """The fast run comes to the slow one's best, 3.0, half way between its steps 10 and 20."""
    return compare(
        [
            run_of(home / "slow", {10: 4.0, 20: 3.5, 40: 3.0}, **slow),
            run_of(home / "fast", {10: 3.5, 20: 2.5, 40: 2.0}, rate=256, optim__lr=0.5),
        ]
    )


# --- curves


def test_a_curve_is_straight_between_its_points() -> None:
    points = [(0.0, 4.0), (10.0, 2.0), (20.0, 3.0)]
    assert [curve.at(points, x) for x in (-1, 0, 5, 10, 15, 20, 21)] == [None, 4, 3, 2, 2.5, 3, None]
    assert curve.at([(7.0, 1.0)], 7) == 1
    assert curve.at([], 0) is None


def test_a_curve_reaches_a_height_where_it_first_crosses_it() -> None:
    points = [(0.0, 4.0), (10.0, 2.0), (20.0, 3.0), (30.0, 1.0)]
    assert [curve.reached(points, y) for y in (5, 4, 3, 2, 1.5, 1, 0.5)] == [0, 0, 5, 10, 27.5, 30, None]
    assert curve.reached([], 1) is None


def test_two_curves_to_the_character() -> None:
    """y from 3.08 down to 0.92 in four rows of 0.54; each curve has every other one of eight columns, x = 0, 1, ... 7.

    The falling one is at 2.5, 1.5 and 1 where it is drawn; at 0 there is none yet.
    """
    falling, flat = [(1.0, 3.0), (5.0, 1.0), (7.0, 1.0)], [(1.0, 1.0), (7.0, 1.0)]
    assert curve.terminal_curves({"A": falling, "B": flat, "C": []}, 14, 6) == [
        "2.81 ┤        ",
        "     │  A     ",
        "1.73 ┤    A   ",
        "1.19 ┤ B B BAB",
        "     └────────",
        "      0      7",
    ]
    assert curve.terminal_curves({}, 14, 6) == []


# --- what is said


def test_who_learns_faster(tmp_path: Path) -> None:
    """40 steps against 15 in tokens; 40 steps of half a second against 15 of one in seconds."""
    found = two(tmp_path)
    assert found.measure == "loss"
    assert found.goal == 3.0
    assert found.to_goal("tokens") == [40 * 256, 15 * 256]
    assert found.to_goal("elapsed_s") == [20, 15]
    slow, fast = tmp_path / "slow", tmp_path / "fast"
    assert found.verdicts() == [
        f"{fast} reaches the best of {slow} (3.0000) 2.67 times sooner in tokens, 1.33 times sooner in seconds"
    ]
    assert found.notes == []


def test_the_figures_of_a_run(tmp_path: Path) -> None:
    figures = two(tmp_path).sides[1].figures()
    assert figures == {
        "run": str(tmp_path / "fast"),
        "parameters": 26_816,
        "step": 40,
        "total_steps": 60,
        "tokens": 40 * 256,
        "elapsed_s": 40.0,
        "tokens_per_s": 384.0,  # the median of 256 and 512, twenty times each
        "loss": 4.5,
        "val_loss": 2.0,
        "best_val_loss": 2.0,
        "best_step": 40,
        "bits_per_byte": 4.0,
        "best_bits_per_byte": 4.0,
    }


def test_of_other_tokenizers_only_bits_are_compared(tmp_path: Path) -> None:
    found = two(tmp_path, tokenizer="another")
    assert (found.measure, found.goal) == ("bits_per_byte", 6.0)
    assert found.notes == ["the tokenizers differ: losses per token do not compare, bits per byte do"]


def test_of_other_texts_it_is_said(tmp_path: Path) -> None:
    assert two(tmp_path / "near", scored=1009).notes == []
    (note,) = two(tmp_path / "far", scored=1100).notes
    assert note.startswith("they were evaluated on different texts (1,100, 1,000 bytes)")


def test_a_run_without_an_evaluation_leaves_the_rest_standing(tmp_path: Path) -> None:
    empty = run_of(tmp_path / "empty", {1: float("nan")})
    found = compare([empty, run_of(tmp_path / "other", {10: 3.0})])
    assert (found.goal, found.to_goal("tokens"), found.verdicts()) == (None, [None, None], [])
    assert found.sides[0].figures()["val_loss"] is None
    assert tables(found)[0][2][0] == ("parameters", "26,816", "26,816")


def test_where_configurations_differ(tmp_path: Path) -> None:
    found = two(tmp_path, train__log_every=7)
    (tmp_path / "fast" / "resolved.toml").write_text('[resolved]\ndtype = "bf16"\n[versions]\ntorch = "2.13"\n')
    (tmp_path / "slow" / "resolved.toml").write_text('[resolved]\ndtype = "fp32"\npeak_flops = 3\n[versions]\n')
    found = compare([Path(side.name) for side in found.sides])
    assert found.differences() == {
        "settings": {"optim.lr": [0.01, 0.5]},
        "settings that are free": {"train.log_every": [7, 5]},
        "what auto became": {"dtype": ["fp32", "bf16"]},
        "libraries": {"torch": [None, "2.13"]},
    }
    assert found.tree()["differences"]["settings_that_are_free"] == {"train.log_every": [7, 5]}
    assert ("optim.lr", "0.01", "0.5") in tables(found)[1][2]


def test_differing_and_differences_are_of_one_mind() -> None:
    mine, theirs = Config.preset("debug"), Config.preset("debug", {"name": "x", "optim.lr": 1.0, "sample.top_k": 3})
    fields = differing([mine, theirs])
    assert fields == {"optim.lr": [0.01, 1.0], "sample.top_k": [0, 3]}
    assert mine.differences(theirs) == ["optim.lr: 0.01, 1.0"]
    assert fields.keys() & FREE_FIELDS == {"sample.top_k"}
    assert differing([mine, mine, mine]) == {}


def test_two_to_six_runs(tmp_path: Path) -> None:
    folders = [run_of(tmp_path / str(number), {10: 3.0 + number}) for number in range(7)]
    assert len(compare(folders[:6]).verdicts()) == 5
    for wrong in (folders[:1], folders):
        with pytest.raises(UsageError, match=r"compare takes 2 to 6"):
            compare(wrong)
    with pytest.raises(FileError, match=r"no run: it has no config\.toml"):
        compare([folders[0], tmp_path])


def test_the_page_is_inert_and_has_every_curve(tmp_path: Path) -> None:
    evil = "</td><script>alert(1)</script>"
    found = two(tmp_path, data__source=f"files:{evil}")
    write_page(found, tmp_path / "out" / "compare.html")
    page = check_inert((tmp_path / "out" / "compare.html").read_text())
    assert page.tags["svg"] == 6  # three charts, each with its plot inside
    assert page.tags["polyline"] == 12  # a line and its mark in the legend, for two runs
    assert f"files:{evil}"[:38] in page.text
    assert found.verdicts()[0] in page.text
