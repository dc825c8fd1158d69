"""Mixtures: which source a row comes from, against counting; and runs on two sets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from pocketlm.cli.main import main
from pocketlm.config import Config
from pocketlm.data.loader import Loader
from pocketlm.data.mixture import BLOCK, Mixture, consumed, shares, sources_at
from pocketlm.errors import ConfigError

MIXED = """
preset = "debug"
[data]
tokenizer = "byte"
piece_documents = 64
val_fraction = 0.1
stream = "on"
segment_pieces = 2
keep_segments = 2
val_tokens = 2000
[[data.sources]]
source = "files:texts.jsonl"
weight = 3
[[data.sources]]
source = "synthetic"
[train]
total_steps = 90
checkpoint_every = 30
"""


class Line:
    """Token i is the number i plus ten thousand times the source."""

    complete = True

    def __init__(self, source: int, size: int) -> None:
        self.source, self.num_tokens, self.piece_starts = source, size, [0, size]

    def read(self, start: int, length: int) -> np.ndarray:
        return self.source * 10_000 + np.arange(start, start + length, dtype=np.int64)


@pytest.mark.parametrize(
    ("weights", "rows"),
    [
        ([1], (1024,)),
        ([1, 1], (512, 512)),
        ([3, 1], (768, 256)),
        ([1, 1, 1], (342, 341, 341)),  # 341 1/3 each: the rest goes to the first
        ([0.7, 0.2, 0.1], (717, 205, 102)),  # 716.8, 204.8, 102.4
        ([2, 1e-9], (1024, 0)),
    ],
)
def test_shares_by_hand(weights: list[float], rows: tuple[int, ...]) -> None:
    assert shares(weights) == rows


@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.integers(0, 3), st.integers(0, 5000), st.integers(1, 1500)
)
def test_sources_are_those_of_whole_blocks(weights: list[float], seed: int, position: int, count: int) -> None:
    """Whatever is asked for, it is a stretch of the one line; a block has each share, and rows before are counted."""
    rows = shares(weights)
    line = sources_at(seed, rows, 0, 8 * BLOCK)
    assert sources_at(seed, rows, position, count).tolist() == line[position : position + count].tolist()
    assert consumed(seed, rows, position) == tuple(np.bincount(line[:position], minlength=len(rows)).tolist())
    for block in line.reshape(8, BLOCK):
        assert tuple(np.bincount(block, minlength=len(rows)).tolist()) == rows


def test_places_differ_between_blocks_and_seeds() -> None:
    """And are golden: a run that goes on with a later version reads the same rows."""
    rows = shares([1, 1])
    line = sources_at(0, rows, 0, 2 * BLOCK)
    assert 400 < (line[:BLOCK] != line[BLOCK:]).sum() < 624
    assert 400 < (sources_at(1, rows, 0, BLOCK) != line[:BLOCK]).sum() < 624
    assert "".join(map(str, line[:32])) == GOLDEN


GOLDEN = "10001101101001010101100100111010"


def test_each_source_is_read_in_its_own_order() -> None:
    """However the rows are asked for, and over several epochs of the small one."""
    loaders = [Loader(Line(0, 4001), 4, 5, "global"), Loader(Line(1, 401), 4, 5, "global")]
    mixture = Mixture(loaders, [3, 1], seed=5)
    parts = [mixture.read(start, 250) for start in range(0, 2000, 250)]
    rows = np.concatenate([part.numpy() for part in parts])
    assert (rows == mixture.read(0, 2000).numpy()).all()
    for source, loader in enumerate(loaders):
        mine = rows[rows[:, 0] // 10_000 == source]
        assert (mine == loader.read(0, len(mine)).numpy()).all()
        assert len(mine) == mixture.positions(2000)[source]


def losses(run: Path) -> list[tuple[int, float]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"]) for record in records if record["kind"] in ("train", "eval")]


def test_a_run_on_two_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped and taken up again, and from sets that were finished before, it is the same run; its held-out text is
    found again, and other weights take the same sets."""
    monkeypatch.chdir(tmp_path)
    Path("mixed.toml").write_text(MIXED)
    texts = [f"text {number}: " + "apples and pears, " * (number % 30 + 1) for number in range(400)]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert main(["train", "mixed.toml", "--out", "whole"]) == 0
    said = capsys.readouterr().err
    assert "768 of 1,024 rows from files:texts.jsonl" in said
    assert main(["train", "mixed.toml", "--out", "stopped", "--train.stop-at-step", "45"]) == 0
    assert main(["train", "mixed.toml", "--out", "stopped"]) == 0
    assert main(["eval", "whole", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)["loss"]
    finished = ["--data.stream", "off", "--data.shuffle", "piece", "--data.keep-segments", "0"]
    assert main(["train", "mixed.toml", "--out", "finished", *finished]) == 0
    assert losses(Path("whole")) == losses(Path("stopped")) == losses(Path("finished"))
    assert scored == losses(Path("whole"))[-1][1]
    folders = {path.name for path in Path("data").iterdir()}
    weights = '[{source = "files:texts.jsonl", weight = 1}, {source = "synthetic", weight = 9}]'
    assert main(["train", "mixed.toml", "--out", "other", *finished, "--data.sources", weights]) == 0
    assert {path.name for path in Path("data").iterdir()} == folders
    assert losses(Path("other")) != losses(Path("whole"))
    capsys.readouterr()
    assert main(["train", "mixed.toml", "--out", "whole", "--data.sources", weights]) == 2
    assert "data.sources" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"data.dir": "x"}, "data.dir x is the folder of one source"),
        ({"data.tokenizer": "bpe:512"}, "pocketlm tokenizer train --source SOURCE --vocab-size 512 --out FILE"),
        ({"data.max_documents": 5}, "give it in each table of data.sources"),
        ({"data.sources": [{"source": "a", "weight": 1}, {"source": "b", "weight": 1e-6}]}, "no row in 1,024"),
        ({"data.sources": [{"source": "a", "weight": -1}]}, "data.sources"),
        ({"data.sources": [{"sourze": "a"}]}, "data.sources"),
    ],
)
def test_what_is_refused(fields: dict[str, object], words: str) -> None:
    sources = {"data.sources": [{"source": "synthetic", "weight": 1}, {"source": "stdlib", "weight": 2}]}
    with pytest.raises(ConfigError, match=re.escape(words)):
        Config.preset("debug", sources | fields)
