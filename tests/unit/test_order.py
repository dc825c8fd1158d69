"""The order is a permutation, a function of the position, and never changes between versions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.data.loader import Loader
from pocketlm.data.order import cut_rows, order_key, permute, rows_at
from pocketlm.errors import DataError


class Line:
    """Token i is the number i: a row shows where it was read."""

    complete = True

    def __init__(self, *sizes: int) -> None:
        self.piece_starts = np.cumsum([0, *sizes]).tolist()
        self.num_tokens = sum(sizes)

    def read(self, start: int, length: int) -> np.ndarray:
        return np.arange(start, start + length, dtype=np.int64)


@pytest.mark.goal("R7")
@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


@pytest.mark.goal("R7")
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 90), min_size=1, max_size=6),
    context=st.integers(1, 9),
    shuffle=st.sampled_from(["global", "piece"]),
    seed=st.integers(0, 3),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
)
def test_every_row_comes_once_an_epoch_however_it_is_read(sizes, context, shuffle, seed, cuts) -> None:
    rows = cut_rows(np.cumsum([0, *sizes]).tolist(), context, shuffle)
    if rows.total == 0:
        return
    whole = rows_at(rows, seed, 0, 3 * rows.total)
    for epoch in whole.reshape(3, rows.total):
        assert sorted(epoch) == list(range(rows.total))
    position = 0
    for count in cuts:  # any reading in parts is the reading as a whole: the position is all the state there is
        part = rows_at(rows, seed, position, count)[: max(0, 3 * rows.total - position)]
        assert part.tolist() == whole[position : position + count].tolist()
        position += count


@pytest.mark.goal("R7")
def test_pieces_are_read_in_order_and_epochs_differ() -> None:
    rows = cut_rows([0, 101, 301, 352], 10, "piece")
    assert rows.num_rows == (10, 19, 5)
    first, second = rows_at(rows, 7, 0, 68).reshape(2, 34)
    for epoch in (first, second):
        assert sorted(epoch[:10]) == list(range(10))
        assert sorted(epoch[10:29]) == list(range(10, 29))
    assert first.tolist() != second.tolist()
    assert first.tolist() != rows_at(rows, 8, 0, 34).tolist()


@pytest.mark.goal("R7")
def test_every_token_but_the_first_of_a_piece_and_the_tail_is_a_target_once() -> None:
    line = Line(50, 77)
    loader = Loader(line, context=8, seed=1, shuffle="piece")
    batch = loader.read(0, loader.rows.total)
    targets = batch[:, 1:].flatten().tolist()
    assert sorted(targets) == [*range(1, 49), *range(51, 123)]
    assert loader.rows.dropped_tokens == (50 - 1 - 48) + (77 - 1 - 72)
    assert (batch[:, 1:] - batch[:, :-1] == 1).all()


def test_the_order_is_not_the_identity_and_mixes_well() -> None:
    shuffled = permute(np.arange(10_000), 10_000, order_key(0, 0, 0))
    correlation = np.corrcoef(np.arange(10_000), shuffled)[0, 1]
    assert abs(correlation) < 0.03  # three standard deviations of an independent order
    assert np.mean(np.abs(np.diff(shuffled)) == 1) < 0.005


def test_golden_vectors_of_version_1() -> None:
    assert permute(np.arange(17), 17, order_key(0, 0, 0)).tolist()[:8] == [14, 2, 4, 3, 11, 8, 15, 9]
    assert permute(np.arange(1000), 1000, order_key(0, 0, 0)).tolist()[:8] == [214, 664, 729, 425, 100, 907, 302, 815]
    assert rows_at(cut_rows([0, 100, 250, 1000], 10, "piece"), 1, 94, 6).tolist() == [89, 62, 56, 4, 7, 8]


@pytest.mark.goal("R7")
def test_a_position_far_away_is_found_at_once() -> None:
    rows = cut_rows([0, 10**12], 256, "global")
    assert rows_at(rows, 0, 10**15, 4).tolist() == rows_at(rows, 0, 10**15 - 2, 6).tolist()[2:]


def test_too_little_text_is_refused() -> None:
    with pytest.raises(DataError, match="a row needs 9"):
        Loader(Line(8), context=8, seed=0, shuffle="global")
    assert Loader(Line(9), context=8, seed=0, shuffle="global").read(3, 2).shape == (2, 9)
