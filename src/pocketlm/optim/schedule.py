r"""The learning rate's factor: pure functions of the step, so that a resume cannot disturb it.

    factor 1 |    ________            warm-up: from start_factor at step 0 to 1 at step `warmup`
             |   /        \           cosine:  half a cosine over everything after the warm-up
             |  /          \          linear:  a straight line over everything after the warm-up
             | /            \         wsd:     1, then a straight line over the last decay_fraction
           0 +-----------------       constant: 1
             0                total   at step `total` all but `constant` are at final_factor

The factor at step s is used by update number s + 1. (Cosine: Loshchilov and Hutter, 2017, eq. 5 without restarts;
warm-up, stable, decay: Hu et al., MiniCPM, 2024, section 4.)
"""

from __future__ import annotations

import math

from pocketlm.config import ScheduleConfig


def warmup_steps(schedule: ScheduleConfig, total_steps: int) -> int:
    """Steps of warm-up: as given, or the given fraction of all, rounded down."""
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    return int(schedule.warmup_fraction * total_steps)


def factor(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """The factor on every peak rate at a step in 0 .. total_steps."""
    warmup = warmup_steps(schedule, total_steps)
    if step < warmup:
        return schedule.start_factor + (1 - schedule.start_factor) * step / warmup
    if schedule.kind == "constant":
        return 1.0
    decay = total_steps - warmup
    if schedule.kind == "wsd":
        decay = max(1, min(decay, round(schedule.decay_fraction * total_steps)))
    remaining = min(1.0, (total_steps - step) / decay) if decay else 0.0
    shape = (1 - math.cos(math.pi * remaining)) / 2 if schedule.kind == "cosine" else remaining
    return schedule.final_factor + (1 - schedule.final_factor) * shape


def muon_momentum(start: float, end: float, step: int, total_steps: int) -> float:
    """Muon's momentum: from start to end over the first tenth of the run, a straight line."""
    rise = max(1, total_steps // 10)
    return start + (end - start) * min(1.0, step / rise)
