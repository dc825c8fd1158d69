"""Which checkpoint is taken and which ones go, in folders that hold anything: whole, damaged, strange and similar."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

import pytest
from disks import Failing
from populations import CONFIG, FOREIGN, KINDS, Kind, make, snapshot_of

from pocketlm import checkpoint, files, pruning
from pocketlm.errors import Unreadable
from pocketlm.training.loop import train


def populate(run: Path, luck: random.Random, most: int) -> dict[int, Kind]:
    """Up to `most` checkpoints of random kinds, half of them whole, and names that only look like one."""
    kinds = {}
    luckless = luck.random() < 0.1  # all whole ones differ from config.toml
    run.mkdir()
    (run / "config.toml").write_text(CONFIG.to_toml())
    for step in luck.sample(range(1000), luck.randint(0, most)):
        kinds[step] = KINDS[0] if luck.random() < 0.5 else luck.choice([*KINDS, KINDS[-1], KINDS[-1]])
        if luckless and kinds[step].whole:
            kinds[step] = KINDS[-1]
        make(run / "checkpoints" / f"step-{step:08d}", kinds[step], luck)
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name in ("step-99", "step-00000001.set-aside", "step-00000002-mine", "step-00000003.tmp-7", "Step-00000004"):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints" / "step-00009999").symlink_to(run / "checkpoints" / "step-99")
    return kinds


def whole_ones(kinds: dict[int, Kind]) -> tuple[list[int], list[int]]:
    """The steps of the run's own whole checkpoints, and of another run's; if all are, they are its own."""
    whole = sorted(step for step, kind in kinds.items() if kind.whole)
    own = [step for step in whole if kinds[step].own]
    return (own, [step for step in whole if step not in own]) if own else (whole, [])


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
        whole, _ = whole_ones(kinds)
        told: list[str] = []
        found = checkpoint.newest_valid(run, told.append)
        assert (checkpoint.step_of(found) if found else None) == max(whole, default=None), (case, kinds)
        passed = [s for s in kinds if s > max(whole, default=-1)]
        if whole and not kinds[max(whole)].own:  # looked for one of the run's own to the end
            passed = [s for s, kind in kinds.items() if not kind.whole]
        assert len(told) == 1 + len(passed), "one line for each, and the link"
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

        whole, foreign = whole_ones(kinds)
        stay = {*whole[-keep_last:], *foreign} | keep
        stay |= set(
            sorted((step for step in whole if step in metrics), key=lambda step: (metrics[step], step))[:keep_best]
        )
        oldest_kept = whole[-keep_last:][0] if len(whole) >= 2 else -1
        doomed = {step for step, kind in kinds.items() if kind.removable and step < oldest_kept} - stay

        before = content(run)
        removed = pruning.prune(run, keep_last, keep_best, metrics, warn=lambda _: None, keep=keep)
        assert {checkpoint.step_of(path) for path in removed} == doomed, (case, kinds, metrics)
        gone = tuple(f"checkpoints/step-{step:08d}" for step in doomed)
        assert content(run) == {
            name: data
            for name, data in before.items()
            if not (gone and Path("/".join(Path(name).parts[:2])).as_posix() in gone)
        }, case
        assert len(whole) - len(doomed & set(whole)) >= min(2, len(whole)), case
        shutil.rmtree(run)


def test_a_disk_that_refuses_a_removal_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(5):
        checkpoint.save(tmp_path / "checkpoints", snapshot_of(step))
    told: list[str] = []
    monkeypatch.setattr(files, "DISK", Failing(5, 0, only=frozenset({"rename"})))
    removed = pruning.prune(tmp_path, 2, 0, {}, warn=told.append)
    assert [checkpoint.step_of(path) for path in removed] == [1, 2]
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [0, 3, 4]
    (line,) = told
    assert line == f"cannot remove {tmp_path / 'checkpoints/step-00000000'}: Input/output error"
    checkpoint.verify(tmp_path / "checkpoints/step-00000000")


def refuse(patch: pytest.MonkeyPatch, method: str, at: Path, code: int) -> None:
    """From now on a method of Path fails there."""
    real = getattr(Path, method)

    def refusing(self: Path, *args, **kwargs):
        if self == at:
            raise OSError(code, os.strerror(code), str(at))
        return real(self, *args, **kwargs)

    patch.setattr(Path, method, refusing)


def saved(run: Path, number: int) -> list[Path]:
    return [checkpoint.save(run / "checkpoints", snapshot_of(step)) for step in range(number)]


@pytest.mark.goal("R10")
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ESTALE, errno.EACCES, errno.ENOMEM])
@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "training/config.toml"])
def test_a_checkpoint_that_cannot_be_read_now_is_neither_passed_over_nor_pruned_past(
    name: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest, told = saved(tmp_path, 4)[-1], list[str]()
    refuse(monkeypatch, "open", newest / name, code)
    with pytest.raises(Unreadable, match=f"cannot read {newest / name}: .*; it may be whole: .* again"):
        checkpoint.newest_valid(tmp_path, told.append)
    assert told == []
    assert pruning.prune(tmp_path, 2, 0, {}, warn=told.append) == []
    assert len(checkpoint.list_checkpoints(tmp_path)) == 4
    (line,) = told
    assert line.startswith(f"no checkpoint of {tmp_path} is removed: cannot read {newest / name}: ")


@pytest.mark.goal("R9")
def test_a_bad_sector_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, before, newest = saved(tmp_path, 4)
    told: list[str] = []
    refuse(monkeypatch, "open", newest / "model.safetensors", errno.EIO)
    assert checkpoint.newest_valid(tmp_path, told.append) == before
    assert len(told) == 1
    assert "Input/output error" in told[0]


@pytest.mark.goal("R6")
def test_a_checkpoint_of_another_format_is_refused_by_name_and_stays(tmp_path: Path) -> None:
    newest = saved(tmp_path, 4)[-1]
    (newest / "manifest.json").write_text('{"schema": 3, "files": [], "sha256": "of another kind"}')
    before = content(tmp_path)
    with pytest.raises(Unreadable, match=f"{newest}/manifest.json has format 3, this pocketlm reads 2; use "):
        checkpoint.newest_valid(tmp_path, print)
    assert pruning.prune(tmp_path, 2, 0, {}, warn=lambda _: None) == []
    with pytest.raises(Unreadable, match="has format 3"):
        train(CONFIG, out=tmp_path)
    after = content(tmp_path)
    assert {name: after[name] for name in before} == before, "nothing is set aside"


def test_a_flipped_number_of_the_format_is_damage(tmp_path: Path) -> None:
    *_, before, newest = saved(tmp_path, 2)
    manifest = newest / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema": 2', '"schema": 3'))
    told: list[str] = []
    assert checkpoint.newest_valid(tmp_path, told.append) == before
    assert "manifest.json is damaged: it has format 3" in told[0]


@pytest.mark.goal("R11")
@pytest.mark.parametrize(("method", "inside"), [("iterdir", "."), ("is_symlink", "step-00000000")])
def test_a_folder_that_cannot_be_listed_stops_no_training(
    method: str, inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 4)
    told: list[str] = []
    with monkeypatch.context() as patch:
        refuse(patch, method, tmp_path / "checkpoints" / inside, errno.EACCES)
        assert pruning.prune(tmp_path, 2, 0, {}, warn=told.append) == []
    assert len(told) == 1
    assert "Permission denied" in told[0]
    assert len(checkpoint.list_checkpoints(tmp_path)) == 4


def test_what_may_not_be_listed_inside_a_checkpoint_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 3)
    shut, told, real = tmp_path / "checkpoints" / "step-00000000" / "training", list[str](), os.scandir

    def scandir(path):
        if Path(path) == shut:
            raise PermissionError(errno.EACCES, "Permission denied", str(shut))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        assert pruning.prune(tmp_path, 2, 0, {}, warn=told.append) == []
    assert len(told) == 1
    assert str(shut) in told[0]


def test_newer_checkpoints_of_another_run_do_not_cost_the_run_its_own(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    (tmp_path / "config.toml").write_text(CONFIG.to_toml())
    for step in (7, 8):
        checkpoint.save(tmp_path / "checkpoints", snapshot_of(step, config=FOREIGN))
    told: list[str] = []
    removed = pruning.prune(tmp_path, 2, 0, {}, warn=told.append)
    assert [checkpoint.step_of(path) for path in removed] == [0]
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [1, 2, 7, 8]
    assert told == [f"{tmp_path}/checkpoints/step-{step:08d} is kept: it is of another run" for step in (7, 8)]
