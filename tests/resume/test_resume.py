"""What a resume must not ask again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest

from pocketlm.config import Config
from pocketlm.training.loop import train


def test_a_resume_never_probes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketlm.training import micro_batch, resolve

    monkeypatch.chdir(tmp_path)
    fields = {"train.total_steps": 6, "train.tokens_per_step": 8192, "train.dtype": "auto", "train.micro_batch": "auto"}
    monkeypatch.setattr(resolve, "matmul_rate", lambda config, device, dtype: {4: 1e9, 2: 3e9}[dtype.itemsize])
    run = train(Config.preset("debug", fields | {"train.stop_at_step": 3}), out=Path("run"))
    assert resolved(run) == {"step": "3", "dtype": '"bf16"', "micro_batch": "128"}
    monkeypatch.setattr(resolve, "matmul_rate", lambda config, device, dtype: {4: 3e9, 2: 1e9}[dtype.itemsize])
    monkeypatch.setattr(micro_batch, "FULL_SPEED_TOKENS", 32)
    train(Config.preset("debug", fields), out=run)
    assert resolved(run) == {"step": "6", "dtype": '"bf16"', "micro_batch": "128"}


def resolved(run: Path) -> dict[str, Any]:
    state = oracle.state(oracle.newest(run))
    return {name.rpartition(".")[2]: state[name] for name in ("step", "resolved.dtype", "resolved.micro_batch")}
