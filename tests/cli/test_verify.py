"""`pocketlm verify`: what is whole, what is not and by which file, and what is neither."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocketlm import checkpoint
from pocketlm.cli.main import main
from pocketlm.config import Config
from pocketlm.files import write_manifest
from pocketlm.journal import Journal
from pocketlm.reading import sha256_of
from pocketlm.training.loop import train

FIELDS = {"train.total_steps": 4, "train.checkpoint_every": 2, "train.eval_every": 2, "train.eval_tokens": 320}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return train(Config.preset("debug", FIELDS | {"data.dir": str(folder / "data")}), out=folder / "run")


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return Path("run")


class Verify:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def lines(self, path: Path, code: int) -> list[str]:
        assert main(["verify", str(path)]) == code
        printed = self.capsys.readouterr()
        assert printed.err == ""
        return printed.out.splitlines()

    def tree(self, path: Path, code: int) -> dict[str, Any]:
        assert main(["verify", str(path), "--json"]) == code
        printed = self.capsys.readouterr()
        assert printed.err == ""
        tree: dict[str, Any] = json.loads(printed.out)
        assert tree["whole"] == (code == 0)
        return tree

    def problems(self, path: Path) -> list[str]:
        return [part["problem"] for part in self.tree(path, 3)["parts"] if not part["whole"]]


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Verify:
    return Verify(capsys)


def test_all_of_a_whole_run_is_named(run: Path, verify: Verify) -> None:
    checkpoints = checkpoint.list_checkpoints(run)
    records = len(Journal.read(run / "metrics.jsonl"))
    assert verify.lines(run, 0) == [
        "run/config.toml: whole",
        "run/resolved.toml: whole",
        f"run/metrics.jsonl: whole ({records} records)",
        *(f"{path}: whole" for path in checkpoints),
        "a resume goes on from run/checkpoints/step-00000004",
    ]


def test_a_checkpoint_has_its_step_and_the_hash_of_its_state(run: Path, verify: Verify) -> None:
    tree = verify.tree(run, 0)
    assert tree["resume"] == "run/checkpoints/step-00000004"
    newest = tree["parts"][-1]
    assert newest["step"] == 4
    assert newest["state_hash"] == checkpoint.state_hash(run / "checkpoints/step-00000004")
    assert verify.tree(run / "checkpoints/step-00000004", 0)["parts"] == [newest]
    (run / "checkpoints/step-00000004/config.json").unlink()
    newest = verify.tree(run, 3)["parts"][-1]
    assert (newest["step"], newest["state_hash"]) == (4, None)


@pytest.mark.parametrize("name", ["config.toml", "resolved.toml", "metrics.jsonl"])
@pytest.mark.parametrize("content", [None, b"\xff\xfe = [", b""])
def test_a_damaged_file_of_a_run(name: str, content: bytes | None, run: Path, verify: Verify) -> None:
    if content is None:
        (run / name).unlink()
    elif content or name == "metrics.jsonl":  # an empty TOML file is one
        (run / name).write_bytes(content)
    else:
        return
    (problem,) = verify.problems(run)
    assert f"run/{name}" in problem
    words = ("missing", "cannot read") if content is None else ("damaged", "is no TOML")
    assert any(word in problem for word in words)


def test_a_torn_line_is_said_and_is_damage_only_where_a_resume_needs_it(run: Path, verify: Verify) -> None:
    journal = run / "metrics.jsonl"
    whole = journal.read_bytes()
    records = whole.count(b"\n")
    journal.write_bytes(whole + b'{"step": 5, "lo')
    assert f"run/metrics.jsonl: line {records + 1} is no record; a resume cuts the file there" in verify.lines(run, 0)
    lines = whole.splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], b"\0" * len(lines[3]), *lines[4:]]))
    (problem,) = verify.problems(run)
    assert problem == f"run/metrics.jsonl is damaged: 3 whole records, its newest checkpoint has {records}"


def test_what_lies_beside_a_run_is_named_and_is_no_damage(run: Path, verify: Verify) -> None:
    (run / "checkpoints/step-00000009.tmp-7").mkdir()
    (run / "config.toml.tmp-7").write_text("half")
    (run / "checkpoints/step-00000008.set-aside").mkdir()
    (run / "notes.txt").write_text("mine")
    lines = verify.lines(run, 0)
    assert sum("run/checkpoints/step-00000009.tmp-7: half-written" in line for line in lines) == 1
    assert sum("run/config.toml.tmp-7: half-written" in line for line in lines) == 1
    assert sum("run/checkpoints/step-00000008.set-aside: set aside" in line for line in lines) == 1
    assert not any("notes" in line for line in lines)


def test_a_run_that_was_stopped_before_its_first_checkpoint(tmp_path: Path, verify: Verify) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.toml").write_text("")
    assert verify.lines(tmp_path, 0)[-1] == "there is nothing to resume from: it begins afresh"
    assert verify.tree(tmp_path, 0)["resume"] is None


@pytest.mark.parametrize("name", ["config.toml", "resolved.toml"])
@pytest.mark.parametrize("text", ["a" + ".a" * 200 + " = 1", "#" * 70_000, "a = " + "9" * 5_000])
def test_a_hostile_toml_costs_no_memory_and_is_the_problem_of_its_file(
    name: str, text: str, run: Path, verify: Verify
) -> None:
    (run / name).write_text(text)
    (problem,) = verify.problems(run)
    assert problem.startswith(f"run/{name} ")


def test_records_without_a_whole_checkpoint_are_damage(run: Path, verify: Verify) -> None:
    lost = "run/checkpoints has no whole checkpoint, metrics.jsonl tells of 4 steps: they are lost"
    for path in checkpoint.list_checkpoints(run):
        (path / "manifest.json").unlink()
    *_, last = verify.problems(run)
    assert last == lost
    shutil.rmtree(run / "checkpoints")
    assert verify.problems(run) == [lost]
    (run / "checkpoints").mkdir()
    assert verify.problems(run) == [lost]
    assert lost in verify.lines(run, 3)


def test_records_of_step_0_are_lost_without_loss(run: Path, verify: Verify) -> None:
    """A run may be stopped before its first checkpoint: what it says of its beginning it says again."""
    shutil.rmtree(run / "checkpoints")
    journal = run / "metrics.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(line for line in lines if json.loads(line)["step"] == 0))
    assert verify.lines(run, 0)[-1] == "there is nothing to resume from: it begins afresh"


@pytest.mark.parametrize("name", ["prepare.lock", "plan.json"])
def test_an_unfinished_data_set(name: str, tmp_path: Path, verify: Verify) -> None:
    (tmp_path / name).write_text("")
    (tmp_path / "train-00000.tokens").write_bytes(b"half")
    problem = f"{tmp_path} is an unfinished data set; run the command that made it again"
    assert verify.problems(tmp_path) == [problem]
    assert verify.lines(tmp_path, 3) == [problem]


@pytest.mark.parametrize("path", ["n" * 5_000, "/".join(["n" * 200] * 20 + ["n" * 70])])
def test_a_path_that_is_too_long(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", path]) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"pocketlm: cannot read {path}: File name too long\n"


def sealed_again(path: Path) -> None:
    """Gives a checkpoint that was changed a manifest that knows of it."""
    files = {name: path / name for name in checkpoint.SAVED}
    write_manifest(
        path, {name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for name, file in files.items()}
    )


def no_tensors(path: Path) -> None:
    (path / checkpoint.OPTIMIZER).write_bytes(b"\xff" * 100)


def no_text(path: Path) -> None:
    _change_state(path, {"\ud800": 1})


def no_number(path: Path) -> None:
    _change_state(path, {"records": "many"})


def _change_state(path: Path, change: dict[str, Any]) -> None:
    (path / checkpoint.STATE).write_text(json.dumps(checkpoint.read_state(path) | change))


@pytest.mark.parametrize("change", [no_tensors, no_text, no_number])
@pytest.mark.parametrize("step", [2, 4])
def test_a_sealed_checkpoint_that_holds_no_state_is_one_problem_of_the_report(
    step: int, change: Callable[[Path], None], run: Path, verify: Verify
) -> None:
    path = run / f"checkpoints/step-{step:08d}"
    change(path)
    sealed_again(path)
    checkpoint.verify(path)
    (problem,) = verify.problems(run)
    assert problem.startswith(f"{path}")
    lines = verify.lines(run, 3)
    assert problem in lines
    assert "run/config.toml: whole" in lines
    taken = "goes on from {}" if step == 2 else "takes {}, and is refused"
    assert lines[-1] == "a resume " + taken.format("run/checkpoints/step-00000004")


def test_a_checkpoint_that_a_run_at_work_removes_is_no_damage(
    run: Path, verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its name was read, its files go before they are."""
    oldest, *kept = checkpoint.list_checkpoints(run)
    whole = checkpoint.verify

    def verify_late(path: Path) -> None:
        if path == oldest and path.exists():
            shutil.rmtree(path)
        whole(path)

    monkeypatch.setattr(checkpoint, "verify", verify_late)
    parts = verify.tree(run, 0)["parts"]
    assert [part["path"] for part in parts[3:]] == [str(path) for path in kept]


def test_the_records_are_those_that_the_checkpoint_knows(run: Path, verify: Verify) -> None:
    journal, newest = run / "metrics.jsonl", checkpoint.list_checkpoints(run)[-1]
    lines = journal.read_bytes().splitlines(keepends=True)
    state = checkpoint.read_state(newest)
    known = lines[: state["records"]]
    _change_state(newest, {"journal_sha256": hashlib.sha256(b"".join(known)).hexdigest()})
    sealed_again(newest)
    assert verify.tree(run, 0)["whole"]
    journal.write_bytes(b"".join([*lines, lines[-1]]))  # what comes after them is not compared
    assert verify.tree(run, 0)["whole"]
    journal.write_bytes(b"".join([*lines[:1], lines[1].replace(b"0", b"1", 1), *lines[2:]]))
    (problem,) = verify.problems(run)
    assert problem == (
        f"run/metrics.jsonl is damaged: its first {len(known)} records are not those that the checkpoint knows"
    )
    (newest / checkpoint.STATE).write_text(json.dumps(state | {"journal_sha256": None}))
    sealed_again(newest)
    assert verify.tree(run, 0)["whole"]
