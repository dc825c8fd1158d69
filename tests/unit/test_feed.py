"""Both ends of the lines between a run and its feeder, and the sets that a run sees as streams."""

from __future__ import annotations

import json
import subprocess
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocketlm.cli.main import main
from pocketlm.config import Config, DataConfig
from pocketlm.data import feed
from pocketlm.data.prepare import prepare
from pocketlm.data.streamed import PieceStream, open_as_run, open_streamed
from pocketlm.errors import DataError
from pocketlm.text.documents import BEGINNING, Document, Place
from pocketlm.text.sources import Remembering, open_source

SYNTHETIC = {"source": "synthetic", "tokenizer": "byte", "piece_documents": 50, "val_fraction": 0.1, "stream": "on"}


ENDED = feed.Ended(DataError("it has ended"))


def raised(error: Exception) -> Any:
    raise error


class Scripted:
    """A feeder that says what the test has it say."""

    def __init__(self, config: DataConfig) -> None:
        self.says, self.heard_orders = deque[Any](), list[dict[str, Any]]()

    def order(self, order: dict[str, Any]) -> None:
        self.heard_orders.append(order)

    @property
    def has_said(self) -> bool:
        return bool(self.says)

    def heard(self, check: Callable[[], None]) -> dict[str, Any]:
        message = self.says.popleft()
        return raised(message) if isinstance(message, feed.Ended) else message

    def close(self) -> None:
        pass


def test_what_an_order_on_its_way_lets_go_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece counts only if no order after the one that was answered lets it go."""
    monkeypatch.setattr(feed, "Feeder", Scripted)
    ours = feed.Feed(DataConfig(**SYNTHETIC), print)
    said: Any = ours._feeder
    ours.order([0, 1], [0, 1])
    ours.order([1, 2], [1, 2])
    ours.order([1, 2], [1, 2])
    assert [order["number"] for order in said.heard_orders] == [1, 2], "what was said is not said again"
    said.says += [{"there": 0, "number": 1}, {"there": 1, "number": 1}]
    ours.hear_all(feed.nothing_to_check)
    assert ours.known.there == {1}
    ours.order([0], [0, 1])
    said.says += [{"there": 2, "number": 2}, {"there": 0, "number": 3}]
    ours.hear_all(feed.nothing_to_check)
    assert ours.known.there == {0, 1}
    ours.order([0], None)
    said.says.append({"there": 7, "number": 3})
    ours.hear_all(feed.nothing_to_check)
    assert ours.known.there == {0, 1, 7}


def test_a_feeder_that_has_ended_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the end either, where all pieces are there and only the mark of a whole set is lacking. Rows that are
    lacking are asked for once more."""
    monkeypatch.setattr(feed, "Feeder", Scripted)
    ours = feed.Feed(DataConfig(**SYNTHETIC), print)
    ours.known.complete = True
    ours.order([], None)
    said: Any = ours._feeder
    said.says.append(ENDED)
    ours.hear_all(feed.nothing_to_check)
    assert ours._feeder is None
    ours.close()
    monkeypatch.setattr(Scripted, "heard", lambda self, check: raised(ENDED))
    ours.hear(feed.nothing_to_check)
    assert ours._feeder is None, "the second one has ended, too"
    with pytest.raises(DataError, match="it has ended"):
        ours.hear(feed.nothing_to_check)


def feeder(lines: str, folder: Path) -> tuple[int, list[dict[str, Any]]]:
    """A feeder that is given these lines and no more: its exit code, and its answers."""
    done = subprocess.run(feed.COMMAND, input=lines, cwd=folder, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("last", ["", '{"number": 1, "ma'], ids=["nothing", "half an order"])
def test_the_feeder_ends_with_its_orders(tmp_path: Path, last: str) -> None:
    """Also in the middle of a line, for its run may be killed there."""
    code, _ = feeder(DataConfig(**SYNTHETIC, dir="set").model_dump_json() + "\n" + last, tmp_path)
    assert code == 0


def test_the_feeder_imports_nothing_from_where_the_run_stands(tmp_path: Path) -> None:
    for name in ("queue", "types", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(7)")
    code, _ = feeder(DataConfig(**SYNTHETIC, dir="set").model_dump_json() + "\n", tmp_path)
    assert code == 0


def test_a_refusal_has_the_exit_code_of_its_kind(tmp_path: Path) -> None:
    code, answers = feeder(DataConfig(**SYNTHETIC | {"source": "files:nothing"}).model_dump_json() + "\n", tmp_path)
    assert code in (0, 3), "its orders may end first"
    assert all(answer.get("code", 3) == 3 for answer in answers)


def test_an_unfinished_set_and_the_finished_one_are_the_same(tmp_path: Path) -> None:
    """By fingerprint and by validation text; as a whole, which knows no streams, it is another."""
    config = DataConfig(**SYNTHETIC, dir=str(tmp_path / "set"), val_tokens=500)
    with pytest.raises(DataError, match="has not come as far as its validation text"):
        open_streamed(tmp_path / "set", config)
    ours = feed.Feed(config, lambda line: None)
    begun = ours.dataset(32)
    assert begun.fingerprint == open_streamed(tmp_path / "set", config).fingerprint
    first = begun.val.read(0, 500)
    ours.close()
    finished = open_as_run(prepare(config, progress=lambda line: None), config)
    assert finished.fingerprint == begun.fingerprint == open_streamed(tmp_path / "set", config).fingerprint
    assert (finished.val.read(0, 500) == first).all()
    assert open_as_run(tmp_path / "set", DataConfig(**SYNTHETIC | {"stream": "off"})).fingerprint != begun.fingerprint


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="where a file is mapped is read from /proc")
def test_a_piece_that_is_let_go_holds_no_room_on_the_disk(tmp_path: Path) -> None:
    """A file that is removed keeps its room as long as it is mapped."""
    config = DataConfig(**SYNTHETIC, dir=str(tmp_path / "set"), val_tokens=500)
    prepare(config, progress=lambda line: None)
    stream = PieceStream(tmp_path / "set", 257)
    entries = open_as_run(tmp_path / "set", config)
    for shard in entries.train.shards[:2]:
        stream.add({"name": shard.path.name, "tokens": shard.layout.tokens} | shard.entry)
    del entries
    stream.read(0, 10)
    assert "train-00000.tokens" in Path("/proc/self/maps").read_text()
    stream.keep([1])
    assert "train-00000.tokens" not in Path("/proc/self/maps").read_text()


def test_a_validation_text_of_the_first_pieces_without_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a set that is shuffled as a whole lie across its pieces."""
    monkeypatch.chdir(tmp_path)
    words = ["--data.piece-documents", "20", "--data.val-tokens", "1000", "--total-steps", "40"]
    assert main(["train", "debug", "--out", "run", *words]) == 0


@pytest.mark.parametrize("preset", ["smallm", "smollm2-135m-official", "smollm2-1.7b"])
def test_presets_that_stream_take_local_text_too(preset: str) -> None:
    assert Config.preset(preset).data.streams
    assert not Config.preset(preset, {"data.source": "files:x"}).data.streams
    assert not Config.preset(preset, {"data.stream": "off"}).data.streams


def test_a_configuration_from_before_there_were_streams_is_read() -> None:
    before = Config.build({"data": {"source": "hf:a/b", "shuffle": "global"}}).data
    assert (before.streams, before.order, before.validation_tokens) == (False, "global", 0)


def test_first_documents_are_remembered_and_no_more() -> None:
    """Whatever is asked for it is what the source gives, and of what is remembered the source is not asked."""
    plain = open_source("synthetic")
    all_texts = [document.text for document in plain.documents()]
    asked = list[Place]()

    class Watched:
        spec, name, remote, dropped = plain.spec, plain.name, None, plain.dropped

        def documents(self, start: Place = BEGINNING) -> Any:
            asked.append(start)
            return plain.documents(start)

        def fingerprint(self) -> str:
            return plain.fingerprint()

    room = sum(map(len, all_texts[:5])) + 1
    source = Remembering(Watched(), room)
    for _ in range(3):
        found: list[Document] = list(source.documents())
        assert [document.text for document in found] == all_texts
        assert [document.place.row for document in found] == list(range(len(all_texts)))
    assert [place.row for place in asked] == [0, 5, 5]
    assert [document.text for document in source.documents(Place(row=9))] == all_texts[9:]
