"""What runs show of themselves: the end of a journal against all of it, and each state that a run may be in."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm import journal
from pocketlm.config import Config
from pocketlm.errors import FileError
from pocketlm.files import Lock, lock_holder
from pocketlm.journal import Journal
from pocketlm.training.runs import find_runs, glimpse

KINDS = ("train", "eval", "sample", "skip")


def run_of(folder: Path, *records: dict[str, Any], checkpoints: tuple[int, ...] = (0,), **fields: Any) -> Path:
    """A folder that looks like a run of 60 steps."""
    config = Config.preset("debug", {name.replace("__", "."): value for name, value in fields.items()})
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config.to_toml())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for step in checkpoints:
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    return folder


def train(step: int, loss: float = 3.0) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss, "smoothed_loss": loss, "elapsed_s": step / 2}


def evaluation(step: int, loss: float = 2.5) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "loss": loss, "bits_per_byte": loss / 2}


# --- the end of a journal


@given(
    kinds=st.lists(st.sampled_from(KINDS), max_size=40),
    tail=st.sampled_from([b"", b'{"kind": "eval", "st', b"\x00" * 9, b"x" * 200]),
    block=st.integers(1, 90),
)
def test_the_last_records_are_those_of_the_whole_journal(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], tail: bytes, block: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "metrics.jsonl"
    records = [{"kind": kind, "step": step, "text": '"eval" \n' * (step % 3)} for step, kind in enumerate(kinds)]
    path.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records) + tail)
    whole = {record["kind"]: record for record in records}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "BLOCK_BYTES", block)
        for wanted in ((), ("eval",), ("train", "eval"), KINDS):
            assert Journal.last(path, wanted) == {kind: whole[kind] for kind in wanted if kind in whole}


def test_of_a_long_journal_only_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Counted(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            sizes.append(len(data))
            return data

    path = tmp_path / "metrics.jsonl"
    records = [evaluation(1), *map(train, range(2, 1000)), evaluation(1000), train(1001)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(journal, "BLOCK_BYTES", 512)
    monkeypatch.setattr(Path, "open", lambda self, mode: Counted(self))
    assert Journal.last(path, ("train", "eval")) == {"eval": evaluation(1000), "train": train(1001)}
    assert sum(sizes) == 512


# --- states


def test_a_run_that_stopped(tmp_path: Path) -> None:
    seen = glimpse(run_of(tmp_path / "r", train(1), train(2, 4.0), evaluation(2), train(3, 3.5)))
    tree = seen.tree()
    assert (seen.state, seen.step, seen.total_steps) == ("stopped", 3, 60)
    assert (tree["loss"], tree["val_loss"], tree["bits_per_byte"]) == (3.5, 2.5, 1.25)
    assert (tree["tokens"], tree["elapsed_s"], tree["parameters"]) == (3 * 256, 1.5, 26_816)


def test_a_run_is_complete_with_its_last_checkpoint_and_its_last_evaluation(tmp_path: Path) -> None:
    whole = (train(59), train(60), evaluation(60))
    assert glimpse(run_of(tmp_path / "whole", *whole, checkpoints=(55, 60))).state == "complete"
    assert glimpse(run_of(tmp_path / "unsaved", *whole, checkpoints=(55,))).state == "stopped"
    assert glimpse(run_of(tmp_path / "broken-off", *whole[:2], checkpoints=(55, 60))).state == "stopped"


def test_a_run_is_running_while_its_lock_is_held_and_no_longer(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "r", train(1))
    with Lock(folder):
        assert glimpse(folder).state == "running"
        assert f"pid {os.getpid()}" in str(lock_holder(folder))
    assert glimpse(folder).state == "stopped"
    (folder / "run.lock").write_text("pid 1 on a machine that lost its power\n")
    assert glimpse(folder).state == "stopped"
    with Lock(folder):  # that was looked at, and is not kept by it
        pass


def test_what_cannot_be_read_is_damaged_and_says_why(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "r", train(1))
    (folder / "config.toml").write_text("[model]\nhidden_sise = 3\n")
    seen = glimpse(folder)
    assert seen.state == "damaged"
    assert "did you mean --model.hidden-size?" in seen.problem
    (folder / "config.toml").unlink()
    assert "No such file" in glimpse(folder).problem
    assert glimpse(folder).tree()["step"] == 0


def test_a_run_before_its_first_step(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "r")
    assert glimpse(folder).tree()["val_loss"] is None
    (folder / "metrics.jsonl").unlink()
    assert (glimpse(folder).state, glimpse(folder).step) == ("stopped", 0)


# --- a folder of runs


def test_the_newest_run_comes_first_and_what_is_no_run_is_left_out(tmp_path: Path) -> None:
    for name, at in (("old", 100), ("new", 300), ("middle", 200)):
        os.utime(run_of(tmp_path / "runs" / name, train(1)) / "metrics.jsonl", (at, at))
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "notes.txt").write_text("no run")
    assert [run.folder.name for run in find_runs(tmp_path / "runs")] == ["new", "middle", "old"]
    assert [run.folder.name for run in find_runs(tmp_path / "runs" / "old")] == ["old"]
    with pytest.raises(FileError, match=r"cannot read .*nowhere"):
        find_runs(tmp_path / "nowhere")
