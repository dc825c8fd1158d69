"""Runs in fp16, whose loss scale overflows again and again: stopped or not they are the same run, and nearly fp32's.

On a CPU, which users are refused: the arithmetic is that of a GPU, the speed is not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracle
import pytest

from pocketlm.cli import eval as eval_command
from pocketlm.config import Config
from pocketlm.training import resolve, scaler
from pocketlm.training.loop import train

FIELDS = {"train.total_steps": 30, "train.eval_every": 10, "train.checkpoint_every": 10, "train.micro_batch": 4}


@pytest.fixture(autouse=True)
def _on_this_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "PROBE_S", 0.001)
    monkeypatch.setattr(resolve, "SLOW_ON_A_CPU", ())


def trained(name: str, dtype: str = "fp16", **fields: Any) -> Path:
    named = {name.replace("__", "."): value for name, value in fields.items()}
    return train(Config.preset("debug", FIELDS | {"train.dtype": dtype} | named), out=Path(name))


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in oracle.journal(run) if record["kind"] == kind]


@pytest.mark.goal("R4")
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_stopped_and_resumed_through_overflows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale grows every third step until it overflows; one stop is between an overflow and its record's save."""
    monkeypatch.setattr(scaler, "GOOD_STEPS", 3)
    monkeypatch.setattr(scaler, "FIRST", 2.0**20)
    whole = trained("whole", optim__kind=kind)
    overflows = [record["step"] for record in of_kind(whole, "overflow")]
    assert len(overflows) > 3
    assert not of_kind(whole, "skip")
    assert not of_kind(whole, "rollback")
    for stop in (overflows[0], overflows[-2], 29):
        trained("run", optim__kind=kind, train__stop_at_step=stop)
    oracle.assert_equal(trained("run", optim__kind=kind), whole)
    state = oracle.state(oracle.newest(whole))
    assert {name for name in state if "scaler" in name} == {
        f"training/optimizer.safetensors:scaler.{name}" for name in ("scale", "good_steps")
    }
    assert int(state["updates"]) == 30 - len(overflows), "an overflow is no update"


def test_fifty_steps_follow_fp32(capsys: pytest.CaptureFixture[str]) -> None:
    """And `pocketlm eval` of the checkpoint says what training measured, in fp16."""
    half, exact = trained("half", train__total_steps=50), trained("exact", "fp32", train__total_steps=50)
    assert not of_kind(half, "overflow")
    losses, truth = ([record["loss"] for record in of_kind(run, "train")] for run in (half, exact))
    assert losses == pytest.approx(truth, abs=0.01)
    assert losses != truth
    assert truth[-1] < truth[0] - 2, "nothing was learned: near losses would mean little"
    capsys.readouterr()
    assert eval_command.run(["half", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["dtype"] == "fp16"
    assert said["loss"] == of_kind(half, "eval")[-1]["loss"]
