"""Saves that go on beside the training: the disk may be as slow as it likes, the run becomes the same.

The disk is held back by events, never by time: until the run itself waits for the save, or has done so many steps.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
from inside import join_the_save, poison
from rig import Rig
from world import EVERY, TRAIN, Whole, trained

from pocketlm import checkpoint, pruning, reading
from pocketlm.config import Config
from pocketlm.errors import Diverged, FileError, Interrupted
from pocketlm.training import halving, saving
from pocketlm.training.log import Silent
from pocketlm.training.loop import train

ROWS = 8  # of a step
GONE_S = 20.0
PATIENCE_S = 60.0


def config_of(**fields: Any) -> Config:
    base = {"train.total_steps": 20, "train.eval_every": 10, "train.checkpoint_every": 5, "train.keep_last": 9}
    guard = {"guard.window": 8, "guard.max_skips": 3}
    return Config.preset("debug", base | guard | {name.replace("__", "."): value for name, value in fields.items()})


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class SlowDisk:
    """Holds the save of one step until `go`; `waits` is called when the run waits for a save that is under way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        self.step, self.go = step, threading.Event()
        self.begun: list[int] = []
        """The steps whose save the disk has been given."""
        self.refusal: OSError | None = None
        self.waits: Callable[[saving.Saver], None] = lambda saver: self.go.set()
        self._save, self._wait = checkpoint.save, saving.Saver.wait
        monkeypatch.setattr(checkpoint, "save", self._held)
        monkeypatch.setattr(saving.Saver, "wait", lambda saver: self._waited_for(saver))

    def _held(self, checkpoints: Path, snapshot: checkpoint.Snapshot) -> Path:
        self.begun.append(snapshot.step)
        if snapshot.step == self.step:
            assert self.go.wait(PATIENCE_S)
            if self.refusal:
                raise self.refusal
        return self._save(checkpoints, snapshot)

    def _waited_for(self, saver: saving.Saver) -> None:
        under_way = saver._under_way
        if under_way and under_way[0].snapshot.step == self.step and not self.go.is_set():
            self.waits(saver)
        self._wait(saver)


def states(run: Path) -> dict[int, str]:
    return {checkpoint.step_of(path): oracle.state_hash(path) for path in checkpoint.list_checkpoints(run)}


@pytest.mark.goal("R2")
@pytest.mark.parametrize("step", [0, 5, 10, 15, 20])
def test_the_next_save_waits_for_one_that_is_held_back(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is written at last is the state of its own step, not of the steps that were done meanwhile."""
    whole = train(config_of(), out=Path("whole"))
    disk, waited_at = SlowDisk(monkeypatch, step), list[int]()

    def waits(saver: saving.Saver) -> None:
        assert checkpoint.list_checkpoints(Path("run"))[step // 5 :] == [], "the next one is not begun either"
        waited_at.append(saver.state.progress.step)
        disk.go.set()

    disk.waits = waits
    run = train(config_of(), out=Path("run"))
    assert waited_at == [min(step + 5, 20)]
    assert disk.begun == [0, 5, 10, 15, 20]
    assert states(run) == states(whole)
    oracle.assert_equal(run, whole)


@pytest.mark.goal("R14")
def test_a_way_back_waits_for_the_save_that_it_may_lead_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trouble comes four steps after step 20, while the disk still holds its save back."""
    poison(monkeypatch, {index * ROWS for index in range(20, 24)})
    config = config_of(train__total_steps=30)
    whole = train(config, out=Path("whole"))
    disk, waited_at = SlowDisk(monkeypatch, 20), list[int]()

    def waits(saver: saving.Saver) -> None:
        waited_at.append(saver.state.progress.step)
        disk.go.set()

    disk.waits = waits
    run = train(config, out=Path("run"))
    assert waited_at[0] in (24, 25), "the verdict of step 24 is read when the next one is done"
    (back,) = [record for record in oracle.journal(run) if record["kind"] == "rollback"]
    assert (back["step"], back["from_step"]) == (20, 24)
    assert states(run) == states(whole)
    oracle.assert_equal(run, whole)


@pytest.mark.goal("R14")
def test_a_run_that_ends_in_trouble_ends_its_save_first(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {index * ROWS for index in range(20, 24)})
    disk = SlowDisk(monkeypatch, 20)
    with pytest.raises(Diverged, match="as often as it may"):
        train(config_of(train__total_steps=30, guard__max_rollbacks=0), out=Path("run"))
    assert disk.begun[-1] == 20
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(Path("run"))] == [0, 5, 10, 15, 20]
    assert not [thread for thread in threading.enumerate() if thread.name == saving.THREAD]
    oracle.assert_whole(Path("run"))


class Story(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.goal("R11")
@pytest.mark.parametrize("then", ["stop", "go-on"])
def test_an_error_beside_the_training_is_known_at_the_next_step(then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk refuses the save of step 10 in the middle of step 12: step 13 is begun only where the run goes on."""
    whole = train(config_of(), out=Path("whole"))
    story, steps, real = Story(), list[int](), halving.train_step
    with monkeypatch.context() as patch:
        disk = SlowDisk(patch, 10)
        disk.refusal = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def step(state: Any, *arguments: Any, **options: Any) -> Any:
            steps.append(state.progress.step + 1)
            told = [note for note in story.notes if "cannot save step 10" in note]
            assert len(told) == (steps[-1] > 12), "not before, and only once"
            outcome = real(state, *arguments, **options)
            if steps[-1] == 12:
                disk.go.set()
                join_the_save()
            return outcome

        patch.setattr(halving, "train_step", step)
        if then == "stop":
            with pytest.raises(FileError, match=r"cannot save step 10 .*: No space left on device") as caught:
                train(config_of(), out=Path("run"), listener=story)
            assert caught.value.exit_code == 3
            assert steps[-1] == 12
            assert list(states(Path("run"))) == [0, 5]
        else:
            train(config_of(train__on_save_error="go-on"), out=Path("run"), listener=story)
            assert list(states(Path("run"))) == [0, 5, 15, 20]
    run = train(config_of(), out=Path("run"))
    oracle.assert_equal(run, whole)


@pytest.mark.goal("R11", "R19")
@pytest.mark.parametrize("known", ["at the boundary", "when it is waited for"])
def test_a_refused_save_does_not_keep_the_last_from_being_made(known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk refuses step 10 and has room again; the signal comes in step 12, which is saved."""
    whole = train(config_of(), out=Path("whole"))
    story, real = Story(), halving.train_step
    with monkeypatch.context() as patch:
        disk = SlowDisk(patch, 10)
        disk.refusal = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def step(state: Any, *arguments: Any, **options: Any) -> Any:
            outcome = real(state, *arguments, **options)
            if outcome.progress.step == 12:
                os.kill(os.getpid(), signal.SIGTERM)
                if known == "at the boundary":
                    disk.go.set()
                    join_the_save()
            return outcome

        patch.setattr(halving, "train_step", step)
        with pytest.raises(Interrupted) as caught:
            train(config_of(), out=Path("run"), listener=story)
    assert caught.value.exit_code == 143
    assert sum("cannot save step 10" in note for note in story.notes) == 1
    assert list(states(Path("run"))) == [0, 5, 12]
    oracle.assert_equal(train(config_of(), out=Path("run")), whole)


@pytest.mark.goal("R9")
@pytest.mark.parametrize("name", ["model.safetensors", "training/optimizer.safetensors", "training/state.json"])
def test_what_the_medium_changed_after_it_was_written_lets_nothing_go(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte of each checkpoint but the first is another one when the thread reads it again."""
    save, story = checkpoint.save, Story()

    def changed(checkpoints: Path, snapshot: checkpoint.Snapshot) -> Path:
        folder = save(checkpoints, snapshot)
        if snapshot.step:
            data = bytearray((folder / name).read_bytes())
            data[len(data) // 2] ^= 1
            (folder / name).write_bytes(data)
        return folder

    monkeypatch.setattr(checkpoint, "save", changed)
    run = train(config_of(train__keep_last=2), out=Path("run"), listener=story)
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run)] == [0, 5, 10, 15, 20]
    for step in (5, 10, 15, 20):
        assert any(f"step-{step:08d}/{name} is damaged" in note for note in story.notes), story.notes


def test_a_save_hashes_no_tensors_that_it_reads_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, real = set[str](), reading.sha256_of
    monkeypatch.setattr(reading, "sha256_of", lambda path: (hashed.add(path.name), real(path))[1])
    run = train(config_of(train__keep_last=2, train__keep_best=0), out=Path("run"))
    assert hashed >= {"state.json", "config.toml"}
    assert not hashed & {"model.safetensors", "optimizer.safetensors"}
    kept = [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run)]
    assert kept[-2:] == [15, 20]
    assert 5 not in kept, "it is what pruning removes that is read for"


def test_without_a_thread_a_save_is_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(config_of(), out=Path("whole"))
    story, start = Story(), threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name == saving.THREAD:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    run = train(config_of(), out=Path("run"), listener=story)
    assert story.notes.count("can't start new thread: training waits for each save") == 1
    assert states(run) == states(whole)


def test_what_no_disk_refuses_comes_out_where_the_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of ours in the thread is no note: it ends the run as it would have in the main thread."""

    def broken(*arguments: Any, **options: Any) -> Any:
        raise ZeroDivisionError("a mistake")

    with monkeypatch.context() as patch:
        patch.setattr(pruning, "prune", broken)
        with pytest.raises(ZeroDivisionError, match="a mistake"):
            train(config_of(), out=Path("run"))
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(Path("run"))] == [0]


@pytest.mark.goal("R19")
def test_a_signal_while_a_save_is_held_back(rig: Rig, whole: Whole) -> None:
    """It waits for that save, then saves the last step that was done."""
    child = rig.start(TRAIN, phases=("signal", "step", "wait"), holds=[("save", 3)])
    child.reach("save", 3)
    child.reach("step", 2 * EVERY + 2)
    child.kill(signal.SIGTERM)
    child.reach("signal", 1, "leave")
    child.release()
    assert child.wait(GONE_S) == 143, child.stderr
    run = rig.folder / "run"
    assert f"saved {Path('run')}/checkpoints/step-{2 * EVERY:08d}" in child.stderr
    assert oracle.steps(run)[-1] == trained(run) > 2 * EVERY
    oracle.assert_whole(run)
    rig.run(TRAIN)
    oracle.assert_equal(run, whole.run)
