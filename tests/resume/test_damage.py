"""What a run does with damage, refusals and numbers that are none: it says so, and loses nothing that is whole."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pocketlm import checkpoint, files
from pocketlm.config import Config
from pocketlm.errors import ConfigError, Diverged, Interrupted
from pocketlm.files import write_file, write_manifest
from pocketlm.journal import Journal
from pocketlm.reading import read_manifest, sha256_of, verify_folder
from pocketlm.training import boundary
from pocketlm.training.log import RunInfo, Silent
from pocketlm.training.loop import train


class Notes(Silent):
    """Remembers what a person would have been told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def started(self, info: RunInfo) -> None:
        self.lines += info.lines


def config_of(**fields: Any) -> Config:
    base = {"train.total_steps": 20, "train.eval_every": 10, "train.checkpoint_every": 5, "train.keep_last": 9}
    return Config.preset("debug", base | {name.replace("__", "."): value for name, value in fields.items()})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return train(config_of(), out=Path("run"))


def steps(run: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run)]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in Journal.read(run / "metrics.jsonl") if record["kind"] == "train"]


def damage(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def test_all_damaged_begins_afresh_and_ends_with_whole_checkpoints(run: Path) -> None:
    whole, weights = losses(run), sha256_of(run / "checkpoints/step-00000020/model.safetensors")
    for folder in checkpoint.list_checkpoints(run):
        damage(folder)
    notes = Notes()
    train(config_of(train__keep_last=2), out=run, listener=notes)
    assert sum("begins afresh" in line and "step-" in line for line in notes.lines) == 5
    assert losses(run) == whole
    assert 20 in steps(run)
    for folder in checkpoint.list_checkpoints(run):
        verify_folder(folder)
    assert sha256_of(run / "checkpoints/step-00000020/model.safetensors") == weights


def test_damaged_newest_ones_do_not_outlive_whole_ones(run: Path) -> None:
    weights = sha256_of(run / "checkpoints/step-00000020/model.safetensors")
    for step in (15, 20):
        damage(run / f"checkpoints/step-{step:08d}")
    train(config_of(train__keep_last=2, train__stop_at_step=12), out=run)
    assert checkpoint.step_of(checkpoint.find_checkpoint(run, print)) == 12
    train(config_of(), out=run)
    assert sha256_of(run / "checkpoints/step-00000020/model.safetensors") == weights


def test_a_refused_way_back_changes_nothing(run: Path) -> None:
    before = sorted(str(path) for path in run.rglob("*"))
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.5, 0\.01"):
        train(config_of(optim__lr=0.5), out=run, resume=str(run / "checkpoints/step-00000010"))
    assert sorted(str(path) for path in run.rglob("*")) == before


def test_a_signal_in_an_evaluation_drops_it_and_it_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = train(config_of(train__eval_every=3), out=Path("whole"))
    real = boundary.evaluate_stream

    def evaluate_and_signal(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(boundary, "evaluate_stream", evaluate_and_signal)
        with pytest.raises(Interrupted, match="stopped by SIGTERM at step 3, saved") as caught:
            train(config_of(train__eval_every=3), out=Path("run"))
    assert caught.value.exit_code == 143
    assert steps(Path("run")) == [0, 3]
    assert [record["kind"] for record in Journal.read(Path("run/metrics.jsonl"))] == ["train"] * 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    run = train(config_of(train__eval_every=3), out=Path("run"))
    newest = "checkpoints/step-00000020"
    assert checkpoint.state_hash(run / newest) == checkpoint.state_hash(whole / newest)


def test_a_last_evaluation_that_was_broken_off_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = train(config_of(train__eval_every=0), out=Path("whole"))

    def signal_instead(*arguments: Any, check: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        check()

    with monkeypatch.context() as patch:
        patch.setattr(boundary, "evaluate_stream", signal_instead)
        with pytest.raises(Interrupted, match="at step 20, saved"):
            train(config_of(train__eval_every=0), out=Path("run"))
    assert steps(Path("run"))[-1] == 20
    run = train(config_of(train__eval_every=0), out=Path("run"))
    newest = "checkpoints/step-00000020"
    assert checkpoint.state_hash(run / newest) == checkpoint.state_hash(whole / newest)
    notes = Notes()
    train(config_of(train__eval_every=0), out=run, listener=notes)
    assert notes.lines == [f"{run} is complete: step 20 of 20; --additional-steps N trains it further"]


@pytest.mark.parametrize("due", ["train__eval_every", "sample__every", "train__checkpoint_every"])
def test_numbers_that_are_none_are_never_saved(due: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quiet: dict[str, Any] = {"train__eval_every": 0, "sample__every": 0, "train__checkpoint_every": 90}
    with pytest.raises(Diverged, match="not finite") as caught:
        train(config_of(**(quiet | {due: 1, "optim__lr": 1e38, "schedule__start_factor": 1.0})), out=Path("run"))
    assert caught.value.exit_code == 4
    assert steps(Path("run")) == [0]


def test_losses_that_are_none_are_skipped_and_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Diverged, match="9 of the last 128 steps were skipped; gone back 3 time"):
        train(config_of(train__eval_every=0, train__checkpoint_every=90, optim__lr=1e30), out=Path("run"))
    assert steps(Path("run")) == [0]


@pytest.mark.parametrize("tail", [b'{"step": 21, "lo', b"\0\0\0\0garbage\n", b"[1]\n", b"\xff\xfe\n{}\n"])
def test_a_torn_journal_does_not_block_a_whole_checkpoint(run: Path, tail: bytes) -> None:
    whole = losses(run)
    for step in (15, 20):
        damage(run / f"checkpoints/step-{step:08d}")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    train(config_of(), out=run)
    assert losses(run) == whole


def test_another_library_or_device_is_said_and_lowers_the_promise(run: Path) -> None:
    newest = run / "checkpoints/step-00000015"
    state = json.loads((newest / checkpoint.STATE).read_text())
    state["versions"]["torch"] = "2.9.0"
    state["resolved"]["device"] = "cuda"
    entry = write_file(newest / checkpoint.STATE, json.dumps(state).encode())
    write_manifest(newest, read_manifest(newest) | {checkpoint.STATE: entry})
    notes = Notes()
    train(config_of(), out=run, resume=str(newest), listener=notes)
    text = "\n".join(notes.lines)
    assert "torch was 2.9.0, is 2." in text
    assert "device was cuda, is cpu" in text
    assert "determinism: same-data" in text
    assert ", cpu, 1 thread(s)" in text


def test_every_new_folder_is_on_the_disk_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files.DISK, "sync_folder", synced.append)
    files.make_folder(tmp_path / "runs" / "mine" / "checkpoints")
    assert synced[-3:] == [tmp_path, tmp_path / "runs", tmp_path / "runs" / "mine"]
