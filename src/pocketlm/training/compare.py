"""Runs beside each other: how fast each became how good, and where their configurations differ. Torch is not loaded.

The measure is the validation loss, where the runs have the same tokenizer. Where they have not, a token is not the
same piece of text, and nats per token say nothing of each other: then it is bits per byte.

The goal is the best value of the run whose best is the worst, which all of them reach; how many tokens and seconds
each took to come there says who learns faster. Between two evaluations the curve is taken for straight.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pocketlm.config import FREE_FIELDS, differing
from pocketlm.errors import UsageError
from pocketlm.model import sizes
from pocketlm.training import curve
from pocketlm.training.log import Record, is_finite
from pocketlm.training.story import Story, read_story

MOST = curve.HUES
MEASURED = {"peak_flops", "reasons"}
"""What of resolved.toml is a time, or words."""
SAME_TEXT = 0.01
"""How far the bytes that two tokenizers score may lie apart, as a share: of each document the first token is none."""

Measure = Literal["loss", "bits_per_byte"]
Axis = Literal["tokens", "elapsed_s"]
Values = dict[str, list[Any]]
"""By name, one value for each run."""


@dataclass(frozen=True)
class Side:
    """One of the runs."""

    story: Story
    tokenizer: str
    """Hex SHA-256 of the tokenizer in its newest checkpoint; its name where there is none."""

    @property
    def name(self) -> str:
        return str(self.story.folder)

    @property
    def evaluations(self) -> list[Record]:
        return [record for record in self.story.records["eval"] if is_finite(record.get("loss"))]

    def points(self, measure: Measure, axis: Axis) -> list[curve.Point]:
        """What each evaluation measured, over tokens or over seconds of training."""
        found = [record for record in self.evaluations if is_finite(record.get(measure))]
        return [(self._x(record["step"], axis), float(record[measure])) for record in found]

    def training(self) -> list[curve.Point]:
        """The training loss of each step over tokens."""
        tokens = self.story.config.train.tokens_per_step
        found = [record for record in self.story.records["train"] if is_finite(record.get("loss"))]
        return [(float(record["step"] * tokens), float(record["loss"])) for record in found]

    def _x(self, step: int, axis: Axis) -> float:
        if axis == "tokens":
            return float(step * self.story.config.train.tokens_per_step)
        done = bisect_right(self._steps, step)
        return float(self.story.records["train"][done - 1].get("elapsed_s", 0.0)) if done else 0.0

    @cached_property
    def _steps(self) -> list[int]:
        return [record["step"] for record in self.story.records["train"]]

    def figures(self) -> dict[str, Any]:
        """What is told of it, as plain values; None for what was not measured."""
        train, config = self.story.records["train"], self.story.config
        last = self.evaluations[-1] if self.evaluations else {}
        best = min(self.evaluations, key=lambda record: float(record["loss"]), default={})
        rates = [record["tokens_per_s"] for record in train if is_finite(record.get("tokens_per_s"))]
        return {
            "run": self.name,
            "parameters": sizes.parameters(config.model).total,
            "step": self.story.step,
            "total_steps": config.train.total_steps,
            "tokens": self.story.step * config.train.tokens_per_step,
            "elapsed_s": train[-1].get("elapsed_s") if train else None,
            "tokens_per_s": statistics.median(rates) if rates else None,
            "loss": train[-1].get("smoothed_loss") if train else None,
            "val_loss": last.get("loss"),
            "best_val_loss": best.get("loss"),
            "best_step": best.get("step"),
            "bits_per_byte": last.get("bits_per_byte"),
            "best_bits_per_byte": best.get("bits_per_byte"),
        }


@dataclass(frozen=True)
class Comparison:
    """What may be said of some runs together."""

    sides: list[Side]
    measure: Measure
    notes: list[str]
    """What must be known to read it rightly."""

    def curves(self, axis: Axis) -> list[list[curve.Point]]:
        return [side.points(self.measure, axis) for side in self.sides]

    @property
    def goal(self) -> float | None:
        """The worst of the best values; None while a run has no evaluation."""
        bests = [min((y for _, y in points), default=math.nan) for points in self.curves("tokens")]
        return None if any(map(math.isnan, bests)) else max(bests)

    def to_goal(self, axis: Axis) -> list[float | None]:
        """The tokens or seconds in which each run reached the goal."""
        goal = self.goal
        return [None if goal is None else curve.reached(points, goal) for points in self.curves(axis)]

    def verdicts(self) -> list[str]:
        """A line for each run but the one that sets the goal: how much sooner it was there."""
        if self.goal is None:
            return []
        by_tokens, by_seconds = self.to_goal("tokens"), self.to_goal("elapsed_s")
        bests = [min(y for _, y in points) for points in self.curves("tokens")]
        slow = bests.index(max(bests))
        return [
            f"{side.name} reaches the best of {self.sides[slow].name} ({self.goal:.4f}) "
            f"{_sooner(by_tokens[slow], by_tokens[index])} in tokens, "
            f"{_sooner(by_seconds[slow], by_seconds[index])} in seconds"
            for index, side in enumerate(self.sides)
            if index != slow
        ]

    def differences(self) -> dict[str, Values]:
        """Where the runs differ: fields that change the result, free fields, and what auto became."""
        fields = differing([side.story.config for side in self.sides])
        return {
            "settings": {name: values for name, values in fields.items() if name not in FREE_FIELDS},
            "settings that are free": {name: values for name, values in fields.items() if name in FREE_FIELDS},
            "what auto became": _unlike([_settled(side.story) for side in self.sides]),
            "libraries": _unlike([side.story.versions for side in self.sides]),
        }

    def tree(self) -> dict[str, Any]:
        """Plain values."""
        reached = zip(self.to_goal("tokens"), self.to_goal("elapsed_s"), strict=True)
        runs = [
            side.figures() | {"goal_tokens": tokens, "goal_s": seconds}
            for side, (tokens, seconds) in zip(self.sides, reached, strict=True)
        ]
        differences = {name.replace(" ", "_"): values for name, values in self.differences().items()}
        return {
            "runs": runs,
            "measure": self.measure,
            "goal": self.goal,
            "verdicts": self.verdicts(),
            "differences": differences,
            "notes": self.notes,
        }


def compare(folders: Sequence[Path]) -> Comparison:
    """Reads the runs, and finds out what of them compares.

    Raises:
        UsageError: fewer than two, or more than can be told apart in a chart.
        FileError, ConfigError: a folder holds no run, or one that cannot be read.
    """
    if not 2 <= len(folders) <= MOST:
        raise UsageError(f"given {len(folders)} run(s), compare takes 2 to {MOST}: pocketlm runs compare A B")
    sides = [Side(story, _tokenizer(story)) for story in map(read_story, folders)]
    same = len({side.tokenizer for side in sides}) == 1
    notes = [] if same else ["the tokenizers differ: losses per token do not compare, bits per byte do"]
    scored = [side.evaluations[-1].get("bytes", 0) for side in sides if side.evaluations]
    if scored and max(scored) - min(scored) > SAME_TEXT * max(scored):
        counts = ", ".join(f"{count:,}" for count in scored)
        notes.append(f"they were evaluated on different texts ({counts} bytes): no figure of one says much of another")
    return Comparison(sides, "loss" if same else "bits_per_byte", notes)


def _tokenizer(story: Story) -> str:
    newest = max((story.folder / "checkpoints").glob("step-????????/tokenizer.json"), default=None)
    return story.config.data.tokenizer if newest is None else hashlib.sha256(newest.read_bytes()).hexdigest()


def _settled(story: Story) -> dict[str, Any]:
    return {name: value for name, value in story.resolved.items() if name not in MEASURED}


def _unlike(trees: Sequence[Mapping[str, Any]]) -> Values:
    """The names whose values are not the same in all of them; None where there is no value."""
    names = dict.fromkeys(name for tree in trees for name in tree)
    values = {name: [tree.get(name) for tree in trees] for name in names}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def _sooner(slow: float | None, fast: float | None) -> str:
    if not slow or not fast:
        return "as soon"
    return f"{slow / fast:.2f} times sooner" if slow >= fast else f"{fast / slow:.2f} times later"
