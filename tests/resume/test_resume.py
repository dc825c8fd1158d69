"""What a resume must not ask again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch

from pocketlm import machine
from pocketlm.cli.main import main
from pocketlm.config import Config
from pocketlm.model import arithmetic
from pocketlm.training.log import Silent
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


def test_a_run_begun_before_a_field_was_auto_goes_on_with_what_it_had(tmp_path: Path) -> None:
    """Of one configuration to its end: its old checkpoints stay its own, and go as they would have."""
    fields = {"train.total_steps": 8, "train.checkpoint_every": 2, "train.keep_last": 2, "train.keep_best": 0}
    old = Config.preset("debug", fields | {"train.loss_chunk": 1024, "train.stop_at_step": 4})
    run, heard = train(old, out=tmp_path / "run"), Notes()
    train(Config.preset("debug", fields), out=run, listener=heard)
    assert "loss_chunk = 1024" in (run / "config.toml").read_text()
    assert not [note for note in heard.notes if "another run" in note]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]


FAST = {"train.total_steps": 4, "train.attention": "folded", "train.fp32_matmul": "medium", "sample.prompts": []}


def test_where_fp32_would_be_rounded_a_resume_and_an_eval_take_the_exact_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = train(Config.preset("debug", FAST | {"train.stop_at_step": 2}), out=Path("run"))
    monkeypatch.setattr(arithmetic, "fp32_error", lambda: 1e-3)
    assert main(["eval", "run", "--limit", "40"]) == 0
    assert "elsewhere" not in capsys.readouterr().err, "on the same machine it is as it was chosen"
    monkeypatch.setattr(machine, "cpu_name", lambda: "another")
    assert main(["eval", "run", "--limit", "40"]) == 0
    assert "was trained elsewhere: fp32_matmul is highest, not medium" in capsys.readouterr().err
    heard = Notes()
    train(Config.preset("debug", FAST), out=run, listener=heard)
    assert torch.get_float32_matmul_precision() == "highest"
    said = "\n".join(heard.notes)
    assert "the run computes otherwise from here on: fp32_matmul is highest, not medium" in said
    assert "is another," in said
    after = oracle.state(oracle.newest(run))
    names = ("fp32_matmul", "attention", "determinism")
    assert [after[f"resolved.{name}"] for name in names] == ['"highest"', '"folded"', '"same-data"']


def test_a_run_taken_up_again_is_the_one_that_was_never_stopped(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process, for what has no other: bit for bit where that is promised."""
    monkeypatch.chdir(tmp_path)
    bitwise, (kernel, _) = device.type in machine.BITWISE_ON, arithmetic.ATTENTION_ON.get(device.type, ("sdpa", ""))
    fields = {"train.device": device.type, "train.attention": kernel, "optim.kind": "muon", "train.total_steps": 6}
    fields |= {"train.determinism": "bitwise" if bitwise else "same-data", "sample.prompts": []}
    whole = train(Config.preset("debug", fields), out=Path("whole"))
    for stop in (2, 6):
        parts = train(Config.preset("debug", fields | {"train.stop_at_step": stop}), out=Path("parts"))
    ours, theirs = (oracle.moments(oracle.newest(run)) for run in (parts, whole))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if bitwise:
            assert torch.equal(ours[name], tensor), name
        else:
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_an_eval_takes_the_threads_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    try:
        train(Config.preset("debug", FAST | {"train.threads": 2}), out=Path("run"))
        torch.set_num_threads(1)
        assert main(["eval", "run", "--limit", "40"]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
