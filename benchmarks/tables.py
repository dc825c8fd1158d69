"""What is measured against whom: shapes, contestants, and the ratios that pocketlm must reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Goal:
    """pocketlm's tokens/s over a peer's."""

    floor: float
    goal: float
    memory: float | None = None
    """Largest share of the peer's peak memory."""


@dataclass(frozen=True)
class Table:
    """One model at one batch."""

    preset: str
    rows: int
    context: int
    contestants: tuple[str, ...]
    goals: Mapping[str, Goal]
    """By peer."""
    gib: Mapping[str, float]
    """What a contestant may take, to know how many fit at once: the entry of the longest name that it begins with."""
    tolerance: float = 0.0
    """How far the number of parameters may be from pocketlm's, as a share."""
    most_mib: float | None = None
    """pocketlm's own limit of memory."""
    notes: tuple[str, ...] = field(default=())

    def gib_of(self, name: str) -> float:
        return self.gib[max((begin for begin in self.gib if name.startswith(begin)), key=len)]


OURS = ("pocketlm+eager", "pocketlm+compile")
"""Both by name: which of them `auto` takes depends on how long the run is, and goals hold for both."""

TABLES: Mapping[str, Table] = {
    "smollm2-512": Table(
        preset="smollm2-135m",
        rows=2,
        context=512,
        contestants=(
            *OURS,
            *("transformers+bf16", "litgpt+bf16", "transformers+bf16+malloc", "litgpt+bf16+malloc"),
            *("lightning+bf16", "lightning+bf16+malloc", "transformers", "litgpt"),
            *("transformers+bf16+compile+malloc", "litgpt+bf16+compile+fused+malloc"),
            *("litgpt+bf16+compile", "lightning+bf16+compile+malloc"),
        ),
        goals={
            "transformers+bf16": Goal(2.0, 2.6),
            "transformers+bf16+malloc": Goal(1.3, 1.6),
            "litgpt+bf16": Goal(1.7, 2.2),
        },
        gib={"": 5.0, "pocketlm": 5.6},
    ),
    "smollm2-2048": Table(
        preset="smollm2-135m",
        rows=2,
        context=2048,
        contestants=(*OURS, "transformers+bf16", "litgpt+bf16", "transformers+bf16+malloc", "litgpt+bf16+malloc"),
        goals={"transformers+bf16": Goal(1.2, 1.5, memory=0.65)},
        gib={"": 9.5, "transformers+bf16+malloc": 12.0, "litgpt+bf16+malloc": 12.0, "pocketlm": 7.6},
    ),
    "smallm": Table(
        preset="smallm",
        rows=31,
        context=256,
        contestants=(
            *OURS,
            *("transformers+bf16", "litgpt+bf16", "transformers+bf16+malloc", "litgpt+bf16+malloc"),
            *("lightning+bf16", "transformers", "transformers+bf16+compile+malloc", "litgpt+bf16+compile+fused+malloc"),
        ),
        goals={"transformers+bf16": Goal(3.0, 4.0)},
        gib={"": 6.5, "transformers+bf16+malloc": 10.0, "litgpt+bf16+malloc": 10.0, "pocketlm": 3.0},
        tolerance=0.01,
        most_mib=2500 * 1e6 / 2**20,
        notes=(
            "transformers has no model like smallm: its contestant, and Lightning's, is a GPT-2 of 9 layers x 256 with "
            "an MLP of 1,088, 1.0 % fewer parameters.",
            "litgpt's has smallm's own architecture but rotary positions, and its own padding of the vocabulary.",
        ),
    ),
    "debug": Table(
        preset="debug",
        rows=8,
        context=32,
        contestants=(*OURS, "transformers+bf16", "litgpt+bf16", "lightning+bf16"),
        goals={},
        gib={"": 0.5},
        tolerance=0.5,
        notes=("No figure of this table means anything: it is there to try the driver.",),
    ),
}
