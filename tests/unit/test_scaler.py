"""The loss scale of fp16: its rule, what an overflow leaves alone, and that a step is the fp32 step but for rounding.

Computed on a CPU, too, which the engine can do and users are refused.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pocketlm import machine
from pocketlm.config import Config
from pocketlm.errors import UsageError
from pocketlm.model.arithmetic import ATTENTION_ON
from pocketlm.training import resolve, scaler
from pocketlm.training.guard import APPLIED, LEAP, NO_GRADIENT, NO_LOSS
from pocketlm.training.loop import train
from pocketlm.training.probe import RandomRows
from pocketlm.training.run import new_state
from pocketlm.training.scaler import OVERFLOW, LossScaler, after
from pocketlm.training.state import TrainState
from pocketlm.training.step import Outcome, train_step

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "PROBE_S", 0.001)
    monkeypatch.setattr(resolve, "SLOW_ON_A_CPU", ())


def config_of(dtype: str = "fp16", **fields: Any) -> Config:
    named = {name.replace("__", "."): value for name, value in fields.items()}
    return Config.preset("debug", {"train.dtype": dtype, "optim.kind": "muon"} | named)


def on(device: torch.device) -> dict[str, str]:
    kernel, _ = ATTENTION_ON.get(device.type, ("sdpa", ""))
    return {"train__device": device.type, "train__attention": kernel}


def state_of(config: Config) -> TrainState:
    runtime = machine.start(config.train, None)
    return new_state(config, resolve.resolve(config, runtime), runtime)


def step(state: TrainState, config: Config, micro_batch: int = 8) -> Outcome:
    return train_step(state, RandomRows(config), config, micro_batch)


def everything(state: TrainState) -> dict[str, Tensor]:
    """All that an update may write, copied."""
    parameters = dict(state.precision.model.named_parameters())
    copies = {f"copy.{name}": tensor for name, tensor in state.precision.copies.items()}
    tensors = parameters | copies | state.optimizer.tensors() | state.guard.tensors()
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def ruled(scale: float, good_steps: int, verdict: int, interval: int) -> tuple[int, float, int]:
    """The rule again, in Python's numbers."""
    if verdict == NO_GRADIENT:
        return (OVERFLOW, scale / 2, 0) if scale > 1 else (NO_GRADIENT, 1.0, 0)
    if good_steps + 1 == interval:
        return verdict, min(2 * scale, 2.0**24), 0
    return verdict, scale, good_steps + 1


@pytest.mark.goal("R13")
@pytest.mark.parametrize("first", [1.0, 2.0**16, 2.0**24])
def test_scale_and_verdicts_are_those_of_the_rule(
    first: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaler, "GOOD_STEPS", 3)
    rng, ours, want = random.Random(f"{first}"), LossScaler(device), (APPLIED, first, 0)
    ours.scale.fill_(first)
    seen = set()
    for _ in range(400):
        verdict = rng.choice([APPLIED] * 6 + [NO_LOSS, LEAP] + [NO_GRADIENT] * 3)
        want = ruled(want[1], want[2], verdict, 3)
        got = int(ours.judge(torch.tensor(verdict, device=device)))
        assert (got, float(ours.scale), int(ours.good_steps)) == want
        seen.add(got)
    assert seen >= {APPLIED, OVERFLOW, NO_LOSS, LEAP}


def test_it_doubles_after_two_thousand_good_steps() -> None:
    one = torch.tensor(APPLIED)
    scale, count = torch.tensor(2.0**16), torch.tensor(0)
    for number in range(2000):
        assert (float(scale), int(count)) == (2.0**16, number)
        _, scale, count = after(scale, count, one)
    assert (float(scale), int(count)) == (2.0**17, 0)


def test_at_the_smallest_scale_the_guards_verdict_stands() -> None:
    verdict, scale, _ = after(torch.tensor(1.0), torch.tensor(5), torch.tensor(NO_GRADIENT))
    assert (int(verdict), float(scale)) == (NO_GRADIENT, 1.0)


@pytest.mark.goal("R13")
@pytest.mark.parametrize("micro_batch", [8, 3])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_overflow_changes_nothing_but_the_scale(kind: str, micro_batch: int, device: torch.device) -> None:
    config = config_of(optim__kind=kind, **on(device))
    state = state_of(config)
    assert state.scaler is not None
    assert int(step(state, config, micro_batch).verdict) == APPLIED
    before, updates = everything(state), state.optimizer.updates
    state.scaler.scale.fill_(2.0**24)
    outcome = step(state, config, micro_batch)
    assert int(outcome.verdict) == OVERFLOW
    assert outcome.loss.isfinite()
    assert not outcome.grad_norm.isfinite()
    assert outcome.loss_scale == 2.0**24
    assert (float(state.scaler.scale), int(state.scaler.good_steps)) == (2.0**23, 0)
    now = everything(state)
    for name, tensor in before.items():
        assert torch.equal(tensor, now[name]), name
    assert (state.optimizer.updates, state.progress.step) == (updates, 2)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_scale_enters_no_figure_and_no_update(clip: float | None, device: torch.device) -> None:
    """Whatever it is, the step is that of fp32 but for rounding; with micro-batches summed, too."""
    there = on(device)
    exact = state_of(config_of("fp32", optim__clip=clip, **there))
    truth = step(exact, config_of("fp32", optim__clip=clip, **there))
    for scale, micro_batch in ((2.0**4, 8), (2.0**12, 8), (2.0**12, 3)):
        config = config_of(optim__clip=clip, **there)
        state = state_of(config)
        assert state.scaler is not None
        state.scaler.scale.fill_(scale)
        outcome = step(state, config, micro_batch)
        assert float(outcome.loss) == pytest.approx(float(truth.loss), rel=1e-4)
        assert float(outcome.grad_norm) == pytest.approx(float(truth.grad_norm), rel=2e-3)
        for name, moment in exact.optimizer.tensors().items():
            ours = state.optimizer.tensors()[name]
            assert (ours - moment).norm() < 0.02 * moment.norm(), name


def test_only_fp16_has_a_scale_in_its_state() -> None:
    names = {dtype: set(state_of(config_of(dtype)).shapes()[1]) for dtype in ("fp32", "bf16", "fp16")}
    assert names["fp32"] == names["bf16"], "checkpoints of before have no more"
    assert names["fp16"] - names["bf16"] == {"scaler.scale", "scaler.good_steps"}


def test_a_user_on_a_cpu_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UsageError, match=r"given fp16, which is for GPUs without bf16; on a CPU take auto, bf16 or fp3"
    ):
        train(config_of())
    assert not Path("data").exists()
    with pytest.raises(UsageError, match="given fp16"):
        state_of(config_of())  # as `pocketlm plan` and `bench` do


@pytest.mark.parametrize(("has_bf16", "half"), [(True, "bf16"), (False, "fp16")])
def test_auto_takes_fp16_where_a_gpu_has_no_bf16(has_bf16: bool, half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    candidates = resolve._candidates(config_of("auto"), torch.device("cuda"))
    assert candidates == ("fp32", half)
    assert resolve._dtype(config_of("auto"), candidates, {"fp32": 1e12, half: 4e12}) == (  # type: ignore[dict-item]
        half,
        f"{half} products run at 4.0 times the rate of fp32 here",
    )
    assert resolve._candidates(config_of("auto"), CPU) == ("fp32", "bf16")
    assert resolve._candidates(config_of("fp16"), torch.device("cuda")) == ("fp16",)
