"""The power goes at any moment of a run: every checkpoint whose save had returned is there, and whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from children import config_of, litter, outcome
from disks import Operation
from power import FileSystem, Recorder

from pocketlm import checkpoint, files
from pocketlm.errors import FileError
from pocketlm.training.loop import train

GOES_ON_EVERY = 10


@dataclass(frozen=True)
class Recording:
    root: Path
    operations: list[Operation]
    saved: list[tuple[int, str]]
    """Name of a checkpoint, and how many operations there were when its save returned."""

    def promised(self, moment: int) -> set[str]:
        """Names of the checkpoints that must survive: saved, and no removal of them begun."""
        names = {name for at, name in self.saved if at <= moment}
        gone = {operation.path.name for operation in self.operations[:moment] if operation.kind == "rename"}
        return names - gone


@pytest.fixture(scope="module")
def recording(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """A run with several saves and prunings, by two processes."""
    root, disk, save = tmp_path_factory.mktemp("recorded"), Recorder(), checkpoint.save

    def save_and_mark(folder: Path, snapshot: checkpoint.Snapshot) -> Path:
        path = save(folder, snapshot)
        disk.mark(path.name)
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "DISK", disk)
        patch.setattr(checkpoint, "save", save_and_mark)
        train(config_of(world, train__stop_at_step=5), out=root / "run")
        train(config_of(world), out=root / "run")
    return Recording(root, disk.operations, disk.marks)


def broken_promises(recording: Recording, operations: list[Operation], moment: int, run: Path) -> list[str]:
    told = []
    for name in sorted(recording.promised(moment)):
        try:
            checkpoint.verify(run / "checkpoints" / name)
        except FileError as error:
            told.append(str(error))
    return told


def lose_power(recording: Recording, operations: list[Operation], moment: int, target: Path, luck) -> None:
    system = FileSystem(recording.root)
    system.play(operations[:moment])
    system.write_survivors(target, luck)


def test_the_model_keeps_all_that_is_synced(recording: Recording, proof, tmp_path: Path) -> None:
    """The last operations sync all of the run but the text in its lock: the model must not lose what a disk keeps."""
    system = FileSystem(recording.root)
    system.play(recording.operations)
    system.write_survivors(tmp_path / "after", proof.random(0))
    for path in (recording.root / "run").rglob("*"):
        if path.is_file() and path.name != "run.lock":
            after = tmp_path / "after" / path.relative_to(recording.root)
            assert after.read_bytes() == path.read_bytes(), path


@pytest.mark.goal("R2")
def test_no_power_cut_takes_a_checkpoint_whose_save_had_returned(
    proof, world: Path, recording: Recording, tmp_path: Path
) -> None:
    whole = outcome(world / "run")
    for case in proof.cases(40, 500):
        luck = proof.random(case)
        moment = luck.randint(0, len(recording.operations))
        lose_power(recording, recording.operations, moment, tmp_path / f"{case}", luck)
        run = tmp_path / f"{case}" / "run"
        assert broken_promises(recording, recording.operations, moment, run) == [], (case, moment)
        found = checkpoint.newest_valid(run, print)
        assert (found.name if found else "") >= max(recording.promised(moment), default=""), (case, moment)
        if case % GOES_ON_EVERY == 0:
            train(config_of(world), out=run)
            assert outcome(run)["records"] == whole["records"], (case, moment)
            assert outcome(run)["states"]["step-00000008"] == whole["states"]["step-00000008"], (case, moment)
            assert litter(run) == [], (case, moment)


@pytest.mark.parametrize("left_out", ["sync", "sync_folder"])
def test_a_protocol_that_leaves_out_its_syncs_is_found_out(
    left_out: str, proof, recording: Recording, tmp_path: Path
) -> None:
    """The test above can fail: here is what it would find."""
    operations = [
        Operation("truncate", operation.path, size=1 << 40)
        if operation.kind == left_out == "sync"
        else Operation("sync_folder", recording.root)
        if operation.kind == left_out
        else operation
        for operation in recording.operations
    ]
    broken = 0
    for case in range(20):
        luck = proof.random(case)
        moment = luck.randint(len(operations) // 2, len(operations))
        lose_power(recording, operations, moment, tmp_path / f"{case}", luck)
        broken += bool(broken_promises(recording, operations, moment, tmp_path / f"{case}" / "run"))
    assert broken >= 10
