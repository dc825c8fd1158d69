"""A signal ends a run at a step boundary, with a checkpoint, and the same command goes on bit for bit."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pocketlm import checkpoint
from pocketlm.config import Config
from pocketlm.files import Journal, verify_folder
from pocketlm.training.loop import train

FIELDS = {"train.total_steps": 4000, "train.eval_every": 0, "train.checkpoint_every": 4000, "train.log_every": 1}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_a_signal_stops_with_a_checkpoint(
    number: signal.Signals, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [word for name, value in FIELDS.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "pocketlm.cli.main", "train", "debug", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step      3 "):
                process.send_signal(number)
                break
        rest = process.stderr.read()
    assert process.returncode == code
    assert "the same command goes on" in rest
    assert "Traceback" not in rest

    run = Path("runs/debug")
    _, stopped = checkpoint.list_checkpoints(run)
    verify_folder(stopped)
    step = checkpoint.step_of(stopped)
    assert 3 <= step < 4000
    losses = [record["loss"] for record in Journal.read(run / "metrics.jsonl")]
    assert len(losses) == step

    onward = FIELDS | {"train.stop_at_step": step + 3}
    train(Config.preset("debug", onward), out=run)
    train(Config.preset("debug", onward), out=Path("runs/whole"))
    assert [record["loss"] for record in Journal.read(run / "metrics.jsonl")] == [
        record["loss"] for record in Journal.read(Path("runs/whole/metrics.jsonl"))
    ]
