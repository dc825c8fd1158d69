"""A disk that refuses a checkpoint or a line of the journal while a run goes on."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketlm import checkpoint, files
from pocketlm.cli.main import main
from pocketlm.config import Config
from pocketlm.disk import Disk
from pocketlm.errors import FileError, Interrupted
from pocketlm.journal import Journal
from pocketlm.training.log import Silent
from pocketlm.training.loop import train
from pocketlm.training.saving import THREAD


class FullDisk(Disk):
    """Refuses every write while `full`, after the first half of it; the writes of saves in those of these steps."""

    def __init__(self) -> None:
        self.full = False
        self.once = False
        """Whether there is room again after one refusal."""
        self.refused_saves: range = range(0)
        self.saving = 0

    def write(self, descriptor: int, data: bytes | memoryview) -> None:
        beside = threading.current_thread().name == THREAD
        if self.saving in self.refused_saves if beside else self.full:
            self.full = self.full and not self.once
            view = memoryview(data).cast("B")
            super().write(descriptor, view[: len(view) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(descriptor, data)


class Story(Silent):
    """Remembers the notes, and acts when a step has been recorded."""

    def __init__(self, at_step: Callable[[int], None]) -> None:
        self.notes: list[str] = []
        self.at_step = at_step

    def note(self, text: str) -> None:
        self.notes.append(text)

    def record(self, record: object) -> None:
        assert isinstance(record, dict)
        if record["kind"] == "train":
            self.at_step(record["step"])


def config_of(on_save_error: str = "stop") -> Config:
    fields = {"train.total_steps": 20, "train.eval_every": 0, "train.checkpoint_every": 5, "train.keep_last": 9}
    return Config.preset("debug", fields | {"train.on_save_error": on_save_error})


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    monkeypatch.chdir(tmp_path)
    full, save = FullDisk(), checkpoint.save

    def save_a_step(checkpoints: Path, snapshot: checkpoint.Snapshot) -> Path:
        full.saving = snapshot.step
        return save(checkpoints, snapshot)

    monkeypatch.setattr(files, "DISK", full)
    monkeypatch.setattr(checkpoint, "save", save_a_step)
    return full


def full_between(disk: FullDisk, first: int, last: int) -> Story:
    """For lines of the journal when steps are recorded, for saves by their step: the two go on beside each other."""
    disk.refused_saves = range(first, last)

    def at_step(step: int) -> None:
        disk.full = first <= step < last

    return Story(at_step)


def steps(run: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run)]


def clean(run: Path) -> bool:
    return not [path for path in run.rglob("*.tmp-*")]


@pytest.mark.goal("R11")
def test_a_refused_checkpoint_stops_the_run_and_says_what_it_needs(disk: FullDisk) -> None:
    whole = train(config_of(), out=Path("whole"))
    disk.refused_saves = range(10, 11)
    what = r"cannot save step 10 \(it needs [\d,]+ bytes, [\d,]+ are free\): No space left on device"
    with pytest.raises(FileError, match=what) as e:
        train(config_of(), out=Path("run"))
    assert e.value.exit_code == 3
    run, disk.refused_saves = Path("run"), range(0)
    assert steps(run) == [0, 5]
    assert clean(run)
    for path in checkpoint.list_checkpoints(run):
        checkpoint.verify(path)
    train(config_of(), out=run)
    newest = "checkpoints/step-00000020"
    assert checkpoint.state_hash(run / newest) == checkpoint.state_hash(whole / newest)


@pytest.mark.goal("R11")
def test_told_to_go_on_a_run_goes_on_and_loses_no_record(disk: FullDisk) -> None:
    whole = train(config_of(), out=Path("whole"))
    story = full_between(disk, 8, 13)
    run = train(config_of("go-on"), out=Path("run"), listener=story)
    assert steps(run) == [0, 5, 15, 20]
    assert clean(run)
    assert sum("cannot save step 10" in note for note in story.notes) == 1
    assert any("cannot write to run/metrics.jsonl: No space left on device; training goes on" in n for n in story.notes)
    mine, theirs = (Journal.read(folder / "metrics.jsonl") for folder in (run, whole))
    assert [record.get("loss") for record in mine] == [record.get("loss") for record in theirs]
    newest = "checkpoints/step-00000020"
    assert checkpoint.state_hash(run / newest) == checkpoint.state_hash(whole / newest)


@pytest.mark.goal("R11")
def test_told_to_go_on_the_last_checkpoint_still_must_succeed(disk: FullDisk) -> None:
    with pytest.raises(FileError, match="cannot save step 20"):
        train(config_of("go-on"), out=Path("run"), listener=full_between(disk, 18, 99))
    disk.full, disk.refused_saves = False, range(0)
    assert steps(Path("run")) == [0, 5, 10, 15]
    train(config_of("go-on"), out=Path("run"))
    assert steps(Path("run"))[-1] == 20


@pytest.mark.goal("R11")
def test_a_disk_that_is_full_from_the_start_is_one_line(disk: FullDisk, capsys: pytest.CaptureFixture[str]) -> None:
    train(config_of(), out=Path("prepared"))
    disk.full = True
    assert main(["train", "debug", "--out", "run"]) == 3
    lines = capsys.readouterr().err.strip().splitlines()
    assert "No space left on device" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    disk.full = False
    assert main(["train", "debug", "--out", "run"]) == 0


@pytest.mark.goal("R11")
def test_a_signal_while_a_record_is_refused_loses_no_figure(disk: FullDisk) -> None:
    """The record of step 7 is refused once, a signal is there, and step 8, whose figures nobody has read, is done."""
    train(config_of(), out=Path("whole"))
    disk.once = True

    def at_step(step: int) -> None:
        if step == 7:
            disk.full = True
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="step 8, saved"):
        train(config_of(), out=Path("run"), listener=Story(at_step))
    train(config_of(), out=Path("run"))
    mine, theirs = (Journal.read(Path(folder) / "metrics.jsonl") for folder in ("run", "whole"))
    assert [(record["step"], record.get("loss")) for record in mine] == [(r["step"], r.get("loss")) for r in theirs]
    newest = "checkpoints/step-00000020"
    assert checkpoint.state_hash(Path("run") / newest) == checkpoint.state_hash(Path("whole") / newest)
