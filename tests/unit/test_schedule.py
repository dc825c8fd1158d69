"""The schedules against the seeds' own numbers and against PyTorch's schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.config import Config, ScheduleConfig
from pocketlm.optim.schedule import factor, muon_momentum, warmup_steps


def test_smallm_has_the_seeds_rates() -> None:
    config = Config.preset("smallm")
    rate = [config.optim.lr * factor(config.schedule, step, 158_000) for step in (0, 3160, 79_000, 158_000)]
    assert warmup_steps(config.schedule, 158_000) == 3160
    assert rate == pytest.approx([2e-6, 2e-4, 1.08e-4, 1e-5], rel=2e-3)


def test_smallm_follows_pytorchs_linear_and_cosine_schedulers() -> None:
    config = Config.preset("smallm", {"train.total_steps": 500})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=490, eta_min=1e-5)
    theirs = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[10])
    for step in range(500):
        assert 2e-4 * factor(config.schedule, step, 500) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_the_official_smollm2_schedule() -> None:
    config = Config.preset("smollm2-135m-official")
    at = {step: factor(config.schedule, step, 2_000_000) for step in (0, 1000, 2000, 1_600_000, 1_800_000, 2_000_000)}
    assert at == pytest.approx({0: 0, 1000: 0.5, 2000: 1, 1_600_000: 1, 1_800_000: 0.5, 2_000_000: 0})


def test_linear_and_constant() -> None:
    linear = ScheduleConfig(kind="linear", warmup_steps=10, final_factor=0.1)
    assert [factor(linear, s, 110) for s in (5, 10, 60, 110)] == pytest.approx([0.5, 1, 0.55, 0.1])
    constant = ScheduleConfig(kind="constant", warmup_steps=0)
    assert {factor(constant, s, 10) for s in range(11)} == {1.0}


@given(
    kind=st.sampled_from(["cosine", "wsd", "linear", "constant"]),
    total=st.integers(1, 300),
    warm=st.floats(0, 1),
    decay=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_a_factor_stays_between_its_ends(kind, total, warm, decay, final) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_fraction=warm, decay_fraction=decay, final_factor=final)
    factors = [factor(schedule, step, total) for step in range(total + 1)]
    assert all(math.isfinite(f) and -1e-12 <= f <= 1 + 1e-12 for f in factors)
    turn = warmup_steps(schedule, total)
    assert factors[:turn] == sorted(factors[:turn])
    assert factors[turn:] == sorted(factors[turn:], reverse=True)


def test_muons_momentum_rises_over_the_first_tenth() -> None:
    assert [muon_momentum(0.85, 0.95, s, 100) for s in (0, 5, 10, 99)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
