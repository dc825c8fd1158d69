"""Compiled blocks: stopped and taken up again they are the same run, and they are the eager one but for rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch

from pocketlm.config import Config
from pocketlm.training.loop import train

# PyTorch's compiler warns of PyTorch's own parts, and hides what it does not mean.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
FIELDS = {
    "train.total_steps": 6,
    "train.tokens_per_step": 8 * 32,
    "train.micro_batch": 4,
    "train.attention": "folded",
    "train.eval_tokens": 256,
    "optim.lr": 2e-3,
    "sample.prompts": [],
}


@pytest.fixture(autouse=True)
def in_a_new_folder(compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def trained(name: str, **fields: Any) -> Path:
    torch._dynamo.reset()  # as a new process
    return train(
        Config.preset("debug", FIELDS | {f"train.{field}": value for field, value in fields.items()}), out=Path(name)
    )


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in oracle.journal(run) if record["kind"] == "train"]


@pytest.mark.long
@pytest.mark.goal("R4")
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_compiled_blocks_are_the_same_run_stopped_or_not(recompute: bool) -> None:
    fields = {"dtype": "bf16", "gradient_checkpointing": recompute}
    whole = trained("whole", compile="on", **fields)
    trained("run", compile="on", stop_at_step=3, **fields)
    oracle.assert_equal(trained("run", compile="on", **fields), whole)
    assert oracle.state(oracle.newest(whole))["resolved.compile"] == "true"
    eager = losses(trained("eager", compile="off", **fields))
    assert losses(whole) == pytest.approx(eager, abs=5e-3)
    assert losses(whole) != eager, "nothing was compiled"
