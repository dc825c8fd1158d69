"""A process that is killed at any operation of a save loses nothing: the rerun ends as if nobody had killed it."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from children import Children, config_of, litter, outcome
from disks import KILLED, REAL, Counting, Operation

from pocketlm import checkpoint, files
from pocketlm.journal import Journal
from pocketlm.training.loop import train

LARGE_BYTES = 4096
PERCENTS = (0, 25, 50, 75, 99)


@dataclass(frozen=True)
class Kill:
    at: int
    kind: str
    percent: int
    path: Path
    newest: str | None
    """The checkpoint that is whole then."""


@pytest.fixture(scope="module")
def operations(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Operation]:
    """All of the saves of an undisturbed run, in their order."""
    disk = Counting()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "DISK", disk)
        train(config_of(world), out=tmp_path_factory.mktemp("counted") / "run")
    return disk.of(beside=True)


def commits_of(operations: list[Operation]) -> list[int]:
    """Where a checkpoint gets its name."""
    return [
        number
        for number, operation in enumerate(operations)
        if operation.target is not None and re.fullmatch(r"step-\d{8}", operation.target.name)
    ]


def save_around(operations: list[Operation], commit: int) -> range:
    """From the sync of the journal to the last operation of the pruning."""
    journal = [i for i, operation in enumerate(operations) if operation.path.name == "metrics.jsonl"]
    assert {operations[i].kind for i in journal} == {"sync"}
    begin = max(i for i in journal if i < commit)
    return range(begin, min((i for i in journal if i > commit), default=len(operations)))


def kills_of(operations: list[Operation]) -> list[Kill]:
    """Before each operation of the first, a middle and the last save, and within each of its large writes."""
    commits = commits_of(operations)
    kills = []
    for commit in (commits[0], commits[len(commits) // 2], commits[-1]):
        for at in save_around(operations, commit):
            operation = operations[at]
            named = [operations[i].target for i in commits if i < at]
            newest = named[-1].name if named and named[-1] else None
            percents = PERCENTS if len(operation.data) >= LARGE_BYTES else (0,)
            kills += [Kill(at, operation.kind, percent, operation.path, newest) for percent in percents]
    return kills


def test_the_operations_of_a_save_are_those_of_the_protocol(operations: list[Operation]) -> None:
    last = save_around(operations, commits_of(operations)[-1])
    kinds = {operations[i].kind for i in last}
    assert kinds == {
        *("create", "write", "sync", "close", "make_folder", "rename", "sync_folder"),
        *("remove_file", "remove_folder"),
    }
    assert sum(operations[i].kind == "create" for i in last) == len(checkpoint.SAVED) + 1


@pytest.mark.goal("R2")
def test_a_kill_at_any_operation_of_a_save_loses_nothing(
    proof, world: Path, operations: list[Operation], children: Children, tmp_path: Path
) -> None:
    kills = kills_of(operations)
    whole = outcome(world / "run")
    count = len(kills) if proof.long else 20
    for case in proof.cases(20, len(kills)):
        kill = kills[case * len(kills) // count]
        run = tmp_path / f"{case}" / "run"
        run.parent.mkdir()
        died = children.run("train_and_die", str(world), str(run), kill.at, kill.kind, kill.percent, True)
        assert died == KILLED, kill
        newest = checkpoint.newest_valid(run, print)
        assert (newest.name if newest else None) == kill.newest, kill
        train(config_of(world), out=run)
        ended = outcome(run)
        assert ended == whole, kill
        assert litter(run) == [], kill


@pytest.mark.goal("R2")
def test_a_kill_at_any_operation_of_a_save_beside_later_steps_loses_nothing(
    proof, world: Path, operations: list[Operation], children: Children, tmp_path: Path
) -> None:
    """The disk holds the save back until lines of later steps are written, and then all ends."""
    kills = [kill for kill in kills_of(operations) if kill.percent == 0]
    kills = [kill for kill in kills if kill.at < save_around(operations, commits_of(operations)[-1]).start]
    whole = outcome(world / "run")
    count = len(kills) if proof.long else 10
    for case in proof.cases(10, len(kills)):
        kill, num_lines = kills[case * len(kills) // count], 1 + case % 3  # one step, two, and their evaluation
        run = tmp_path / f"{case}" / "run"
        run.parent.mkdir()
        assert children.run("train_on_and_die", str(world), str(run), kill.at, kill.kind, num_lines) == KILLED, kill
        newest = checkpoint.newest_valid(run, print)
        assert (newest.name if newest else None) == kill.newest, kill
        known = checkpoint.read_state(newest)["records"] if newest else 0
        assert len(Journal.read(run / "metrics.jsonl")) >= known + num_lines, "it has trained on meanwhile"
        train(config_of(world), out=run)
        assert outcome(run) == whole, kill
        assert litter(run) == [], kill


def broken_run(world: Path, run: Path) -> Path:
    """A run whose newest checkpoint is damaged, with leftovers of two dead processes and a torn line."""
    shutil.copytree(world / "run", run)
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "step-00000006", checkpoints / "step-00000006.old.tmp-7")
    shutil.copytree(checkpoints / "step-00000006", checkpoints / "step-00000009.tmp-7")
    shutil.copytree(checkpoints / "step-00000008", checkpoints / "step-00000008.set-aside")
    (checkpoints / "step-00000008" / "model.safetensors").write_bytes(b"short")
    (run / "config.toml.tmp-7").write_text("half")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "lo')
    return run


@pytest.mark.goal("R2")
def test_a_kill_at_any_operation_of_a_resume_loses_nothing(
    proof, world: Path, children: Children, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sweeps, sets aside, writes its settings and cuts the journal: all before its first step."""
    disk = Counting()
    monkeypatch.setattr(files, "DISK", disk)
    train(config_of(world), out=broken_run(world, tmp_path / "count"))
    monkeypatch.setattr(files, "DISK", REAL)
    operations = disk.of(beside=False)
    ready = max(i for i, operation in enumerate(operations) if operation.kind == "append")
    assert {"rename", "remove_file", "remove_folder", "sync_folder"} <= {o.kind for o in operations[:ready]}
    whole = outcome(world / "run")
    count = ready if proof.long else 10
    for case in proof.cases(10, ready):
        run, at = broken_run(world, tmp_path / f"run-{case}"), case * ready // count
        assert children.run("train_and_die", str(world), str(run), at, operations[at].kind, 0, False) == KILLED, at
        train(config_of(world), out=run)
        assert outcome(run) == whole, case
        assert litter(run) == [], case
        assert (run / "checkpoints" / "step-00000008.set-aside").is_dir()
