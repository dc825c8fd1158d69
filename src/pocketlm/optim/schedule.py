r"""The learning rate's factor: pure functions of the step, so that a resume cannot disturb it.

    factor 1 |    ________            warm-up: from start_factor at step 0 to 1 at step `warmup`
             |   /        \           cosine:  half a cosine over everything after the warm-up
             |  /          \          linear:  a straight line over everything after the warm-up
             | /            \         wsd:     1, then a straight line over the last decay_fraction
           0 +-----------------       constant: 1
             0                total   at step `total` all but `constant` are at final_factor

The factor at step s is used by update number s + 1. (Cosine: Loshchilov and Hutter, 2017, eq. 5; warm-up, stable,
decay: Hu et al., MiniCPM, 2024, section 4.)

A run of T steps that is continued by N (`--additional-steps N`) ends at step T + N, under every schedule, and no step
that counts towards the result is other than it was:

    cosine   steps 0 .. T stay; then a new warm-up from final_factor to the factor of schedule.continue_lr, as long a
    linear   share of the N steps as the first was of its own, and down again to final_factor at T + N
             (re-warming and re-decaying: Ibrahim et al., 2024, section 4)
    wsd      the run of T + N steps: it goes on from the checkpoint before the decay, the factor stays 1, and the last
             decay_fraction of T + N steps decays (Hu et al., 2024, section 4.2); the old decay is no part of it
    constant goes on at 1

A continuation is two plain values in the configuration, `continued_at` (where the run had ended, each time) and
`continued_to` (the factor that it went on to): a run that is given them at the start is, bit for bit, the run that was
continued. Shares of "all steps" that lie at a run's beginning, the warm-up and the rise of Muon's momentum, are of the
steps that it was begun with: they do not move, and momentum does not rise anew.
"""

from __future__ import annotations

import math
from itertools import takewhile
from typing import NamedTuple

from pocketlm.config import ScheduleConfig

CONTINUE_FACTOR = 0.1


class Leg(NamedTuple):
    """One way up and down again: from `low` at step `begin` to `peak` over `warmup` steps, then on to step `end`."""

    begin: int
    end: int
    low: float
    peak: float
    warmup: int


def begun_with(schedule: ScheduleConfig, total_steps: int) -> int:
    """The steps that a run was begun with, of `total_steps` that it has now."""
    return schedule.begun_with or (*schedule.continued_at, total_steps)[0]


def warmup_steps(schedule: ScheduleConfig, total_steps: int) -> int:
    """Steps of warm-up: as given, or the given fraction of the steps that the run was begun with, rounded down."""
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    return int(schedule.warmup_fraction * begun_with(schedule, total_steps))


def ends(schedule: ScheduleConfig, total_steps: int) -> tuple[int, ...]:
    """The steps at which the run ends, or has ended before it was continued; under wsd those are no part of it."""
    return (total_steps,) if schedule.kind == "wsd" else (*schedule.continued_at, total_steps)


def legs(schedule: ScheduleConfig, total_steps: int) -> list[Leg]:
    """The run's legs: one, and under cosine and linear one more for each continuation."""
    warmup = warmup_steps(schedule, total_steps)
    if schedule.kind in ("wsd", "constant"):
        return [Leg(0, total_steps, schedule.start_factor, 1.0, warmup)]
    first, *others = ends(schedule, total_steps)
    found = [Leg(0, first, schedule.start_factor, 1.0, warmup)]
    for end, peak in zip(others, schedule.continued_to, strict=True):
        begin = found[-1].end
        again = min(warmup * (end - begin) // begun_with(schedule, total_steps), end - begin)
        found.append(Leg(begin, end, schedule.final_factor, peak, again))
    return found


def decay_begins(schedule: ScheduleConfig, total_steps: int) -> int:
    """wsd: the last step at the peak, from which the factor goes down."""
    most = total_steps - warmup_steps(schedule, total_steps)
    return total_steps - max(1, min(most, round(schedule.decay_fraction * total_steps)))


def factor(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """The factor on every peak rate at a step in 0 .. total_steps."""
    found = legs(schedule, total_steps)
    leg = next((leg for leg in found if step < leg.end), found[-1])
    since = step - leg.begin
    if since < leg.warmup:
        return leg.low + (leg.peak - leg.low) * since / leg.warmup
    if schedule.kind == "constant":
        return leg.peak
    decay = leg.end - leg.begin - leg.warmup
    if schedule.kind == "wsd":
        decay = leg.end - decay_begins(schedule, total_steps)
    remaining = min(1.0, (leg.end - step) / decay) if decay else 0.0
    shape = (1 - math.cos(math.pi * remaining)) / 2 if schedule.kind == "cosine" else remaining
    return schedule.final_factor + (leg.peak - schedule.final_factor) * shape


def muon_momentum(start: float, end: float, step: int, total_steps: int) -> float:
    """Muon's momentum: from start to end over the first tenth of the run, a straight line.

    Args:
        total_steps: those that the run was begun with.
    """
    rise = max(1, total_steps // 10)
    return start + (end - start) * min(1.0, step / rise)


# --- more steps


def continue_factor(schedule: ScheduleConfig, peak_lr: float) -> float:
    """The factor that a continuation goes on to."""
    if schedule.kind in ("wsd", "constant"):
        return 1.0
    if schedule.continue_lr is None:
        return max(CONTINUE_FACTOR, schedule.final_factor)
    return schedule.continue_lr / peak_lr


def alike(one: ScheduleConfig, total_steps: int, other: ScheduleConfig, other_total_steps: int) -> int:
    """How many first steps are surely the same, factors and Muon's momenta, under two plans of one run.

    The plans differ in their total steps and continuations, in nothing else.
    """
    if _beginning(one, total_steps) != _beginning(other, other_total_steps):
        return 0
    shorter, longer = sorted((total_steps, other_total_steps))
    if one.kind == "constant" or (one.kind == "wsd" and shorter == longer):
        return shorter
    if one.kind == "wsd":
        return min(decay_begins(one, total_steps), decay_begins(other, other_total_steps))
    pairs = zip(legs(one, total_steps), legs(other, other_total_steps), strict=False)
    same = [leg for leg, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return same[-1].end if same else min(shorter, warmup_steps(one, total_steps))


def _beginning(schedule: ScheduleConfig, total_steps: int) -> tuple[int, int]:
    return warmup_steps(schedule, total_steps), max(1, begun_with(schedule, total_steps) // 10)


def rests_on(schedule: ScheduleConfig, total_steps: int) -> int | None:
    """The step whose checkpoint is kept for what may come of it: it may be older than those that are kept anyway.

    Under wsd a continuation goes on from the last step before the decay. Under the others it goes on from the end, and
    the model with which the run had ended last is kept while it is continued.
    """
    if schedule.kind == "wsd":
        return decay_begins(schedule, total_steps)
    return schedule.continued_at[-1] if schedule.continued_at else None


def described(schedule: ScheduleConfig, total_steps: int, peak_lr: float) -> str:
    """The schedule in words, with AdamW's rates."""
    low, words = f"{schedule.final_factor * peak_lr:g}", []
    for number, leg in enumerate(legs(schedule, total_steps)):
        peak = f"{leg.peak * peak_lr:g}"
        up = f"from {leg.low * peak_lr:g} to {peak} over {leg.warmup:,} steps" if leg.warmup else f"from {peak}"
        again = f"and from step {leg.begin:,} again " if number else ""
        if schedule.kind == "constant":
            down = f"constant until step {leg.end:,}"
        elif schedule.kind == "wsd":
            down = f"constant until step {decay_begins(schedule, total_steps):,}, then to {low} at step {leg.end:,}"
        else:
            down = f"then to {low} at step {leg.end:,}"
        words.append(f"{again}{up}, {down}")
    return f"{schedule.kind}, {', '.join(words)}"
