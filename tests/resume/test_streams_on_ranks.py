"""Several ranks on text that streams: the run on the finished set, while only the first rank has it made."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import oracle
import psutil
import pytest
from rig import Rig, flags

# 32 rows a step of 1,8xx: a second epoch begins before the last step, for which all pieces are made again.
FIELDS = {
    "train.total_steps": 60,
    "train.tokens_per_step": 1024,
    "train.checkpoint_every": 10,
    "train.eval_every": 20,
    "train.keep_last": 20,
    "sample.every": 0,
    "data.val_tokens": 500,
    "data.piece_documents": 20,
    "data.shuffle": "piece",
}
STREAMED = {"data.stream": "on", "data.segment_pieces": 1, "data.keep_segments": 2}


def words(out: str, *fields: dict[str, Any], preset: str = "debug", strategy: str = "ddp") -> list[str]:
    tree = FIELDS | {"train.strategy": strategy}
    for more in fields:
        tree |= more
    return ["train", preset, "--out", out, *flags(tree)]


def tensors(run: Path) -> dict[str, str]:
    """Of the last state, weights and moments, each leaf by name."""
    return {name: leaf for name, leaf in oracle.state(oracle.newest(run)).items() if ".safetensors:" in name}


@pytest.mark.goal("R1", "R5")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_stream_is_the_run_on_the_finished_set(strategy: str, rig: Rig) -> None:
    """Also killed in the middle, and gone on with in the second epoch, whose pieces are made again."""
    rig.run(words("one", {"data.dir": "finished"}))
    rig.run_ranks(2, words("two", {"data.dir": "finished"}, strategy=strategy))
    streamed = words("run", STREAMED, {"data.dir": "streamed"}, strategy=strategy)
    ranks = rig.start_ranks(2, streamed, only_holds={0: [("step", 27)]})
    ranks[0].reach("step", 27)
    ranks[0].kill()
    assert ranks.wait(30) == [-9, 1]
    ranks = rig.run_ranks(2, streamed)
    assert "going on from step 2" in ranks[0].stderr
    assert ranks[1].stderr == "", "only the first rank has a feeder"
    folder = rig.folder / "streamed"
    num_pieces = len(list(folder.glob("piece-*.json")))
    assert num_pieces > len(list(folder.glob("train-*.tokens"))) <= 2, "what was read has gone"
    assert FIELDS["train.total_steps"] * 32 > json_of(rig.folder / "finished" / "dataset.json")["train"]["tokens"] // 32
    assert tensors(rig.folder / "run") == tensors(rig.folder / "two")
    losses = oracle.losses(rig.folder / "run")
    assert losses == oracle.losses(rig.folder / "two")
    assert losses == pytest.approx(oracle.losses(rig.folder / "one"), rel=1e-5)


def json_of(path: Path) -> Any:
    return json.loads(path.read_bytes())


MIXED = """
preset = "debug"
[data]
tokenizer = "byte"
stream = "on"
[[data.sources]]
source = "files:texts.jsonl"
weight = 3
[[data.sources]]
source = "synthetic"
"""


@pytest.mark.goal("R5")
def test_a_mixture_of_streams_goes_on_on_another_number_of_ranks(rig: Rig) -> None:
    write_texts(rig.folder)
    (rig.folder / "mixed.toml").write_text(MIXED)
    rig.run(words("one", preset="mixed.toml"))
    rig.run_ranks(3, words("run", {"train.stop_at_step": 20}, preset="mixed.toml"))
    rig.run(words("run", {"train.stop_at_step": 30}, preset="mixed.toml"))
    rig.run_ranks(2, words("run", preset="mixed.toml", strategy="fsdp"))
    assert oracle.losses(rig.folder / "run") == pytest.approx(oracle.losses(rig.folder / "one"), rel=1e-5)


def test_a_feeder_that_is_killed_is_begun_anew(rig: Rig) -> None:
    """By the first rank; the others wait, and do the same steps."""
    rig.run_ranks(2, words("whole", STREAMED, {"data.dir": "whole-data"}))
    ranks = rig.start_ranks(2, words("run", STREAMED, {"data.dir": "data"}), only_holds={0: [("step", 5)]})
    ranks[0].reach("step", 5)
    [feeder] = psutil.Process(ranks[0].pid).children()
    assert psutil.Process(ranks[1].pid).children() == []
    feeder.kill()
    ranks[0].release()
    assert ranks.wait() == [0, 0], ranks.said()
    assert "was ended by signal 9; run the command again; it is begun anew" in ranks[0].stderr
    oracle.assert_equal(rig.folder / "run", rig.folder / "whole")


def write_texts(folder: Path, instead: str = "apples") -> Path:
    """One document a line, behind the first of which a word may be another one."""
    documents = [f"{number}: {instead if number > 200 else 'apples'} and pears " * 9 for number in range(400)]
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return file


def test_what_the_feeder_refuses_is_refused_on_all_ranks(rig: Rig) -> None:
    """Text that is no longer what it was, which only a later piece can tell; what was trained until there is saved."""
    file = write_texts(rig.folder)
    before = file.stat()
    given = words("run", STREAMED, {"data.dir": "data", "data.source": "files:texts.jsonl"})
    rig.run_ranks(2, [*given, "--train.stop-at-step", "50"])
    write_texts(rig.folder, "garlic")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    ranks = rig.start_ranks(2, [*given, "--resume", str(rig.folder / "run" / "checkpoints" / "step-00000010")])
    assert ranks.wait(30) == [3, 3], ranks.said()
    assert "is not what it was when it was first made" in ranks[0].stderr
    step = oracle.steps(rig.folder / "run")[-1]
    assert 10 < step < 50
    assert step % 10, "saved when it was refused"


def test_ranks_that_do_not_share_the_disk_are_refused(rig: Rig) -> None:
    """Before the first step; and where another one's folder has an older state of the set, when a piece is lacking."""
    line = "is not seen by all ranks, and text that streams is prepared by one for all; give a --data.dir on a disk"
    other = rig.folder / "other"
    other.mkdir()
    given = words("run", STREAMED, {"data.dir": "data"})
    ranks = rig.start_ranks(2, given, only_folder={1: other})
    assert ranks.wait(30) == [3, 3], ranks.said()
    assert f"data {line}" in ranks[0].stderr
    assert oracle_is_empty(rig.folder / "run")

    rig.run_ranks(2, [*given, "--train.stop-at-step", "10"])
    shutil.copytree(rig.folder / "data", other / "data")
    ranks = rig.start_ranks(2, given, only_folder={1: other})
    assert ranks.wait(30) == [3, 3], ranks.said()
    assert f".tokens {line}" in ranks[0].stderr
    assert oracle.steps(rig.folder / "run")[-1] > 10


def oracle_is_empty(run: Path) -> bool:
    return not (run / "metrics.jsonl").exists() and not (run / "checkpoints").exists()
