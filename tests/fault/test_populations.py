"""Which checkpoint is taken and which ones go, in folders that hold anything: whole, damaged, strange and similar."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from disks import Failing
from populations import KINDS, Kind, make, snapshot_of

from pocketlm import checkpoint, files


def populate(run: Path, luck: random.Random, most: int) -> dict[int, Kind]:
    """Up to `most` checkpoints of random kinds, half of them whole, and names that only look like one."""
    kinds = {}
    for step in luck.sample(range(1000), luck.randint(0, most)):
        kinds[step] = KINDS[0] if luck.random() < 0.5 else luck.choice(KINDS)
        make(run / "checkpoints" / f"step-{step:08d}", kinds[step], luck)
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name in ("step-99", "step-00000001.set-aside", "step-00000002-mine", "step-00000003.tmp-7", "Step-00000004"):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints" / "step-00009999").symlink_to(run / "checkpoints" / "step-99")
    return kinds


def content(folder: Path) -> dict[str, bytes | str]:
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }


@pytest.mark.goal("R10")
def test_the_newest_whole_one_is_found_in_any_population(proof, tmp_path: Path) -> None:
    for case in proof.cases(40, 400):
        luck, run = proof.random(case), tmp_path / f"{case}"
        kinds = populate(run, luck, most=4)
        whole = [step for step, kind in kinds.items() if kind.whole]
        told: list[str] = []
        found = checkpoint.newest_valid(run, told.append)
        assert (checkpoint.step_of(found) if found else None) == max(whole, default=None), (case, kinds)
        assert len(told) == 1 + sum(step > max(whole, default=-1) for step in kinds), "one line for each, and the link"
        shutil.rmtree(run)


@pytest.mark.goal("R10")
def test_pruning_any_population(proof, tmp_path: Path) -> None:
    """By the rule as it is written down: of the whole ones the newest and the best stay, what is not ours stays."""
    for case in proof.cases(60, 600):
        luck, run = proof.random(case), tmp_path / f"{case}"
        kinds = populate(run, luck, most=9)
        metrics = {step: luck.choice([1.0, 2.0, 3.0]) for step in kinds if luck.random() < 0.7}
        keep_last, keep_best = luck.choice([2, 2, 3]), luck.choice([0, 1, 2])
        keep = set(luck.sample(sorted(kinds), min(len(kinds), luck.choice([0, 0, 1]))))

        whole = sorted(step for step, kind in kinds.items() if kind.whole)
        stay = set(whole[-keep_last:]) | keep
        stay |= set(
            sorted((step for step in whole if step in metrics), key=lambda step: (metrics[step], step))[:keep_best]
        )
        oldest_kept = whole[-keep_last:][0] if len(whole) >= 2 else -1
        doomed = {step for step, kind in kinds.items() if kind.removable and step < oldest_kept} - stay

        before = content(run)
        removed = checkpoint.prune(run, keep_last, keep_best, metrics, warn=lambda _: None, keep=keep)
        assert {checkpoint.step_of(path) for path in removed} == doomed, (case, kinds, metrics)
        gone = tuple(f"checkpoints/step-{step:08d}" for step in doomed)
        assert content(run) == {
            name: data
            for name, data in before.items()
            if not (gone and Path("/".join(Path(name).parts[:2])).as_posix() in gone)
        }, case
        assert sum(kinds[step].whole for step in kinds.keys() - doomed) >= min(2, len(whole)), case
        shutil.rmtree(run)


def test_a_disk_that_refuses_a_removal_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(5):
        checkpoint.save(tmp_path / "checkpoints", snapshot_of(step))
    told: list[str] = []
    monkeypatch.setattr(files, "DISK", Failing(5, 0, only=frozenset({"rename"})))
    removed = checkpoint.prune(tmp_path, 2, 0, {}, warn=told.append)
    assert [checkpoint.step_of(path) for path in removed] == [1, 2]
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [0, 3, 4]
    (line,) = told
    assert line == f"cannot remove {tmp_path / 'checkpoints/step-00000000'}: Input/output error"
    checkpoint.verify(tmp_path / "checkpoints/step-00000000")
