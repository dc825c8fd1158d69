"""Several ranks on text that streams: the run on the finished set, while only the first rank has it made."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import oracle
import psutil
import pytest
from rig import Rig, flags

# 64 rows a step of about 1,800: a second epoch begins before the last step, for which all pieces are made again.
FIELDS: dict[str, Any] = {
    "train.total_steps": 36,
    "train.tokens_per_step": 2048,
    "train.checkpoint_every": 10,
    "train.eval_every": 12,
    "train.keep_last": 20,
    "sample.every": 0,
    "data.val_tokens": 500,
    "data.piece_documents": 30,
    "data.shuffle": "piece",
}
STREAMED = {"data.stream": "on", "data.segment_pieces": 2, "data.keep_segments": 2}


def words(out: str, *fields: dict[str, Any], preset: str = "debug", strategy: str = "ddp") -> list[str]:
    tree = FIELDS | {"train.strategy": strategy}
    for more in fields:
        tree |= more
    return ["train", preset, "--out", out, *flags(tree)]


def tensors(run: Path) -> dict[str, str]:
    """Of the last state, weights and moments, each leaf by name."""
    return {name: leaf for name, leaf in oracle.state(oracle.newest(run)).items() if ".safetensors:" in name}


@pytest.mark.goal("R1", "R5")
def test_a_stream_is_the_run_on_the_finished_set(rig: Rig) -> None:
    """Also killed in the middle, and gone on with in the second epoch, whose pieces are made again."""
    rig.run(words("one", {"data.dir": "finished"}))
    tokens = json.loads((rig.folder / "finished" / "dataset.json").read_bytes())["train"]["tokens"]
    assert FIELDS["train.total_steps"] * FIELDS["train.tokens_per_step"] > tokens
    alone = oracle.losses(rig.folder / "one")
    for strategy in ("ddp", "fsdp"):
        finished, run, folder = (f"{name}-{strategy}" for name in ("finished", "run", "data"))
        rig.run_ranks(2, words(finished, {"data.dir": "finished"}, strategy=strategy))
        streamed = words(run, STREAMED, {"data.dir": folder}, strategy=strategy)
        ranks = rig.start_ranks(2, streamed, only_holds={0: [("step", 17)]})
        ranks[0].reach("step", 17)
        ranks[0].kill()
        assert ranks.wait(30) == [-9, 1]
        ranks = rig.run_ranks(2, streamed)
        assert "going on from step 1" in ranks[0].stderr
        assert ranks[1].stderr == "", "it has told of a feeder"
        left = [len(list((rig.folder / folder).glob(names))) for names in ("train-*.tokens", "piece-*.json")]
        assert left[0] <= 4 < left[1], "what was read has gone"
        assert tensors(rig.folder / run) == tensors(rig.folder / finished)
        losses = oracle.losses(rig.folder / run)
        assert losses == oracle.losses(rig.folder / finished)
        assert losses == pytest.approx(alone, rel=1e-5)


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
    fields = {"train.total_steps": 20, "train.tokens_per_step": 128 * 32}
    rig.run(words("one", fields, preset="mixed.toml"))
    rig.run_ranks(3, words("run", fields, {"train.stop_at_step": 7}, preset="mixed.toml"))
    rig.run(words("run", fields, {"train.stop_at_step": 12}, preset="mixed.toml"))
    rig.run_ranks(2, words("run", fields, preset="mixed.toml", strategy="fsdp"))
    assert oracle.losses(rig.folder / "run") == pytest.approx(oracle.losses(rig.folder / "one"), rel=1e-5)


def assert_same(run: Path, whole: Path) -> None:
    """Every record and leaf; when a stream is known to its end, and with it the epoch, depends on when text came."""
    runs = [[record | {"epoch": None} for record in oracle.journal(each)] for each in (run, whole)]
    assert runs[0] == runs[1]
    assert oracle.state(oracle.newest(run)) == oracle.state(oracle.newest(whole))
    oracle.assert_whole(run)


def test_a_feeder_that_is_killed_is_begun_anew_and_one_that_stalls_is_waited_for(rig: Rig) -> None:
    """By all ranks alike: they do the same steps, and a signal to any of them ends the waiting."""
    rig.run_ranks(2, words("whole", STREAMED, {"data.dir": "whole-data"}))
    ranks = rig.start_ranks(2, words("run", STREAMED, {"data.dir": "data"}), only_holds={0: [("step", 5)]})
    ranks[0].reach("step", 5)
    [feeder] = psutil.Process(ranks[0].pid).children()
    assert psutil.Process(ranks[1].pid).children() == []
    feeder.kill()
    ranks[0].release()
    assert ranks.wait() == [0, 0], ranks.said()
    assert "was ended by signal 9; run the command again; it is begun anew" in ranks[0].stderr
    assert_same(rig.folder / "run", rig.folder / "whole")

    given = words("stopped", STREAMED, {"data.dir": "stopped-data"})
    ranks = rig.start_ranks(2, given, only_holds={0: [("step", 5)]}, only_phases={0: ["turn"]})
    ranks[0].reach("step", 5)
    psutil.Process(ranks[0].pid).children()[0].suspend()
    ranks[0].release()
    ranks[0].reach("turn", FIELDS["train.total_steps"] + 1)  # more than one a step
    ranks[1].kill(signal.SIGTERM)
    assert ranks.wait(30) == [143, 143], ranks.said()
    rig.run_ranks(2, given)
    assert_same(rig.folder / "stopped", rig.folder / "whole")


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
    rig.run_ranks(2, [*given, "--train.stop-at-step", "25"])
    write_texts(rig.folder, "garlic")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    ranks = rig.start_ranks(2, [*given, "--resume", str(rig.folder / "run" / "checkpoints" / "step-00000010")])
    assert ranks.wait(30) == [3, 3], ranks.said()
    assert "is not what it was when it was first made" in ranks[0].stderr
    assert 10 < oracle.steps(rig.folder / "run")[-1] == len(oracle.losses(rig.folder / "run")) < 25


def test_ranks_that_do_not_share_the_disk_are_refused(rig: Rig) -> None:
    """Before the first step; and where another one's folder has an older state of the set, when a piece is lacking."""
    line = "is not seen by all ranks, and text that streams is prepared by one for all; give a --data.dir on a disk"
    other = rig.folder / "other"
    other.mkdir()
    given = words("run", STREAMED, {"data.dir": "data"})
    ranks = rig.start_ranks(2, given, only_folder={1: other})
    assert ranks.wait(30) == [3, 3], ranks.said()
    assert f"data {line}" in ranks[0].stderr
    assert not (rig.folder / "run" / "config.toml").exists(), "nothing has begun"

    rig.run_ranks(2, [*given, "--train.stop-at-step", "10"])
    shutil.copytree(rig.folder / "data", other / "data")
    ranks = rig.start_ranks(2, given, only_folder={1: other})
    assert ranks.wait(30) == [3, 3], ranks.said()
    assert f".tokens {line}" in ranks[0].stderr
    assert oracle.steps(rig.folder / "run")[-1] == len(oracle.losses(rig.folder / "run")) >= 10
