"""Writes the table of docs/train.md: the learning rate under --additional-steps, for each schedule.

    python tools/schedule_table.py

The table follows from optim/schedule.py alone; a test compares it with what stands there.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from pocketlm.config import ScheduleConfig
from pocketlm.optim.schedule import continue_factor, factor

PAGE = Path(__file__).parents[1] / "docs" / "train.md"
BEGIN, END = "<!-- Written by tools/schedule_table.py. Do not edit. -->\n", "<!-- End of the table. -->\n"
PEAK, TOTAL, ADDITIONAL, WARMUP = 3e-4, 5000, 500, 100
STEPS = (0, 50, 100, 2550, 4000, 4400, 4500, 4999, 5000, 5005, 5010, 5255, 5499, 5500)


def table() -> str:
    """A row a step; before `TOTAL` the run as it was begun, and the columns of the continued run."""
    schedules = {kind: ScheduleConfig(kind=kind, warmup_steps=WARMUP) for kind in _kinds()}
    head = ["after step", *(f"`{kind}`" for kind in schedules), "`wsd` without the 500"]
    rows = [
        [f"{step:,}", *(_rate(continued(s), step, TOTAL + ADDITIONAL) for s in schedules.values())] for step in STEPS
    ]
    for step, row in zip(STEPS, rows, strict=True):
        row.append(_rate(schedules["wsd"], step, TOTAL) if step <= TOTAL else "")
    lines = [f"| {' | '.join(row)} |\n" for row in [head, *rows]]
    return "".join([lines[0], "|" + "-:|" * len(head) + "\n", *lines[1:]])


def continued(schedule: ScheduleConfig) -> ScheduleConfig:
    """As the run itself writes it down."""
    return schedule.model_copy(update={"continued_at": (TOTAL,), "continued_to": (continue_factor(schedule, PEAK),)})


def page() -> str:
    """The whole page with the table as it is now."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


def _kinds() -> tuple[str, ...]:
    return get_args(ScheduleConfig.model_fields["kind"].annotation)


def _rate(schedule: ScheduleConfig, step: int, total_steps: int) -> str:
    return f"{PEAK * factor(schedule, step, total_steps):.3g}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
