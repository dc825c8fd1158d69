"""Turns and segments, against a list of all turns written out; and what a run orders of a stream."""

from __future__ import annotations

from itertools import accumulate, groupby

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from pocketlm.config import DataConfig
from pocketlm.data.feed import AHEAD, wanted
from pocketlm.data.loader import Loader
from pocketlm.data.order import Rows, cut_rows
from pocketlm.data.segments import Segments, turn_of, turns_of
from pocketlm.data.streamed import num_validation_pieces
from pocketlm.training.progress import Progress


def written_out(num_pieces: int, size: int, epochs: int) -> list[tuple[int, int]]:
    """(segment, piece) of every turn: each epoch begins a segment, and so does every `size`-th piece of it."""
    turns = [(epoch, piece // size, piece) for epoch in range(epochs) for piece in range(num_pieces)]
    segments = [key for key, _ in groupby(turns, key=lambda turn: turn[:2])]
    return [(segments.index((epoch, inside)), piece) for epoch, inside, piece in turns]


@given(st.integers(1, 12), st.integers(1, 5))
def test_segments_are_those_of_a_list_of_all_turns(num_pieces: int, size: int) -> None:
    turns, segments = written_out(num_pieces, size, 3), Segments(size, num_pieces)
    assert [segments.of(turn) for turn in range(3 * num_pieces)] == [segment for segment, _ in turns]
    firsts = [next(turn for turn, (found, _) in enumerate(turns) if found == each) for each in range(turns[-1][0] + 1)]
    assert [segments.first_turn(each) for each in range(len(firsts))] == firsts
    unknown = Segments(size, None)
    assert [unknown.of(turn) for turn in range(num_pieces)] == [segment for segment, _ in turns[:num_pieces]]


@pytest.mark.parametrize(
    ("saved", "read", "keep", "kept"),
    [
        (0, range(1), 2, range(6)),
        (2, range(3, 4), 2, range(6)),  # the checkpoint in the new segment is not there yet
        (3, range(3, 4), 2, range(3, 9)),
        (0, range(6, 7), 2, range(3, 9)),  # no checkpoint could be saved: what is read comes first
        (0, range(6, 7), 3, range(9)),
        (5, range(6, 7), 3, range(3, 12)),
        (7, range(6, 7), 3, range(3, 12)),  # one before, the one that is read, and the next one
        (2, range(2, 4), 2, range(6)),  # a step across a border reads both
        (2, range(2, 8), 2, range(9)),  # and one that reads three segments has them
    ],
)
def test_which_segments_are_kept(saved: int, read: range, keep: int, kept: range) -> None:
    assert Segments(3, None).kept(saved, read, keep) == kept


@given(
    st.integers(1, 9), st.integers(1, 4), st.integers(2, 4), st.integers(0, 30), st.integers(1, 5), st.integers(0, 30)
)
def test_what_is_read_is_always_kept(n: int, size: int, keep: int, turn: int, length: int, behind: int) -> None:
    segments, read = Segments(size, n), range(turn, turn + length)
    kept = segments.kept(max(0, turn - behind), read, keep)
    assert set(read) <= set(kept)
    crossed = segments.of(read[-1]) - segments.of(read[0]) + 1
    assert segments.of(kept[-1]) - segments.of(kept[0]) + 1 == max(keep, crossed)


def rows(*num_rows: int, complete: bool = True) -> Rows:
    starts = [0]
    for count in num_rows:
        starts.append(starts[-1] + 4 * count + 1)
    return cut_rows(starts, 4, "piece", complete)


def test_the_turn_of_a_row() -> None:
    """A piece without a row has no turn of its own, and what lies behind the last row that is known is behind all."""
    assert [turn_of(rows(2, 0, 1), position) for position in range(6)] == [0, 0, 2, 3, 3, 5]
    assert [turn_of(rows(2, 0, 1, complete=False), position) for position in range(6)] == [0, 0, 2, 3, 3, 3]
    assert turns_of(rows(2, 0, 1), 1, 3) == range(4)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(any), st.integers(1, 3))
def test_the_segment_of_a_row_does_not_change_as_pieces_come(num_rows: list[int], size: int) -> None:
    """It is that of the row's piece, in the list of all turns."""
    turns = written_out(len(num_rows), size, 2)
    expected = [segment for segment, piece in turns for _ in range(num_rows[piece])]
    line = Line(num_rows)
    loader = Loader(line, 4, 0, "piece")
    assert [loader.segment(size, position + 1) for position in range(len(expected))] == expected
    assert loader.segment(size, 0) == loader.segment(0, 5) == 0
    line.complete = False
    for end in range(1, len(num_rows)):
        line.piece_starts = Line(num_rows[:end]).piece_starts
        loader.cut()
        known = sum(num_rows[:end])
        assert [loader.segment(size, position + 1) for position in range(known)] == expected[:known]


class Line:
    """Pieces with so many rows of four tokens."""

    def __init__(self, num_rows: list[int]) -> None:
        self.piece_starts = [4 * rows + number for number, rows in enumerate(accumulate(num_rows, initial=0))]
        self.num_tokens, self.complete = self.piece_starts[-1], True

    def read(self, start: int, length: int) -> np.ndarray:
        return np.arange(start, start + length, dtype=np.int64)


def test_a_run_enters_each_segment_once() -> None:
    """Also where rows were left out, and from a checkpoint made in the step that had entered it."""
    now = Progress()
    for step, segment in enumerate([0, 0, 1, 1, 3, 3], 1):
        now.step = step
        now.enter(segment)
        assert (now.entered_at == step) == (step in (3, 5))
    assert Progress(**now.model_dump()).entered_at == 5


def order(known: Rows, position: int, *, left: int = 1000, saved: int = 0, size: int = 0, keep: int = 0) -> object:
    config = DataConfig(source="hf:a/b", segment_pieces=size, keep_segments=keep)
    return wanted(known, position, 2, left, saved, config)


def test_what_is_ordered() -> None:
    begun = rows(4, 4, complete=False)
    assert order(begun, 0) == (list(range(2 + AHEAD)), None)
    assert order(begun, 0, left=8) == ([0, 1], None), "no more than the run reads"
    assert order(begun, 5) == (list(range(1, 2 + AHEAD)), None)
    assert order(begun, 0, size=1, keep=2) == ([0, 1], [0, 1])
    assert order(begun, 4, saved=4, size=1, keep=2) == ([1, 2], [1, 2])
    assert order(begun, 20, saved=20, size=1, keep=2) == ([2, 3], [2, 3]), "where nobody has read so far yet"


def test_what_is_ordered_across_epochs() -> None:
    whole = rows(4, 4, 4)
    assert order(whole, 8) == ([2, 0, 1], None)
    assert order(whole, 8, left=2) == ([2], None)
    assert order(whole, 8, saved=8, size=1, keep=2) == ([2, 0], [2, 0])
    assert order(whole, 8, saved=8, size=2, keep=2) == ([2, 0, 1], [2, 0, 1]), "the last segment has one piece"
    assert order(whole, 0, size=3, keep=2) == ([0, 1, 2], [0, 1, 2]), "each once"


def test_how_many_pieces_have_the_validation_text() -> None:
    config = DataConfig(val_tokens=10)
    assert num_validation_pieces([4, 5], config, complete=False) is None
    assert num_validation_pieces([4, 5], config, complete=True) == 2
    assert num_validation_pieces([4, 5, 1, 7], config, complete=False) == 3
    assert num_validation_pieces([10], config, complete=False) == 1
    assert num_validation_pieces([4, 5], DataConfig(), complete=False) is None
    assert num_validation_pieces([4, 5], DataConfig(), complete=True) == 2
    assert DataConfig(source="hf:a/b").validation_tokens == 65_536
