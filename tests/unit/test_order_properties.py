"""The order of rows against a plain enumeration: once an epoch, and the same however it is read.

Token i of the stream is the number i, so a row shows where it was read. What an epoch must hold is listed by walking
through the pieces; which row comes when is taken from one reading in a single stretch, and every other way to read
(steps, micro-batches, stops with a new loader, slices for several ranks) has to give it again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from pocketlm.data.loader import Loader
from pocketlm.errors import DataError
from proof import Proof


class Line:
    """Token i is the number i, in pieces of these sizes."""

    complete = True

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.piece_starts = np.cumsum([0, *sizes]).tolist()
        self.num_tokens = sum(sizes)

    def read(self, start: int, length: int) -> np.ndarray:
        assert start >= 0
        assert start + length <= self.num_tokens
        return np.arange(start, start + length, dtype=np.int64)


@dataclass(frozen=True)
class Case:
    """A stream, a run over it, and where the run is stopped. A step is world x rows_per_rank rows."""

    sizes: tuple[int, ...]
    context: int
    shuffle: str
    seed: int
    rows_per_rank: int
    world: int
    micro_batch: int
    epochs: int
    stops: frozenset[int]

    def loader(self) -> Loader:
        return Loader(Line(self.sizes), self.context, self.seed, self.shuffle)  # type: ignore[arg-type]

    @property
    def rows_per_step(self) -> int:
        return self.rows_per_rank * self.world

    def rows(self) -> list[tuple[int, int]]:
        """The rows of an epoch as (piece, first token), by walking along the stream."""
        ends = list(pairwise(Line(self.sizes).piece_starts)) if self.shuffle == "piece" else [(0, sum(self.sizes))]
        found = []
        for piece, (start, end) in enumerate(ends):
            while start + self.context + 1 <= end:
                found.append((piece, start))
                start += self.context
        return found


@st.composite
def cases(draw: DrawFn) -> Case:
    return Case(
        sizes=tuple(draw(st.lists(st.integers(0, 70), min_size=1, max_size=6))),
        context=draw(st.integers(1, 12)),
        shuffle=draw(st.sampled_from(["global", "piece"])),
        seed=draw(st.integers(0, 2**63)),
        rows_per_rank=draw(st.integers(1, 9)),
        world=draw(st.integers(1, 5)),
        micro_batch=draw(st.integers(1, 50)),
        epochs=draw(st.integers(1, 3)),
        stops=draw(st.frozensets(st.integers(1, 30), max_size=6)),
    )


@pytest.mark.goal("R7")
def test_every_row_once_an_epoch_and_the_same_however_it_is_read(proof: Proof) -> None:
    size = proof.size(200, 1_500)

    @seed(proof.seed)
    @settings(max_examples=size, deadline=None)
    @given(cases())
    def check(case: Case) -> None:
        if case.rows():
            check_order(case)
        else:
            with pytest.raises(DataError, match="give more text"):
                case.loader()
        proof.count()

    check()
    assert proof.passed >= size


def check_order(case: Case) -> None:
    steps = -(-case.epochs * len(case.rows()) // case.rows_per_step)  # so many that the epochs are read to their end
    batch = case.loader().read(0, steps * case.rows_per_step).numpy()
    assert (batch == batch[:, :1] + np.arange(case.context + 1)).all(), "a row is a stretch of the stream"
    starts = batch[:, 0].tolist()
    check_epochs(case, starts)
    assert read_in_steps(case, steps) == starts
    check_ranks(case, steps, starts)


def check_epochs(case: Case, starts: list[int]) -> None:
    """Each epoch holds every row once, piece after piece; of the last, maybe unfinished one none twice."""
    rows = case.rows()
    piece_of = {start: piece for piece, start in rows}
    for first in range(0, len(starts), len(rows)):
        epoch = starts[first : first + len(rows)]
        assert len(set(epoch)) == len(epoch)
        assert len(epoch) < len(rows) or sorted(epoch) == sorted(piece_of)
        pieces = [piece for piece, _ in groupby(epoch, key=piece_of.__getitem__)]
        assert pieces == sorted(set(pieces)), "a piece was left and entered again"


def read_in_steps(case: Case, steps: int) -> list[int]:
    """Micro-batch by micro-batch; at a stop only the position is kept, as JSON, and the loader made anew."""
    loader, state, starts = case.loader(), json.dumps(0), []
    for step in range(steps):
        position: int = json.loads(state)
        if step in case.stops:
            loader = case.loader()
        end = position + case.rows_per_step
        while position < end:
            part = loader.read(position, min(case.micro_batch, end - position))
            starts += part[:, 0].tolist()
            position += len(part)
        state = json.dumps(position)
    return starts


def check_ranks(case: Case, steps: int, starts: list[int]) -> None:
    """Every rank has a loader of its own and reads its slice: together the step's batch, no row on two ranks."""
    loaders = [case.loader() for _ in range(case.world)]
    for step in range(steps):
        begin = step * case.rows_per_step
        together: list[int] = []
        for rank, loader in enumerate(loaders):
            part = loader.read(begin + rank * case.rows_per_rank, case.rows_per_rank)
            together += part[:, 0].tolist()
        assert together == starts[begin : begin + case.rows_per_step]
        inside_one_epoch = begin // len(case.rows()) == (begin + case.rows_per_step - 1) // len(case.rows())
        if inside_one_epoch:
            assert len(set(together)) == case.rows_per_step, "a row on two ranks"
