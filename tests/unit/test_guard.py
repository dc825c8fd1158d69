"""The guard's verdicts against statistics in plain Python, and its history."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from pocketlm.config import GuardConfig
from pocketlm.training.guard import APPLIED, REASONS, SMALLEST_LEAP, Guard

NAN, INF = math.nan, math.inf
LOSS, GRADIENT, LEAP = (
    REASONS.index(f"the {what}") for what in ("loss is not finite", "gradient is not finite", "loss leaps")
)


CPU = torch.device("cpu")


def guard_of(window: int = 8, sigma: float = 6.0, device: torch.device = CPU) -> Guard:
    return Guard(GuardConfig(window=window, spike_sigma=sigma), device)


def verdict(guard: Guard, loss: float, norm: float = 1.0) -> int:
    there = guard.losses.device
    return int(guard.verdict(torch.tensor(loss, device=there), torch.tensor(norm, device=there)))


def expected(history: list[float], loss: float, norm: float, window: int, sigma: float) -> int:
    """The rule again, in Python floats."""
    if not math.isfinite(loss):
        return LOSS
    if not math.isfinite(norm):
        return GRADIENT
    known = history[-window:]
    if sigma == 0 or len(known) < max(1, window // 2):
        return APPLIED
    limit = statistics.fmean(known) + max(sigma * statistics.pstdev(known), SMALLEST_LEAP)
    return LEAP if loss > limit else APPLIED


@pytest.mark.goal("R13")
@pytest.mark.parametrize("broken", [NAN, INF, -INF])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(broken: float, device: torch.device) -> None:
    guard = guard_of(device=device)
    assert verdict(guard, broken) == LOSS
    assert verdict(guard, 3.0, broken) == GRADIENT
    assert verdict(guard, broken, broken) == LOSS
    assert verdict(guard, 3.0) == APPLIED
    assert all(tensor.isfinite().all() for tensor in guard.tensors().values())


@pytest.mark.goal("R14")
@pytest.mark.parametrize(("window", "sigma"), [(8, 6.0), (9, 3.0), (32, 6.0), (2, 6.0), (16, 0.0)])
def test_verdicts_are_those_of_the_rule(window: int, sigma: float, device: torch.device) -> None:
    rng, guard, history = random.Random(f"{window} {sigma}"), guard_of(window, sigma, device), list[float]()
    seen = set()
    for step in range(400):
        loss = 3.0 + rng.gauss(0, 0.3) + (rng.choice([0, 1, 4, 9]) if rng.random() < 0.1 else 0)
        loss = rng.choice([NAN, INF]) if rng.random() < 0.05 else loss
        norm = rng.choice([NAN, INF]) if rng.random() < 0.05 else rng.random()
        loss32 = float(torch.tensor(loss))
        want = expected(history, loss32, norm, window, sigma)
        assert verdict(guard, loss, norm) == want, step
        seen.add(want)
        if want == APPLIED:
            history.append(loss32)
    assert seen == {APPLIED, LOSS, GRADIENT} | ({LEAP} if sigma else set())


def test_a_small_rise_is_no_leap_however_still_the_loss_was() -> None:
    guard = guard_of()
    for _ in range(8):
        assert verdict(guard, 0.1) == APPLIED
    assert verdict(guard, 0.1 + SMALLEST_LEAP - 0.01) == APPLIED
    guard.reset()
    for _ in range(8):
        verdict(guard, 0.1)
    assert verdict(guard, 0.1 + SMALLEST_LEAP + 0.01) == LEAP


@pytest.mark.goal("R14")
def test_a_history_taken_up_again_gives_the_same_verdicts() -> None:
    rng, whole = random.Random(5), guard_of(window=32)
    losses = [3.0 + rng.gauss(0, 0.2) + 5 * (step == 30) for step in range(40)]
    for loss in losses[:19]:
        verdict(whole, loss)
    resumed = guard_of(window=32)
    resumed.load({name: tensor.clone() for name, tensor in whole.tensors().items()})
    rest = [verdict(whole, loss) for loss in losses[19:]]
    assert [verdict(resumed, loss) for loss in losses[19:]] == rest
    assert LEAP in rest
