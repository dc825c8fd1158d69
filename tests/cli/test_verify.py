"""`pocketlm verify`: what is whole, what is not and by which file, and what is neither."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pocketlm import checkpoint
from pocketlm.cli.main import main
from pocketlm.config import Config
from pocketlm.files import Journal
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
    assert ("missing" in problem or "cannot read" in problem) if content is None else ("damaged" in problem)


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
