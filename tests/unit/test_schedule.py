"""The schedules against the seeds' own numbers and against PyTorch's schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.config import FREE_FIELDS, STEPS_FIELDS, Config, ScheduleConfig
from pocketlm.errors import ConfigError
from pocketlm.optim.schedule import (
    alike,
    begun_with,
    continue_factor,
    described,
    factor,
    muon_momentum,
    rests_on,
    warmup_steps,
)


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


# --- more steps: a run of 5,000 steps, 100 of them warm-up, with 500 and then 200 more

PEAK = 3e-4
TWICE = {"continued_at": (5000, 5500), "continued_to": (0.1, 0.05)}


def cosine(share: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return (1 + math.cos(math.pi * share)) / 2


def test_cosine_warms_up_and_decays_anew_by_hand() -> None:
    """To a tenth in 10 of 500 steps, to a twentieth in 4 of 200: warm-up is a fiftieth of each."""
    schedule = ScheduleConfig(kind="cosine", warmup_steps=100, final_factor=0.02, **TWICE)
    expected = {
        50: 0.5,
        100: 1,
        1325: 0.02 + 0.98 * cosine(0.25),
        2550: 0.51,
        5000: 0.02,
        5004: 0.02 + 0.08 * 0.4,
        5010: 0.1,
        5132.5: 0.02 + 0.08 * cosine(0.25),
        5255: 0.06,
        5500: 0.02,
        5501: 0.02 + 0.03 / 4,
        5504: 0.05,
        5602: 0.035,
        5700: 0.02,
    }
    assert {step: factor(schedule, step, 5700) for step in expected} == pytest.approx(expected)


def test_linear_goes_the_straight_ways_by_hand() -> None:
    schedule = ScheduleConfig(kind="linear", warmup_fraction=0.02, **TWICE)
    expected = {2550: 0.5, 5000: 0, 5005: 0.05, 5010: 0.1, 5255: 0.05, 5500: 0, 5504: 0.05, 5602: 0.025, 5700: 0}
    assert {step: factor(schedule, step, 5700) for step in expected} == pytest.approx(expected)


def test_wsd_decays_over_a_fifth_of_all_by_hand() -> None:
    """1,140 of 5,700 steps, from 4,560 on; the warm-up stays a fiftieth of 5,000."""
    schedule = ScheduleConfig(kind="wsd", warmup_fraction=0.02, continued_at=(5000, 5500), continued_to=(1.0, 1.0))
    expected = {50: 0.5, 99: 0.99, 100: 1, 4000: 1, 4400: 1, 4560: 1, 5130: 0.5, 5643: 0.05, 5700: 0}
    assert {step: factor(schedule, step, 5700) for step in expected} == pytest.approx(expected)
    assert rests_on(schedule, 5700) == 4560


def test_constant_goes_on_by_hand() -> None:
    schedule = ScheduleConfig(kind="constant", continued_at=(100,), continued_to=(1.0,))
    assert [factor(schedule, step, 200) for step in (0, 1, 2, 100, 101, 200)] == [0, 0.5, 1, 1, 1, 1]


def test_what_a_continuation_goes_on_to() -> None:
    assert continue_factor(ScheduleConfig(kind="cosine"), PEAK) == 0.1
    assert continue_factor(ScheduleConfig(kind="cosine", continue_lr=6e-5), PEAK) == pytest.approx(0.2)
    assert continue_factor(ScheduleConfig(kind="linear", final_factor=0.3), PEAK) == 0.3, "it is no way down"
    assert continue_factor(ScheduleConfig(kind="wsd"), PEAK) == 1
    assert continue_factor(ScheduleConfig(kind="constant"), PEAK) == 1


def test_what_is_printed_before_the_first_step() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_steps=100, start_factor=0.01, **TWICE)
    assert described(schedule, 5700, PEAK) == (
        "cosine, from 3e-06 to 0.0003 over 100 steps, then to 0 at step 5,000, "
        "and from step 5,000 again from 0 to 3e-05 over 10 steps, then to 0 at step 5,500, "
        "and from step 5,500 again from 0 to 1.5e-05 over 4 steps, then to 0 at step 5,700"
    )
    wsd = ScheduleConfig(kind="wsd", warmup_steps=0, final_factor=0.1)
    assert described(wsd, 5000, PEAK) == "wsd, from 0.0003, constant until step 4,000, then to 3e-05 at step 5,000"
    assert described(ScheduleConfig(kind="constant"), 100, PEAK).endswith("over 2 steps, constant until step 100")


plans = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["cosine", "wsd", "linear", "constant"]),
        "warmup_fraction": st.floats(0, 1),
        "decay_fraction": st.floats(0, 1),
        "final_factor": st.floats(0, 0.5),
    }
)


@given(plan=plans, total=st.integers(1, 200), more=st.lists(st.integers(1, 100), max_size=3), other=st.integers(1, 400))
def test_steps_that_are_counted_as_alike_are_alike(plan, total, more, other) -> None:
    """Against a continuation, and against another end of the same beginning: factors and momenta, step by step."""
    one = ScheduleConfig(**plan)
    sums = [total + sum(more[:count]) for count in range(len(more) + 1)]
    peaks = [continue_factor(one, PEAK)] * len(more)
    continued = one.model_copy(update={"continued_at": tuple(sums[:-1]), "continued_to": tuple(peaks)})
    moved = one.model_copy(update={"begun_with": total})
    for changed, end in ((continued, sums[-1]), (moved, other)):
        count = alike(one, total, changed, end)
        assert count <= min(total, end)
        for step in range(count):
            assert factor(one, step, total) == factor(changed, step, end)
            momenta = [muon_momentum(0.85, 0.95, step, begun_with(*run)) for run in ((one, total), (changed, end))]
            assert momenta[0] == momenta[1]
    assert plan["kind"] == "wsd" or alike(one, total, continued, sums[-1]) == total, "what was done stays"


@given(fraction=st.floats(0, 1), warmup=st.floats(0, 1), total=st.integers(1, 300), more=st.integers(1, 300))
def test_wsd_can_always_go_on_from_before_its_decay(fraction: float, warmup: float, total: int, more: int) -> None:
    one = ScheduleConfig(kind="wsd", decay_fraction=fraction, warmup_fraction=warmup)
    longer = one.model_copy(update={"continued_at": (total,), "continued_to": (1.0,)})
    before = rests_on(one, total)
    assert before is not None
    assert alike(one, total, longer, total + more) >= before


def test_the_fields_of_the_steps_are_no_free_ones() -> None:
    assert not FREE_FIELDS & STEPS_FIELDS


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"continued_at": [60], "continued_to": [0.1]}, "below 60"),
        ({"continued_at": [40, 30], "continued_to": [0.1, 0.1]}, "steps that rise"),
        ({"continued_at": [40]}, "one factor for each step"),
        ({"continue_lr": 0.02}, "given 0.02, allowed is 0 to 0.01"),
        ({"continue_lr": 0.001, "final_factor": 0.2}, "allowed is 0.002 to 0.01"),
        ({"continue_lr": 0.001, "kind": "wsd"}, "wsd goes on at the peak"),
    ],
)
def test_steps_that_cannot_be(fields: dict, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.preset("debug", {f"schedule.{name}": value for name, value in fields.items()})
    assert told in str(caught.value)
